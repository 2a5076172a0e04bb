"""The comparison of KPSVD's defaults with Adam: plan, resuming, command line, what `table` writes."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from .conftest import by_key, make_row

PROBLEMS = ("curves", "mnist", "faces", "digits", "conv", "regression", "narrow", "deep", "attention", "tumours")


# The plan


def test_plan_tries_adams_rates_on_the_search_seed_and_leaves_the_best_open_on_the_others():
    from defaults import RATES, make_plan

    plan = make_plan(["digits"], [64], [0, 1, 2], options={"method": "kfac"}, label="ours", epochs=5)
    adam = [(run.seed, run.options) for run in plan if run.optimizer == "adam"]
    assert adam == [*((0, {"learning_rate": rate}) for rate in RATES), (1, None), (2, None)]
    ours = [run for run in plan if run.optimizer == "kpsvd"]
    assert [run.seed for run in ours] == [0, 1, 2]
    assert all(run.options == {"method": "kfac"} and run.label == "ours" for run in ours)
    assert {run.epochs for run in plan} == {5} and len({run.key for run in plan}) == len(plan) == 10


def test_plan_takes_each_problems_own_batch_sizes_and_epochs_unless_told():
    from defaults import make_plan
    from problems import PROBLEMS

    plan = make_plan(PROBLEMS, None, [0], ["kpsvd"])
    assert [(r.problem, r.batch, r.epochs) for r in plan] == [
        (name, batch, problem.epochs) for name, problem in PROBLEMS.items() for batch in problem.batch_sizes
    ]
    assert {run.batch for run in make_plan(PROBLEMS, [64, 1024], [0], ["kpsvd"])} == {64, 1024}
    plan = make_plan(["digits"], [64], [0], epochs=200, kpsvd_epochs=40)
    assert {(run.optimizer, run.epochs) for run in plan} == {("adam", 200), ("kpsvd", 40)}


def test_best_options_have_the_lowest_loss_reached_of_those_that_neither_diverged_nor_failed():
    from runs import best_options

    rows = [
        make_row([0.5, 0.2, 0.4], options={"learning_rate": 1e-3}),
        make_row([0.5, 0.3, 0.3], options={"learning_rate": 3e-3}),
        make_row([0.1, None], options={"learning_rate": 1e-2}, status="diverged"),
        make_row([], options={"learning_rate": 3e-2}, status="failed"),
        make_row([0.01], options={"learning_rate": 3e-4}, seed=1),
    ]
    assert best_options(rows) == {"learning_rate": 1e-3}
    assert best_options(rows[2:]) is None


def test_best_rate_of_another_seed_waits_for_all_rates_of_the_search_seed():
    from defaults import RATES, make_plan
    from runs import ready

    plan = make_plan(["digits"], [64], [1], ["adam"], epochs=3)
    rows = [make_row([rate], options={"learning_rate": rate}) for rate in RATES]
    assert plan[-1].options is None and ready(plan[-1], by_key(*rows[1:])) is None
    assert ready(plan[-1], by_key(*rows)) == replace(plan[-1], options={"learning_rate": min(RATES)})
    for row in rows:
        row["status"] = "diverged"
    with pytest.raises(LookupError):
        ready(plan[-1], by_key(*rows))


# Results and resuming


def test_damaged_lines_are_named_and_kept_and_the_last_row_of_a_key_counts(tmp_path):
    from runs import Results

    path = tmp_path / "results.jsonl"
    rows = [make_row([0.5]), make_row([0.4]), make_row([0.3], seed=1)]
    lines = [json.dumps(rows[0]), "{broken", json.dumps(rows[1]), '{"problem": "digits"}', "[]", '{"seed": 7']
    path.write_text("\n".join(lines))  # The last line was cut short.
    results = Results(path)
    assert list(results.rows.values()) == [rows[1]]
    assert results.damaged == [2, 4, 5, 6]
    assert "line 2, 4, 5, 6" in results.warning() and "\n" not in results.warning()
    results.append(rows[2])
    assert path.read_text().splitlines() == [*lines, json.dumps(rows[2])]
    assert Results(path).rows == results.rows == by_key(rows[1], rows[2])
    assert Results(tmp_path / "none").warning() is None


def _command(path, *arguments):
    from defaults import parse_arguments, run_command

    return run_command(parse_arguments(["run", "--results", str(path), "--only", "digits", *arguments]))


def test_interrupted_command_goes_on_where_it_stopped(started, tmp_path, capsys):
    path, arguments = tmp_path / "new" / "results.jsonl", ("--batch-sizes", "64", "--seeds", "0", "1")
    started.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        _command(path, *arguments)
    assert len(path.read_text().splitlines()) == 4
    started.stop_at = None
    assert _command(path, *arguments) == 0
    assert len(started.runs) == 5 + 1 + 2 and len({run.key for run in started.runs}) == 8
    adam_on_seed_1 = [run.options for run in started.runs if run.optimizer == "adam" and run.seed == 1]
    assert adam_on_seed_1 == [{"learning_rate": 3e-4}]
    assert _command(path, *arguments) == 0 and len(started.runs) == 8
    assert _command(path, *arguments, "--options", '{"method": "kfac"}') == 0 and len(started.runs) == 10
    assert _command(path, *arguments, "--epochs", "2") == 0 and len(started.runs) == 18
    printed = capsys.readouterr().out
    assert "[1/8]" in printed and "8 runs planned, 4 of them found" in printed


def test_failed_runs_are_kept_and_made_again_only_if_told(started, tmp_path):
    from defaults import make_plan
    from runs import Results

    path, arguments = tmp_path / "results.jsonl", ("--batch-sizes", "64", "--seeds", "0", "--optimizers", "kpsvd")
    run = make_plan(["digits"], [64], [0], ["kpsvd"])[0]
    Results(path).append({**make_row([], status="failed"), **vars(run)})
    assert _command(path, *arguments) == 0 and started.runs == []
    assert _command(path, *arguments, "--again") == 0 and started.runs == [run]


def test_a_damaged_line_is_one_line_of_warning_and_no_obstacle(started, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("{broken\n")
    assert _command(path, "--batch-sizes", "64", "--seeds", "0", "--optimizers", "kpsvd") == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "damaged" in errors[0] and "line 1" in errors[0]
    assert path.read_text().startswith("{broken\n{")


def test_a_process_that_dies_is_a_row_with_its_last_words(tmp_path):
    from defaults import make_plan
    from execution import _Child
    from runs import check_row

    (run,) = make_plan(["digits"], [64], [0], ["kpsvd"])
    with (tmp_path / "out").open("w+") as output, (tmp_path / "err").open("w+") as errors:
        command = [sys.executable, "-c", "import sys; print('{'); sys.exit('first\\nno memory')"]
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        process.wait()
        row = _Child(run, process, output, errors, 0.0).row()
    check_row(row)
    assert row["status"] == "failed" and row["reason"] == "exit status 1: no memory" and row["seed"] == 0


def _studied(**changed):
    from contestants import METHODS

    errors = {method: {"error_1": 0.5, "error_2": None} for method in METHODS}
    whole = {"epoch": 1, "layer": "dense", "d_in": 3, "d_out": 2, "singular_values": [2.0, 1], "share_of_two": None}
    return {**make_row([1.0]), "fisher": [{**whole, "errors": errors, **changed}]}


@pytest.mark.parametrize(
    "changed",
    [
        *({"epoch": None}, {"d_in": "3"}, {"layer": 7}, {"share_of_two": "x"}),
        *({"singular_values": ["x"]}, {"singular_values": None}, {"errors": {}}, {"errors": None}),
    ],
)
def test_a_row_whose_study_of_errors_is_damaged_is_none(changed):
    from runs import check_row

    check_row(_studied())
    with pytest.raises((ValueError, KeyError, TypeError)):
        check_row(_studied(**changed))


def test_expected_time_comes_from_the_runs_most_alike():
    from defaults import make_plan
    from execution import expected_seconds

    digits, curves = make_plan(["digits", "curves"], [64], [0], ["kpsvd"], epochs=10)
    alike = make_row([1, 1], optimizer="kpsvd", wall_seconds=4)
    other_batch = make_row([1], optimizer="kpsvd", wall_seconds=7) | {"batch": 1024}
    adam = make_row([1], wall_seconds=1)
    assert expected_seconds(digits, [adam, other_batch, alike]) == 20
    assert expected_seconds(digits, [adam, other_batch]) == 70
    assert expected_seconds(curves, [adam]) == 10
    assert expected_seconds(curves, []) == 0


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--only", "digits", "nonesuch"],
        ["run", "--optimizers", "sgd"],
        ["run", "--options", "{method: kfac}"],
        ["run", "--options", "[1]"],
        ["run", "--batch-sizes", "0"],
        ["run", "--seeds", "-1"],
        ["run", "--label", "adam"],
        ["draw"],
        [],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_status_2(arguments, capsys):
    from defaults import parse_arguments

    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments)
    errors = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and "error" in errors[0]


def test_label_is_made_of_the_options_and_threads_of_the_jobs(monkeypatch):
    import defaults

    monkeypatch.setattr(defaults, "cores", lambda: 7)
    options = defaults.parse_arguments(["run", "--options", '{"method": "kfac"}', "--jobs", "2"])
    assert options.label == "kpsvd method=kfac" and options.threads == 3
    options = defaults.parse_arguments(["run"])
    assert options.label == "kpsvd" and options.threads == 7 and options.only == list(PROBLEMS)


# The table


def test_every_epoch_of_every_run_is_a_row_of_a_csv(tmp_path):
    from defaults import parse_arguments, table_command
    from runs import Results

    path, losses = tmp_path / "results.jsonl", tmp_path / "losses.csv"
    results = Results(path)
    results.append(make_row([0.5, 0.4], [2.0, 1.0], options={"learning_rate": 3e-4}))
    results.append(make_row([0.25, None], [4.0, 3.0], optimizer="kpsvd", status="diverged"))
    assert table_command(parse_arguments(["table", "--results", str(path), "--losses", str(losses)])) == 0
    with losses.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["epoch"], row["loss"], row["seconds"]) for row in rows] == [
        ("adam", "1", "0.5", "2"),
        ("adam", "2", "0.4", "1"),
        ("kpsvd", "1", "0.25", "4"),
        ("kpsvd", "2", "", "3"),
    ]
    assert json.loads(rows[0]["options"]) == {"learning_rate": 3e-4} and rows[0]["problem"] == "digits"


def test_printed_table_and_csv_hold_the_same_numbers_and_the_verdict_counts_wins(tmp_path, capsys):
    from defaults import parse_arguments, table_command
    from races import summarise
    from runs import Results

    path = tmp_path / "results.jsonl"
    results = Results(path)
    for row in (
        make_row([0.5, 0.4], [2.0, 1.0]),
        make_row([0.4, 0.3], [4.0, 2.0], optimizer="kpsvd"),
        make_row([0.5, 0.4]) | {"batch": 1024},
        make_row([0.9, 0.8], optimizer="kpsvd") | {"batch": 1024},
    ):
        results.append(row)
    assert table_command(parse_arguments(["table", "--results", str(path)])) == 0
    printed = capsys.readouterr().out
    assert "  0.3  " in printed and "adam 0.001" in printed
    assert (
        "kpsvd {}: reaches Adam's lowest training loss sooner in 1 of 2 comparisons by epochs, in 0 by sec" in printed
    )
    with path.with_suffix(".csv").open() as file:
        written = list(csv.DictReader(file))
    expected = [{k: "" if v is None else str(v) for k, v in line.items()} for line in summarise(results.rows)]
    assert written == expected and written[1]["epochs_ratio"] == "0.5"
    assert table_command(parse_arguments(["table", "--results", str(tmp_path / "none")])) == 1
