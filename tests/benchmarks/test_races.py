"""Races against Adam: pairing, medians, flags."""

import json

import pytest

from .conftest import by_key, make_row


def test_race_counts_epochs_and_seconds_to_adams_lowest_loss():
    from races import race

    adam = make_row([0.9, 0.3, 0.4], [2.0, 1.0, 2.0])
    result = race(make_row([0.8, 0.5, 0.3, 0.1], [6.0, 2.0, 3.0, 3.0], optimizer="kpsvd"), adam)
    assert (result["epochs"], result["seconds"]) == (3, 11.0)
    assert result["epochs_ratio"] == pytest.approx(3 / 2) and result["seconds_ratio"] == pytest.approx(11 / 3)
    assert result["epoch_seconds_ratio"] == pytest.approx(3 / 1.5)
    assert race(make_row([0.8] * 5, [9.0, 9.0, 4.0, 3.0, 2.0], optimizer="kpsvd"), adam)[
        "late_epoch_seconds_ratio"
    ] == pytest.approx(3 / 1.5)
    assert result["held_out_loss_at_goal"] == pytest.approx(3.0)
    assert not result["ends_above"]
    never = race(make_row([0.8, None], optimizer="kpsvd", status="diverged"), adam)
    assert (
        never["held_out_loss_at_goal"] is never["epochs"] is never["seconds"] is never["seconds_ratio"] is None
        and never["ends_above"]
    )
    assert race(make_row([0.2, 0.41], optimizer="kpsvd"), adam)["ends_above"]
    assert not race(make_row([0.2, 0.39], optimizer="kpsvd"), adam)["ends_above"]


def test_race_compares_what_both_had_when_the_shorter_run_ended():
    from races import race

    def held_out(own, adam):
        result = race(own, adam)
        names = [f"{whose}held_out_{what}_equal_time" for whose in ("", "adams_") for what in ("loss", "accuracy")]
        return [result[name] for name in ("equal_time", *names)]

    adam = make_row([0.9, 0.3], [2.0, 2.0], accuracies=[0.6, 0.7])
    own = make_row([0.5, 0.4, 0.2], [3.0, 1.0, 1.0], optimizer="kpsvd", accuracies=[0.1, 0.2, 0.3])
    assert held_out(own, adam) == [4.0, 4.0, 0.2, 3.0, 0.7]
    own["seconds"] = [4.5, 1.0, 1.0]
    assert held_out(own, adam) == [4.0, None, None, 3.0, 0.7]
    own["seconds"] = [1.0, 1.0, 1.0]
    assert held_out(own, adam) == [3.0, 2.0, 0.3, 9.0, 0.6]


def test_table_pairs_seeds_and_takes_medians_with_never_as_infinite():
    from races import summarise

    rates = [
        make_row([loss], options={"learning_rate": rate}) for rate, loss in ((3e-4, 0.9), (1e-3, 0.2), (3e-3, 0.5))
    ]
    rows = by_key(
        *rates,
        make_row([0.4], seed=1),
        make_row([0.6], seed=2),
        make_row([0.9], options={"learning_rate": 3e-4}, seed=1),  # of an earlier search: not at the best rate
        make_row([0.3, 0.1], [3.0, 1.0], optimizer="kpsvd"),
        make_row([0.3, 0.25], [2.0, 1.0], optimizer="kpsvd", seed=1),
        make_row([0.9, 0.8], optimizer="kpsvd", seed=2),
        make_row([0.1], optimizer="kpsvd", seed=3),  # no Adam on this seed
        make_row([0.5, None], optimizer="kpsvd", options={"method": "kfac"}, status="diverged"),
    )
    adam, kfac, plain = sorted(summarise(rows), key=lambda line: (line["label"], line["options"] == "{}"))
    assert json.loads(adam["options"]) == {"learning_rate": 1e-3}
    assert (adam["best_loss"], adam["best_loss_low"], adam["best_loss_high"], adam["seeds"]) == (0.4, 0.2, 0.6, 3)
    assert (adam["epochs_to_adam"], adam["seconds_to_adam"], adam["epochs_ratio"]) == (1, 1.0, None)
    assert adam["flags"] == "3 of 5 rates tried"
    assert plain["reached"] == "2/3" and plain["epochs_to_adam"] == 2 and plain["seconds_ratio"] == 4.0
    assert (plain["epochs_low"], plain["epochs_high"]) == (1, None)  # One never gets there.
    assert (plain["seconds_ratio_low"], plain["seconds_ratio_high"]) == (2.0, None)
    assert adam["epochs_ratio_low"] is None and (kfac["epochs_low"], kfac["epochs_high"]) == (None, None)
    assert plain["best_loss"] == pytest.approx(0.175) and plain["held_out_loss"] == pytest.approx(1.75)
    assert plain["held_out_loss_equal_time"] is None and "ends above Adam 1/3" in plain["flags"]
    assert kfac["reached"] == "0/1" and kfac["epochs_ratio"] is None and kfac["held_out_loss"] is None
    assert "diverged 1/1" in kfac["flags"] and "ends above Adam 1/1" in kfac["flags"]


