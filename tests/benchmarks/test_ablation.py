"""Tables and sentences of the ablation: what they say follows from the numbers."""

import pytest

from .conftest import make_row


def case_rows(label, method, losses, seconds=1.0, statuses=()):
    """A row for each seed, its lowest loss given, and the seconds of an epoch after the first."""
    statuses = [*statuses, *["finished"] * len(losses)]
    return [
        make_row([loss, loss], [99.0 + seed, seconds], optimizer="kpsvd", study="ablation", label=label,
                 options={"method": method}, seed=seed, samples=100, status=statuses[seed])
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def said(*groups):
    from ablation import cases_of, sentences

    return "\n".join(sentences(cases_of([row for group in groups for row in group])))


def damping(kfac_sqrt, kfac_factor, corrected_sqrt, corrected_factor):
    return said(
        case_rows("damping: sqrt, adaptive λ", "kfac", kfac_sqrt),
        case_rows("damping: factor, adaptive λ", "kfac", kfac_factor),
        case_rows("damping: sqrt, adaptive λ", "kfac_corrected", corrected_sqrt),
        case_rows("damping: factor, adaptive λ", "kfac_corrected", corrected_factor),
    )


def test_damping_sentence_weighs_the_rule_against_the_second_term_and_turns_with_the_numbers():
    text = damping([1.0, 1.0], [0.8, 0.8], [0.9, 0.9], [0.72, 0.72])
    assert "(kfac_corrected against kfac) changes the lowest training loss by −10.0 % (sqrt), −10.0 % (factor)" in text
    assert "changes it by −20.0 % (kfac), −20.0 % (kfac_corrected): the damping rule matters more." in text
    assert "published code: −28.0 %" in text
    text = damping([1.0, 1.0], [0.9, 0.9], [1.2, 1.2], [1.08, 1.08])
    assert "+20.0 % (sqrt)" in text and "the second term matters more" in text
    # Halving is more than three fifths on top, and more than double is a factor.
    assert "the damping rule matters more" in damping([1.0, 1.0], [0.5, 0.5], [1.6, 1.6], [0.8, 0.8])
    assert "by a factor of 3 (sqrt)" in damping([1.0, 1.0], [1.0, 1.0], [3.0, 3.0], [3.0, 3.0])


def test_changes_within_the_seeds_spread_do_not_count():
    text = damping([1.0, 2.0], [0.99, 2.1], [0.98, 2.0], [1.0, 2.0])
    assert "(sqrt, within the seeds' spread)" in text and "neither moves it beyond the seeds' spread" in text


def test_a_single_seed_is_never_said_to_be_beyond_a_spread():
    texts = [damping([1.0], [0.7], [0.9], [0.6]), damping([1.0], [0.9], [0.5], [0.45])]
    assert "on one seed the damping rule moves it more" in texts[0]
    assert "on one seed the second term moves it more" in texts[1]
    for aspect in ("indefinite", "fisher"):
        for second in (0.5, 2.0, 1.0):
            rows = [
                case_rows(f"{aspect}: {case}", method, [loss * factor])
                for case, loss in (("a", 1.0), ("b", second))
                for method, factor in (("kfac", 1.0), ("kfac_corrected", 0.9))
            ]
            texts.append(said(*rows))
    assert "on one seed it lowers that of kfac, kfac_corrected" in texts[2]
    assert "on one seed it raises that of kfac, kfac_corrected" in texts[3]
    assert "on one seed it lowers it in 2 and raises it in 0 of 2 cases" in texts[5]
    for text in texts:
        assert "beyond" not in text and "matters more" not in text
    assert all("One seed has no spread" in text for text in texts[:4])


def test_cases_with_equal_losses_are_one_training_and_refreshes_are_counted():
    def rows(method, first, twenty, hundred):
        intervals = {"growing": first, "every 20": twenty, "every 100": hundred}
        options = {"growing": {}, "every 20": {"curvature_interval": 20}, "every 100": {"curvature_interval": 100}}
        return [
            row | {"options": row["options"] | options[name], "epochs": 8}
            for name, losses in intervals.items()
            for row in case_rows(f"interval: {name}", method, losses)
        ]

    # 100 images in batches of 64, twice 8 epochs.
    text = said(rows("kfac", [1.0, 1.1], [2.0, 2.1], [2.0, 2.1]))
    assert 'of the 16 steps of a run these refresh the curvature: 13 with "growing", 1 with "every 20", 1' in text
    assert '"every 100" and "every 20" are the same training for kfac: every loss is equal' in text
    assert '"every 20" against "growing"' in text and '"every 100" against "growing"' not in text
    text = said(rows("kfac", [1.0, 1.1], [2.0, 2.1], [2.0, 2.2]), rows("kfac_corrected", [1, 2], [3, 4], [3, 4]))
    assert "the same training for kfac_corrected:" in text and '"every 100"' in text.partition("second term")[2]
    both = [rows(method, [1.0, 1.1], [2.0, 2.1], [2.0, 2.1]) for method in ("kfac", "kfac_corrected")]
    assert '"every 100"' not in said(*both).partition("second term")[2]


def test_a_case_without_losses_is_neither_weighed_nor_called_within_the_spread():
    text = damping([1.0] * 3, [0.8] * 3, [1.0, None, None], [0.72] * 3)
    assert "no loss at all (sqrt)" in text and "cannot be weighed" in text


def test_cases_are_set_against_the_first_for_each_method_also_where_that_speaks_against_them():
    def text(second):
        return said(
            case_rows("indefinite: absolute", "lanczos", [1.0, 1.1], 2.0),
            case_rows("indefinite: reflect", "lanczos", second, 1.0),
        )

    start = 'On digits, indefinite: "reflect" against "absolute" changes the lowest training loss by '
    assert text([0.5, 0.55]).startswith(start + "−50.0 % (lanczos)") and "it lowers that of lanczos" in text([0.5, 0.5])
    assert "seconds of an epoch after the first by −50.0 %" in text([0.5, 0.5])
    assert "+100.0 % (lanczos)" in text([2.0, 2.2]) and "it raises that of lanczos" in text([2.0, 2.2])
    assert "beyond the seeds' spread no loss changes" in text([1.05, 1.05])


def test_second_term_is_judged_under_every_case_and_missing_methods_are_passed_over():
    text = said(
        case_rows("fisher: sampled", "kfac", [1.0, 1.0]),
        case_rows("fisher: sampled", "kfac_corrected", [0.5, 0.5]),
        case_rows("fisher: exact", "kfac", [1.0, 1.0]),
        case_rows("fisher: exact", "kfac_corrected", [1.5, 1.5]),
    )
    assert '−50.0 % ("sampled"), +50.0 % ("exact")' in text and "lowers it in 1 and raises it in 1 of 2 cases" in text
    assert said(case_rows("fisher: sampled", "kfac", [1.0])) == ""


def test_diverged_seeds_are_said_and_stand_in_the_table_with_seeds_paired():
    from ablation import ablation_lines, cases_of, table_of

    rows = [
        *case_rows("interval: every 5", "kfac", [1.0, 2.0, 4.0]),
        *case_rows("interval: every 20", "kfac", [0.5, None, 2.0], statuses=["finished", "diverged"]),
        *case_rows("interval: every 20", "lanczos", [3.0]),
    ]
    cases = cases_of(rows)
    assert table_of(cases, "loss", ".4g") == [
        ["method", "every 5", "every 20"],
        ["kfac", "2 (1–4)", "2 (0.5–2), 1 of 3 diverged"],
        ["lanczos", "–", "3"],
    ]
    assert 'diverged: kfac with "every 20" on 1 of 3 seeds.' in said(rows)
    assert [(line["loss"], line["diverged"]) for line in ablation_lines(cases)] == [(2, 0), (2, 1), (3, 0)]


def test_change_is_the_median_of_ratios_over_the_seeds_of_both():
    from ablation import cases_of, change

    rows = [*case_rows("batch: a", "kfac", [1.0, 2.0, 4.0]), *case_rows("batch: b", "kfac", [2.0, 2.0])]
    first, second = cases_of(rows)
    assert change(second, first, "x").size == pytest.approx(0.5)
    assert change(second, None, "x") is None


def test_cases_are_in_the_order_of_the_plan():
    from ablation import cases_of

    rows = [*case_rows("batch: b", "kfac", [1.0]), *case_rows("batch: a", "kfac", [1.0])]
    assert [case.case for case in cases_of(rows, planned=rows[::-1])] == ["a", "b"]
