"""Every table and figure of the paper as this project finds them, beside the paper's numbers, and what it leaves out.

    python benchmarks/reproduce.py run        # about two hours on two cores; --quick: under ten minutes
    python benchmarks/reproduce.py status     # what is through, what runs, what is left; from another terminal
    python benchmarks/reproduce.py report     # tables, figures and CSV of the results so far

`run` first writes a plan, one row for each run, then makes the runs that have no result yet, each in a process of its
own. A result is kept as soon as its run ends; a killed command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from command_line import INTERRUPTED, NOT_INSTALLED, OneLineParser, count, fail, package_is_missing
from contestants import CONTESTANTS
from execution import duration, execute, expected_seconds, missing
from plans import SCALES, STUDIES, PlanError, make_plan, read_plan, same, write_plan
from runs import Results, Row, Run, cores

RESULTS = Path(__file__).parent / "results"
PROGRAM = "reproduce.py"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a wrong argument ends the program with one line that says what was wrong."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that have no result yet")
    status = commands.add_parser("status", help="say what is through, what runs and what is left")
    report = commands.add_parser("report", help="write tables, figures and CSV of the results so far")
    for command in (run, status, report):
        scale = command.add_mutually_exclusive_group()
        scale.add_argument("--quick", dest="scale", action="store_const", const="quick", help="under ten minutes' work")
        scale.add_argument("--paper", dest="scale", action="store_const", const="paper", help="the paper's sizes")
        command.set_defaults(scale="standard")
        command.add_argument(
            "--results", type=Path, help="folder (default: benchmarks/results/reproduce, quick, paper)"
        )
    problems = sorted({name for scale in SCALES.values() for name in (*scale.comparison, *scale.ablation)})
    run.add_argument("--problems", nargs="+", choices=problems, help="only these")
    run.add_argument("--optimizers", nargs="+", choices=list(CONTESTANTS), help="of the comparison only these")
    run.add_argument("--studies", nargs="+", choices=STUDIES, help="only these")
    run.add_argument("--jobs", type=count, default=1, help="runs at a time; more than 1 spoils the seconds")
    run.add_argument("--threads", type=count, help="of each run (default: the cores, divided by --jobs)")
    run.add_argument("--again", action="store_true", help="make the runs that failed, too, once more")
    run.add_argument("--replan", action="store_true", help="put this version's plan in the place of the one found")
    options = parser.parse_args(arguments)
    if options.results is None:
        options.results = RESULTS / {"standard": "reproduce"}.get(options.scale, options.scale)
    if options.command == "run":
        options.threads = options.threads or max(1, cores() // options.jobs)
    return options


def run_command(options: argparse.Namespace) -> int:
    """Makes the runs that are missing; returns 1 if one of them failed, 2 if none can be made."""
    if package_is_missing():
        return fail(PROGRAM, NOT_INSTALLED)
    # All that can be wrong is found before anything is written.
    _check_alone(options.results)
    plan, found = _plan_to_run(options)
    chosen = [run for run in plan if _wanted(run, options)]
    if not chosen:
        raise PlanError(f"none of the {len(plan)} runs of the plan is of these problems, optimizers and studies")
    results = _open(options.results)
    if not found:
        write_plan(options.results / "plan.json", options.scale, plan)
    if options.again:
        results.rows = {key: row for key, row in results.rows.items() if row["status"] != "failed"}
    left = missing(chosen, results)
    print(f"{len(plan)} runs planned, {len(chosen)} asked for, {len(chosen) - len(left)} of them found", flush=True)

    def tell(running: list[Run]) -> None:
        _write_running(options.results, running)

    made = execute(left, results, options.jobs, options.threads, share=True, tell=tell)
    return int(any(row["status"] == "failed" for row in made))


def _plan_to_run(options: argparse.Namespace) -> tuple[list[Run], bool]:
    """The plan, and whether its file is there and is to stay."""
    path, plan = options.results / "plan.json", make_plan(options.scale)
    if path.exists() and not options.replan:
        scale, found = read_plan(path)
        if scale != options.scale:
            raise PlanError(f"{path} is the plan of the scale {scale!r}; give another --results")
        if not same(found, plan):
            raise PlanError(f"{path} is a plan of another version; --replan replaces it and keeps all results")
        return found, True
    return plan, False


def _wanted(run: Run, options: argparse.Namespace) -> bool:
    if options.problems and run.problem not in options.problems:
        return False
    if options.studies and run.study not in options.studies:
        return False
    return not options.optimizers or (run.study == "comparison" and run.label in options.optimizers)


def _check_alone(directory: Path) -> None:
    running = _read_running(directory)
    if running is not None:
        raise PlanError(f"process {running['process']} is making runs in {directory} already")


def _write_running(directory: Path, running: list[Run]) -> None:
    path = directory / "running.json"
    if not running:
        path.unlink(missing_ok=True)
        return
    content = {"process": os.getpid(), "at": time.time(), "runs": [str(run) for run in running]}
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content), encoding="utf-8")
    os.replace(draft, path)


def _read_running(directory: Path) -> dict | None:
    """What another process says it is doing; None where none does, or it is gone."""
    try:
        content = json.loads((directory / "running.json").read_text(encoding="utf-8"))
        os.kill(int(content["process"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if content["process"] == os.getpid() else content


def status_command(options: argparse.Namespace) -> int:
    """Prints, for each study and problem, how many runs are through; what runs; what is left."""
    _, plan = read_plan(options.results / "plan.json")
    results = _open(options.results)
    left = missing(plan, results)
    planned, waiting = (Counter((run.study, run.problem) for run in runs) for runs in (plan, left))
    for group, number in planned.items():
        print(f"{group[0]:12} {group[1]:8} {number - waiting[group]:4} of {number} through")
    for row in results.rows.values():
        if row["status"] != "finished":
            print(
                f"{row['status']}: {row.get('study')} {row['problem']} {row['label']} seed {row['seed']}: "
                f"{row.get('reason')}"
            )
    running = _read_running(options.results)
    for run in running["runs"] if running else []:
        print(f"running: {run}")
    seconds = sum(expected_seconds(run, results.rows.values()) for run in left)
    jobs = len(running["runs"]) if running else 1
    print(f"{len(left)} runs left" + (f", about {duration(seconds / jobs)}" if seconds else ""))
    return 0


def report_command(options: argparse.Namespace) -> int:
    """Writes tables and figures; returns 1 if there is no result."""
    import fisher_study
    import fisher_tables
    from report import make_report

    _, plan = read_plan(options.results / "plan.json")
    results = _open(options.results)
    rows = _planned_rows(plan, results)
    if not rows:
        print(f"{options.results} holds no results of its plan", file=sys.stderr)
        return 1
    studied = {row["problem"]: row["fisher"] for row in rows if row.get("fisher") is not None}
    extra = ""
    if studied:
        fisher_study.write_csv(studied, options.results / "errors.csv")
        fisher_study.write_singular_values(studied, options.results / "singular_values.csv")
        fisher_study.plot(studied, options.results)
        extra = fisher_tables.section(studied)
    print(make_report(rows, options.results, planned=[asdict(run) for run in plan], extra=extra))
    print(f"written to {options.results}")
    return 0


def _planned_rows(plan: list[Run], results: Results) -> list[Row]:
    """The results that belong to the plan: other versions' rows may stand in the same file."""
    keys = {run.key for run in plan if run.options is not None}
    # The best of a grid on other seeds: any of its settings will do, the report picks the best.
    for run in plan:
        if run.options is None:
            keys |= {Run(**{**asdict(run), "options": options}).key for options in run.grid}
    return [row for key, row in results.rows.items() if key in keys]


def _open(directory: Path) -> Results:
    results = Results(directory / "runs.jsonl")
    if warning := results.warning():
        print(warning, file=sys.stderr, flush=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = parse_arguments(arguments)
    command = {"run": run_command, "status": status_command, "report": report_command}[options.command]
    try:
        return command(options)
    except PlanError as error:
        return fail(PROGRAM, str(error))
    except OSError as error:  # a folder that is a file, or that nobody may write to
        return fail(PROGRAM, f"{error.filename2 or error.filename or options.results}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\nInterrupted; finished runs are kept.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
