"""Tables of the comparison, and the claims of the paper, on small invented rows."""

import csv

import pytest

from .conftest import make_row


def run_of(label, losses, seconds=None, **more):
    return make_row(losses, seconds, optimizer="adam", study="comparison", label=label, samples=100, **more)


def by_label(rows):
    from evidence import comparison

    return {standing.label: standing for standing in comparison(rows)}


def rows_of_three_seeds():
    return [
        run_of("adam", [0.9, 0.3, 0.4], [2.0, 1.0, 2.0], options={"learning_rate": 1}),
        run_of("adam", [0.9, 0.5, 0.5], options={"learning_rate": 2}),
        run_of("adam", [0.8, 0.4], [2.0, 2.0], options={"learning_rate": 1}, seed=1),
        run_of("adam", [0.8, 0.2], [2.0, 2.0], options={"learning_rate": 1}, seed=2),
        run_of("kfac", [0.3, 0.2], [6.0, 3.0], options={"damping": 1}),
        run_of("kfac", [0.5, 0.4, 0.1], [6.0, 4.0, 4.0], options={"damping": 1}, seed=1),
        run_of("kfac", [0.5, None], [6.0, 1.0], options={"damping": 1}, seed=2, status="diverged"),
    ]


def test_race_to_adams_best_is_paired_by_seed_and_never_counts_as_infinite():
    own = by_label(rows_of_three_seeds())
    kfac = own["kfac"].measures
    assert kfac["epochs_to_adam"].values == (1, 2, float("inf")) and kfac["epochs_to_adam"].median == 2
    assert kfac["seconds_to_adam"].median == 10 and kfac["seconds_to_adam"].finite == (6, 10)
    assert kfac["epochs_ratio"].values == (0.5, 1, float("inf"))
    assert kfac["seconds_ratio"].values == (2, 2.5, float("inf"))
    assert kfac["epoch_cost"].values == (2, 2, 0.5)
    assert kfac["loss"].values == (0.2, 0.1, 0.5) and kfac["first_epoch_seconds"].median == 6
    assert own["adam"].measures["epochs_to_kfac"].values == (float("inf"), float("inf"), 2)
    assert own["adam"].options == {"learning_rate": 1} and own["adam"].tried == 2
    assert own["adam"].measures["seconds_ratio"].values == (1, 1, 1)


def test_median_is_a_dash_where_most_seeds_never_got_there_and_a_failed_run_is_only_counted():
    from evidence import comparison, summarise
    from tables import SUMMARY, cells_of

    rows = rows_of_three_seeds()
    rows[5] |= {"losses": [0.5, 0.45], "seconds": [6.0, 4.0], "held_out_losses": [5.0, 4.5]}
    rows[5]["held_out_accuracies"] = [None, None]
    rows.append(run_of("kfac", [], options={"damping": 1}, seed=3, status="failed"))
    line = summarise(comparison(rows))[1]
    assert line["epochs_to_adam"] is None and line["reached_adam"] == "1/3"
    assert (line["seeds"], line["diverged"], line["failed"]) == (4, 1, 1)
    cells = dict(zip(*cells_of([line], SUMMARY), strict=True))
    assert cells["epochs to Adam's"] == "–" and cells["lowest loss"] == "0.45 (0.2–0.5)"
    assert cells["seeds"] == "4, 1 diverged, 1 failed"


def test_columns_of_several_seeds_are_medians_with_ranges():
    from evidence import comparison, summarise
    from paper import BESIDE, beside
    from tables import SUMMARY, cells_of

    rows = [row | {"problem": "curves"} for row in rows_of_three_seeds()]
    standings = comparison(rows)
    cells = dict(zip(*cells_of(summarise(standings)[1:], SUMMARY), strict=True))
    assert cells["epochs to Adam's"] == "2 (1–2)" and cells["seconds to Adam's"] == "10.0 (6.0–10.0)"
    assert cells["× Adam's epochs"] == "1.00 (0.50–1.00)" and cells["× Adam's seconds"] == "2.50 (2.00–2.50)"
    assert cells["epochs to KFAC's"] == "2 (1–3)" and cells["reached Adam"] == "2/3"
    ours = [cell for (heading, _), cell in zip(BESIDE, cells_of(beside(standings), BESIDE)[2], strict=True)
            if heading == "ours"]  # fmt: skip
    assert ours == [
        "0.2 (0.1–0.5)", "0.67 (0.25–2.50)", "2 (1–2)", "10.0 (6.0–10.0)", "2.50 (2.00–2.50)", "2.00 (0.50–2.00)",
    ]  # fmt: skip


