"""The commands that make the runs of a plan, say how far they are, and report."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from .conftest import main_of_reproduce as _main
from .conftest import make_row

ROOT = Path(__file__).parents[2]
CONTESTANTS = ("sgd", "adam", "adamw", "muon", "kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def _written(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_live_run_is_found_before_its_plan_is_replaced(small, started, tmp_path, capsys):
    (tmp_path / "plan.json").write_text("another plan")
    (tmp_path / "running.json").write_text(json.dumps({"process": os.getppid(), "runs": []}))
    before = _written(tmp_path)
    assert _main(tmp_path, "run", "--replan") == 2
    assert "already" in capsys.readouterr().err and _written(tmp_path) == before


@pytest.mark.parametrize("command", [("run",), ("run", "--replan"), ("status",), ("report",)])
@pytest.mark.parametrize("what", ["file", "below a file", "results are a folder", "plan is a folder"])
def test_folders_that_are_files_and_files_that_are_folders_are_one_line(
    what, command, small, started, tmp_path, capsys
):
    folder = tmp_path / "results"
    if "folder" in what:
        (folder / {"results": "runs.jsonl", "plan": "plan.json"}[what.split()[0]]).mkdir(parents=True)
    else:
        folder.write_text("mine")
    before, started.stop_at = _written(tmp_path), 0
    assert _main(folder / "deeper" if what == "below a file" else folder, *command) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(folder) in errors[0] and _written(tmp_path) == before


def test_a_folder_nobody_may_write_to_is_one_line(small, started, tmp_path, capsys, monkeypatch):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert _main(tmp_path, "run") == 2 and started.runs == []
    (error,) = capsys.readouterr().err.splitlines()
    assert "Permission denied" in error and str(tmp_path) in error


def test_filters_that_leave_no_run_are_an_error_and_no_plan_is_written(small, started, tmp_path, capsys):
    assert _main(tmp_path, "run", "--problems", "narrow", "--studies", "ablation") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "none of the 27 runs" in error and _written(tmp_path) == {}


@pytest.mark.parametrize("command", ["status", "report"])
def test_without_a_plan_the_other_commands_say_what_makes_one(command, tmp_path, capsys):
    assert _main(tmp_path / "new", command) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "`reproduce.py run` makes it" in error and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"losses": ["low"]},
        {"seconds": [None]},
        {"seconds": ["1"]},
        {"held_out_losses": [[1.0]]},
        {"held_out_accuracies": [True]},
        {"losses": "9", "status": "diverged"},
        {"options": None},
    ],
)
def test_series_of_anything_but_numbers_are_no_row(damage, tmp_path):
    from runs import Results

    row = make_row([0.5])
    lines = [json.dumps(row | {"label": "other"}), json.dumps(row | damage)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    results = Results(tmp_path / "runs.jsonl")
    assert results.damaged == [2] and len(results.rows) == 1


def test_plan_stands_before_anything_runs_and_an_interrupted_command_goes_on(small, started, tmp_path, capsys):
    from plans import read_plan

    started.stop_at = 0
    assert _main(tmp_path, "run", "--studies", "comparison") == 130
    _, plan = read_plan(tmp_path / "plan.json")
    assert len(plan) == 2 * 3 + 2 * 2 + 1 + 16 and not (tmp_path / "runs.jsonl").exists()
    started.stop_at = 4
    assert _main(tmp_path, "run", "--studies", "comparison") == 130
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "running.json").exists()
    started.stop_at = None
    assert _main(tmp_path, "run", "--studies", "comparison") == 0
    assert len(started.runs) == 10 and len({run.key for run in started.runs}) == 10
    assert _main(tmp_path, "run", "--studies", "comparison") == 0 and len(started.runs) == 10
    printed = capsys.readouterr().out
    assert "10 asked for, 10 of them found" in printed
    assert printed.count("running: digits, batch 32, seed 1, adam learning_rate=0.001") == 1
    best = [run.options for run in started.runs if run.seed == 1 and run.label == "adam"]
    assert best == [{"learning_rate": 1e-3}]  # The stand-in's loss is the rate.


def test_only_what_is_asked_for_runs(small, started, tmp_path):
    assert _main(tmp_path, "run", "--problems", "digits", "--optimizers", "adam") == 0
    assert {(run.study, run.problem, run.label) for run in started.runs} == {("comparison", "digits", "adam")}
    assert len(started.runs) == 3


def test_runs_that_differ_in_name_only_are_made_once(small, started, tmp_path):
    from runs import Results

    assert _main(tmp_path, "run", "--studies", "ablation", "--problems", "digits") == 0
    made = Counter(json.dumps(run.options, sort_keys=True) for run in started.runs)
    assert set(made.values()) == {1}
    rows = Results(tmp_path / "runs.jsonl").rows.values()
    shared = [row for row in rows if row.get("shared")]
    assert len(rows) == len(started.runs) + len(shared) == 16
    assert {row["label"] for row in shared} == {"conjugate gradients: 1", "interval: growing", "fisher: sampled"}
    (twin,) = (row for row in rows if row["label"] == "damping: sqrt, adaptive λ")
    assert {k: v for k, v in shared[0].items() if k not in ("label", "shared")} == {
        k: v for k, v in twin.items() if k != "label"
    }


def test_runs_under_other_conditions_are_no_twins(small, started, tmp_path):
    assert _main(tmp_path, "run", "--studies", "comparison", "--problems", "digits", "--jobs", "2") == 0
    number = len(started.runs)
    assert _main(tmp_path, "run", "--studies", "ablation", "--problems", "digits") == 0
    assert {"method": "kfac"} in [run.options for run in started.runs[number:]]


def test_a_plan_put_in_the_place_of_another_keeps_all_results(small, started, tmp_path, monkeypatch):
    import contestants
    import plans

    assert _main(tmp_path, "run", "--problems", "narrow") == 0
    before = (tmp_path / "runs.jsonl").read_text()
    sgd = contestants.Contestant("sgd", "sgd", ({"learning_rate": 0.1},))
    monkeypatch.setattr(plans, "CONTESTANTS", plans.CONTESTANTS | {"sgd": sgd})
    assert _main(tmp_path, "run", "--problems", "narrow") == 2
    number = len(started.runs)
    assert _main(tmp_path, "run", "--problems", "narrow", "--replan") == 0
    assert [run.label for run in started.runs[number:]] == ["sgd"]
    assert (tmp_path / "runs.jsonl").read_text().startswith(before)


def test_failed_and_diverged_runs_are_rows_and_a_grid_without_any_other_is_left_out(small, started, tmp_path, capsys):
    from plans import make_plan
    from runs import Results

    results = Results(tmp_path / "runs.jsonl")
    for run in make_plan("quick"):
        if run.problem == "digits" and run.label == "adam" and run.options:
            results.append({**make_row([], status="failed"), **asdict(run), "reason": "no memory"})
    assert _main(tmp_path, "run", "--studies", "comparison", "--problems", "digits", "--optimizers", "adam") == 0
    assert started.runs == []
    assert _main(tmp_path, "status") == 0
    printed = capsys.readouterr().out
    assert printed.count("failed: comparison digits adam seed 0: no memory") == 2


def test_status_counts_what_is_through_running_and_left(small, started, tmp_path, capsys):
    assert _main(tmp_path, "status") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert _main(tmp_path, "run", "--problems", "digits", "--studies", "comparison") == 0
    running = {"process": os.getppid(), "at": 0, "runs": ["digits, batch 32"]}
    (tmp_path / "running.json").write_text(json.dumps(running))
    capsys.readouterr()
    assert _main(tmp_path, "status") == 0
    printed = capsys.readouterr().out.splitlines()
    assert "comparison   digits      6 of 6 through" in printed
    assert "comparison   narrow      0 of 4 through" in printed
    assert "ablation     digits      0 of 16 through" in printed and "running: digits, batch 32" in printed
    # Stand-ins take 2 s an epoch: 4 runs of 1 epoch, 15 and 1 of 2.
    assert printed[-1] == "21 runs left, about 76 s"
    assert _main(tmp_path, "run") == 2 and "already" in capsys.readouterr().err
    running["process"] = 2**22 + 1  # beyond Linux's largest: a process that is gone
    (tmp_path / "running.json").write_text(json.dumps(running))
    assert _main(tmp_path, "run", "--problems", "narrow") == 0


def test_a_damaged_result_is_one_line_of_warning_and_the_others_are_kept(small, started, tmp_path, capsys):
    assert _main(tmp_path, "run", "--problems", "narrow") == 0
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0][:50] + "\n", *lines[1:]]))
    capsys.readouterr()
    number = len(started.runs)
    assert _main(tmp_path, "run", "--problems", "narrow") == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "damaged" in errors[0] and "line 1" in errors[0]
    assert len(started.runs) == number + 1 and path.read_text().startswith(lines[0][:50] + "\n" + lines[1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--problems", "nonesuch"],
        ["run", "--optimizers", "lion"],
        ["run", "--studies", "all"],
        ["run", "--jobs", "0"],
        ["run", "--quick", "--paper"],
        ["draw"],
        [],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_status_2(arguments, capsys):
    from reproduce import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    errors = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and "error" in errors[0]


def test_what_waits_for_settings_that_nobody_tries_ends_the_command(started, tmp_path):
    from execution import execute
    from plans import make_plan
    from runs import Results

    waiting = [run for run in make_plan("standard") if run.options is None][:2]
    assert execute(waiting, Results(tmp_path / "runs.jsonl"), 1, 1) == []


def test_report_of_no_result_says_so(small, started, tmp_path, capsys):
    assert _main(tmp_path, "run", "--problems", "narrow", "--optimizers", "adam") == 0
    (tmp_path / "runs.jsonl").unlink()
    assert _main(tmp_path, "report") == 1 and "no results" in capsys.readouterr().err


@pytest.mark.slow
def test_from_plan_to_report_with_real_runs(small, tmp_path, capsys, monkeypatch):
    """The errors between epochs cost no time on the clock, and leave the training as it is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    assert _main(tmp_path, "run", "--problems", "digits", "--studies", "comparison", "errors") == 0
    from runs import Results

    rows = Results(tmp_path / "runs.jsonl").rows.values()
    (studied,) = (row for row in rows if row["study"] == "errors")
    assert {result["epoch"] for result in studied["fisher"]} == {0, 1, 2}
    (same,) = (row for row in rows if row["options"] == {"method": "kfac"} and row["seed"] == 0 and row is not studied)
    assert studied["losses"] == same["losses"] and studied["held_out_losses"] == same["held_out_losses"]
    assert _main(tmp_path, "report") == 0
    assert "adam" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    figures = {line.split("](")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")}
    assert {"errors.png", "singular_values.png", "losses_digits.png"} <= figures
    assert all((tmp_path / name).stat().st_size > 5_000 for name in figures)


@pytest.mark.slow
def test_a_killed_command_leaves_whole_results_and_goes_on(tmp_path):
    """SIGKILL in the middle of a run, through the real command line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "benchmarks" / "reproduce.py"), "run", "--quick", "--results", str(tmp_path)]
    command += ["--problems", "conv", "--optimizers", "sgd", "adam"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while "[1/" not in process.stdout.readline():
            assert process.poll() is None
        process.kill()
    before = (tmp_path / "runs.jsonl").read_text()
    assert len(before.splitlines()) == 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of them found" in done.stdout
    after = (tmp_path / "runs.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 2
    assert [json.loads(line)["label"] for line in after.splitlines()] == ["sgd", "adam"]
