"""The harness's cost: rounds are paired, take turns in going first, and are written as one line for each case."""

import csv

import pytest


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The harness with invented seconds in place of trained epochs; the calls it makes, in order."""
    import harness

    calls = []
    bare = iter([1.0, 2.0, 4.0, 10.0, 20.0, 40.0])
    whole = iter([2.0, 2.0, 6.0, 5.0, 20.0, 40.0])

    def stand_in(name, seconds):
        def function(model, data, batch, epochs):
            calls.append((name, model, data, batch, epochs))
            return next(seconds)

        return function

    monkeypatch.setattr(harness, "CASES", (("one", 8, 16, "adam", {}), ("two", 4, 16, "kpsvd", {})))
    monkeypatch.setattr(harness, "ready", lambda problem, *_: (f"model {problem}", f"data {problem}"))
    monkeypatch.setattr(harness, "bare_seconds", stand_in("bare", bare))
    monkeypatch.setattr(harness, "harness_seconds", stand_in("harness", whole))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "new" / "harness.csv")
    return calls


def test_rounds_are_paired_and_take_turns_in_going_first(measured, tmp_path):
    from harness import main

    assert main(["--rounds", "3", "--epochs", "7"]) == 0
    names = [name for name, *_ in measured]
    first, second, third = names[:2], names[2:4], names[4:6]
    assert sorted(first) == ["bare", "harness"] and second == first[::-1] and third == first
    assert names[6:] == names[:6]
    assert [call[1:] for call in measured[:6]] == [("model one", "data one", 8, 7)] * 6
    assert [call[1:] for call in measured[6:]] == [("model two", "data two", 4, 7)] * 6
    with (tmp_path / "new" / "harness.csv").open() as file:
        one, two = csv.DictReader(file)
    # Ratios 2, 1, 1.5 and .5, 1, 1: of the seconds of one round each.
    assert [float(one[name]) for name in ("bare_epoch_seconds", "ratio", "lowest", "highest")] == [2, 1.5, 1, 2]
    assert [float(two[name]) for name in ("bare_epoch_seconds", "ratio", "lowest", "highest")] == [20, 1, 0.5, 1]
    assert (one["problem"], one["optimizer"], two["batch"], two["rounds"]) == ("one", "adam", "4", "3")


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--epochs", "x"]])
def test_wrong_arguments_are_one_line_and_nothing_is_measured(arguments, measured, capsys):
    from harness import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1 and measured == []