def test_only_the_setting_chosen_on_seed_0_counts_and_of_equals_the_first():
    rows = [
        run_of("adam", [0.3], options={"learning_rate": 1}),
        run_of("adam", [0.3], options={"learning_rate": 2}),
        run_of("adam", [0.1], options={"learning_rate": 3}, status="diverged"),
        run_of("adam", [0.01], options={"learning_rate": 2}, seed=1),
        run_of("adam", [0.2], options={"learning_rate": 1}, seed=1),
    ]
    adam = by_label(rows)["adam"]
    assert adam.options == {"learning_rate": 1} and adam.measures["loss"].values == (0.3, 0.2)
    assert (adam.tried, adam.tried_badly) == (3, 1)


def test_optimizers_without_a_finished_setting_and_problems_without_adam_are_lines_too():
    from evidence import comparison, summarise
    from tables import SUMMARY, cells_of

    rows = [run_of("kfac", [0.3, 0.2]), run_of("muon", [None], status="diverged")]
    lines = summarise(comparison(rows))
    assert [line["label"] for line in lines] == ["muon", "kfac"]
    assert lines[0]["loss"] is None and lines[1]["epochs_ratio"] is None and "no Adam" in lines[1]["flags"]
    assert "none of 1 settings finished" in cells_of(lines, SUMMARY)[1]


def test_settings_are_kept_apart_and_other_conditions_are_said():
    from evidence import comparison, conditions, title_of

    rows = [run_of("adam", [0.3]), run_of("kfac", [0.2], jobs=2, threads=1), run_of("kfac", [0.2]) | {"batch": 9}]
    standings = comparison(rows)
    assert [s.setting.batch for s in standings] == [9, 64, 64]
    assert title_of(standings[0].setting, [s.setting for s in standings]) == "digits, batch 9"
    assert "timed under other conditions than Adam" in standings[2].flags
    assert "cannot be compared" in conditions(rows)[0]
    assert conditions(rows)[1].endswith(": adam, kfac.")
    assert conditions(rows[1:2]) == ["Seconds: CPU, two runs at a time, one thread each."]
    rows[0]["problem"] = "mnist"
    assert conditions(rows)[1].endswith(": comparison on mnist, comparison on digits.")


def test_coverage_counts_runs_of_the_plan():
    from evidence import stands_on

    rows = rows_of_three_seeds()
    planned = [{**row, "options": None if row["seed"] else row["options"]} for row in rows]
    assert stands_on(rows, planned) == "Stands on 7 of 7 planned runs; 1 diverged."
    assert stands_on(rows[1:], planned) == "Stands on 6 of 7 planned runs; 1 diverged."
    assert stands_on(rows, planned[:-1]).startswith("Stands on 6 of 6 planned runs and 1 not planned")
    assert stands_on(rows[:1], None) == "Stands on 1 run."


def test_epochs_are_medians_over_the_seeds_that_came_so_far():
    from evidence import comparison, per_epoch

    lines = [line for line in per_epoch(comparison(rows_of_three_seeds())) if line["label"] == "kfac"]
    assert [(line["epoch"], line["seeds"]) for line in lines] == [(1, 3), (2, 2), (3, 1)]
    assert (lines[1]["loss"], lines[1]["loss_low"], lines[1]["loss_high"]) == (pytest.approx(0.3), 0.2, 0.4)
    assert lines[1]["seconds"] == 9.5 and lines[1]["held_out_loss"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("own", "other", "strict", "word"),
    [
        ((1, 2), (3, 4), True, "holds"),
        ((3, 4), (1, 2), True, "does not hold"),
        ((1, 3), (2, 4), True, "within the seeds' spread"),
        ((2,), (2,), True, "tie"),
        ((2, 2), (2, 2), True, "tie"),
        ((2, 3), (1, 2), True, "does not hold"),
        ((2,), (2,), False, "holds"),
        ((), (2,), True, "no result"),
        ((None,), (None,), True, "neither"),
        ((None, None), (None,), False, "neither"),
        ((3,), (None,), True, "holds"),
        ((1, None), (2, 3), True, "within the seeds' spread"),
    ],
)
def test_verdict_compares_ranges(own, other, strict, word):
    from evidence import Spread
    from paper import verdict

    assert verdict(Spread.of(own), Spread.of(other), strict) == word