def test_table_keeps_problems_batches_and_epochs_apart_and_flags_what_cannot_be_compared():
    from races import summarise

    rows = by_key(
        make_row([0.5], options={"learning_rate": 3e-4}),
        make_row([0.4], optimizer="kpsvd", jobs=2),
        make_row([0.4], optimizer="kpsvd") | {"batch": 1024},
        make_row([0.4], optimizer="kpsvd") | {"epochs": 9},
        make_row([0.4], optimizer="kpsvd") | {"problem": "curves"},
    )
    lines = summarise(rows)
    assert [(line["problem"], line["batch"], line["epochs"], line["label"]) for line in lines] == [
        ("curves", 64, 3, "kpsvd"),
        ("digits", 64, 3, "adam"),
        ("digits", 64, 3, "kpsvd"),
        ("digits", 64, 9, "kpsvd"),
        ("digits", 1024, 3, "kpsvd"),
    ]
    assert lines[2]["flags"] == "timed under other conditions than Adam; timed beside other runs"
    assert all("no Adam on the same seeds" in lines[k]["flags"] for k in (0, 3, 4))


def test_short_runs_are_held_against_the_shortest_of_adams_that_are_longer():
    from races import summarise

    rows = by_key(
        make_row([0.5], options={"learning_rate": 3e-4}) | {"epochs": 2},
        make_row([0.5, 0.4, 0.35, 0.3], options={"learning_rate": 3e-4}) | {"epochs": 4},
        make_row([0.4, 0.2], options={"learning_rate": 1e-3}) | {"epochs": 9},
        make_row([0.6, 0.4, 0.3], optimizer="kpsvd"),
        make_row([0.6], optimizer="kpsvd") | {"epochs": 12},
    )
    shorter, longer = (line for line in summarise(rows) if line["label"] == "kpsvd")
    assert (shorter["epochs"], shorter["epochs_to_adam"], shorter["epochs_ratio"]) == (3, 3, 3 / 4)
    assert longer["reached"] == "0/0" and "no Adam on the same seeds" in longer["flags"]


def test_races_are_those_of_the_default_against_the_runs_that_the_table_holds_it_against():
    from races import races

    long = make_row([0.5, 0.4, 0.35, 0.3], options={"learning_rate": 1e-3}) | {"epochs": 4}
    worse = make_row([0.9] * 4, options={"learning_rate": 3e-4}) | {"epochs": 4}
    second = make_row([0.6] * 4, options={"learning_rate": 1e-3}, seed=1) | {"epochs": 4}
    own = [make_row([0.6, 0.4, 0.3], optimizer="kpsvd", seed=seed) for seed in (0, 1)]
    other = make_row([0.1], optimizer="kpsvd", options={"method": "kpsvd"}) | {"label": "other"}
    alone = make_row([0.4], optimizer="kpsvd") | {"batch": 1024}
    assert races([worse, long, second, *own, other, alone]) == {"digits, batch 64": ([long, second], own)}


def test_best_rate_at_the_end_of_the_range_is_flagged():
    from races import RATES, summarise

    rows = [make_row([rate], options={"learning_rate": rate}) for rate in RATES]
    assert summarise(by_key(*rows))[0]["flags"] == "best rate at the edge"
    rows[2] = make_row([0.0001], options={"learning_rate": RATES[2]})
    assert summarise(by_key(*rows))[0]["flags"] == ""


def test_labels_stand_to_the_fastest_by_the_geometric_mean_over_what_all_have():
    from race_table import verdicts
    from races import summarise

    def own(seconds, label, problem, loss=0.2):
        return make_row([loss], [seconds], optimizer="kpsvd", label=label, problem=problem)

    rows = by_key(
        *(make_row([0.3], problem=problem) for problem in ("digits", "narrow", "deep")),
        *(own(seconds, "one", problem) for seconds, problem in ((1.0, "digits"), (18.0, "narrow"), (1.0, "deep"))),
        *(own(seconds, "two", problem) for seconds, problem in ((4.0, "digits"), (2.0, "narrow"))),
    )
    sentences = verdicts(summarise(rows))[2:]
    assert sentences == [
        "one: 3.00 times the seconds of the fastest of 2, the fastest in 1 of 2 comparisons; "
        "3 of 3 runs reached Adam's lowest loss.",
        "two: 2.00 times the seconds of the fastest of 2, the fastest in 1 of 2 comparisons; "
        "2 of 2 runs reached Adam's lowest loss.",
    ]
    rows |= by_key(own(2.0, "two", "narrow", loss=0.4))
    assert verdicts(summarise(rows))[3].startswith(
        "two: 4.00 times the seconds of the fastest of 2, the fastest in 0 of 2"
    )