def test_claims_stand_beside_the_papers_figures_and_turn_with_ours():
    from evidence import comparison
    from paper import judge

    def judged(adam, kfac, sgd):
        rows = [run_of(label, [loss, loss], [1.0, cost]) | {"problem": "curves"} for label, loss, cost in
                (("adam", adam, 1.0), ("kfac", kfac, 2.5), ("sgd", sgd, 1.0))]  # fmt: skip
        return {line["claim"]: line for line in judge(comparison(rows))}

    lines = judged(0.3, 0.2, 0.1)
    kfac, sgd = "KFAC reaches a lower loss than Adam", "SGD reaches a lower loss than Adam"
    assert lines[kfac]["verdict"] == lines[sgd]["verdict"] == "holds (one seed)"
    assert lines[kfac]["paper"] == "0.0752 against 0.0796" and lines[kfac]["paper_verdict"] == "holds"
    assert lines["KPSVD reaches a loss at or below KFAC's"]["verdict"] == "no result"
    assert lines["an epoch of KFAC costs at most 2 × Adam's"]["verdict"] == "does not hold (one seed)"
    lines = judged(0.1, 0.2, 0.3)
    assert lines[kfac]["verdict"] == lines[sgd]["verdict"] == "does not hold (one seed)"
    assert lines["KFAC reaches Adam's best in less time than Adam"]["ours"].startswith("never against 1.0")


def test_sgd_is_claimed_on_the_papers_side_of_adam():
    from evidence import comparison
    from paper import judge

    rows = [run_of("adam", [0.2]) | {"problem": "mnist"}, run_of("sgd", [0.3]) | {"problem": "mnist"}]
    lines = {line["claim"]: line for line in judge(comparison(rows))}
    assert lines["SGD reaches a higher loss than Adam"]["verdict"] == "holds (one seed)"
    assert lines["KPSVD reaches a loss at or below KFAC's"]["paper_verdict"] == "does not hold"


def test_claims_count_seeds_ties_and_those_that_went_wrong():
    from evidence import comparison
    from paper import count_verdicts, judge

    rows = [row | {"problem": "curves"} for row in rows_of_three_seeds()]
    rows += [run_of("deflation", [0.3, 0.2], seed=seed) | {"problem": "curves"} for seed in range(2)]
    rows += [run_of("lanczos", [0.9]) | {"problem": "curves"}]
    lines = {line["claim"]: line for line in judge(comparison(rows))}
    kfac = lines["KFAC reaches a lower loss than Adam"]
    assert kfac["verdict"] == "within the seeds' spread" and kfac["notes"] == "kfac: 1 of 3 seeds diverged"
    assert lines["Deflation reaches a lower loss than KFAC"]["verdict"] == "within the seeds' spread"
    assert lines["Lanczos reaches Adam's best in less time than Adam"]["verdict"] == "does not hold (one seed)"
    rows = [run_of(label, [loss, loss]) | {"problem": "curves"} for label, loss in
            (("adam", 0.3), ("kfac", 0.2), ("deflation", 0.2), ("kfac_corrected", 0.4))]  # fmt: skip
    lines = judge(comparison(rows))
    epochs = {line["claim"].split()[0]: line["verdict"] for line in lines if "fewer epochs" in line["claim"]}
    assert epochs == {"Deflation": "tie", "Lanczos": "no result", "KFAC-corrected": "does not hold (one seed)"}
    counted = "3 × holds (one seed), 3 × does not hold (one seed), 4 × tie, 6 × no result."
    assert count_verdicts(lines).startswith(f"Of 16 claims: {counted}")


def test_report_says_how_ours_differ_from_the_papers_and_what_chance_does(tmp_path):
    from itertools import combinations

    from report import make_report

    rows = [row | {"problem": "faces", "batch": 256} for row in rows_of_three_seeds()]
    text = make_report(rows, tmp_path)
    assert "Batch sizes differ: faces 256, the paper's 1024." in text
    assert "a refresh in every step at first and in every tenth later" in text
    assert "Batch sizes differ" not in make_report([row | {"batch": 1024} for row in rows], tmp_path)
    for seeds, words in ((3, "three seeds each are apart by chance in 1 of 10"), (2, "two seeds in 1 of 3")):
        halves = [set(half) for half in combinations(range(2 * seeds), seeds)]
        apart = sum(max(half) == seeds - 1 or min(half) == seeds for half in halves)
        assert words in text and len(halves) == apart * int(words.split()[-1])


def test_report_writes_what_it_says(tmp_path):
    from report import make_report

    rows = [row | {"problem": "curves"} for row in rows_of_three_seeds()]
    text = make_report(rows, tmp_path / "new", planned=rows, extra="## Errors")
    page = (tmp_path / "new" / "report.md").read_text()
    assert page.endswith("## Errors\n") and "7 of 7 planned runs" in text and "Koroko" in page
    assert "![losses on curves](losses_curves.png)" in page and "| kfac | damping=1 | 3, 1 diverged |" in page
    with (tmp_path / "new" / "comparison.csv").open() as file:
        lines = {line["label"]: line for line in csv.DictReader(file)}
    assert lines["kfac"]["seconds_to_adam"] == "10.0" and lines["adam"]["epochs_to_kfac"] == ""
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report.md", "comparison.csv", "per_epoch.csv", "paper.csv", "claims.csv", "losses_curves.png",
        "to_target.png", "epoch_cost.png",
    }  # fmt: skip
    assert "Stands on 0 runs" in make_report([], tmp_path)


def test_report_tells_settings_at_the_edge_of_their_grids(tmp_path):
    from report import make_report

    rows = [run_of("adam", [loss], options={"learning_rate": rate}) for rate, loss in ((1e-2, 0.1), (3e-3, 0.2))]
    sentence = "At the edge of their grids, so that a better setting may lie beyond: adam, learning_rate=0.01 is the"
    assert sentence in make_report(rows, tmp_path / "edge")
    assert "At the edge" not in make_report(rows[1:], tmp_path / "inside")


def test_report_states_every_grid_why_runs_went_wrong_and_each_warning_once(tmp_path):
    from report import make_report

    rows = rows_of_three_seeds()
    rows[-1] |= {"reason": "loss of nan in epoch 2", "warnings": ["KPSVD trains by SGD: norm."]}
    rows.append(
        run_of("kfac", [], status="failed", options={"damping": 2}) | {"reason": "no | memory", "problem": "conv"}
    )
    for row in rows[-3:]:
        row["warnings"] = ["KPSVD trains by SGD: norm."]
    planned = [{**row, "options": None if row["seed"] else row["options"]} for row in rows]
    planned.append({**planned[0], "label": "muon", "options": {"learning_rate": 7.0}})
    text = make_report(rows, tmp_path, planned=planned)
    page = (tmp_path / "report.md").read_text()
    assert "| adam | learning_rate=1; learning_rate=2 |" in page and "| muon | learning_rate=7 |" in page
    assert "| diverged | comparison | digits | kfac | damping=1 | 2 | loss of nan in epoch 2 |" in page
    assert "| failed | comparison | conv | kfac | damping=2 | 0 | no \\| memory |" in page
    assert page.count("KPSVD trains by SGD") == 1 and "Warned on digits, conv: KPSVD trains by SGD: norm." in text
    clean = make_report(rows[:3], tmp_path / "clean")
    assert "went wrong" not in clean and "Warned" not in clean and "learning_rate=1; learning_rate=2" in clean
