"""Does `KPSVD()` with its defaults beat Adam at the best of five rates, on problems that nobody tuned it for?

    python benchmarks/defaults.py run --only curves digits --seeds 0 1 2
    python benchmarks/defaults.py run --optimizers kpsvd --options '{"method": "kfac"}'
    python benchmarks/defaults.py run --only curves --epochs 200 --kpsvd-epochs 40
    python benchmarks/defaults.py table --losses losses.csv --figure race.png

`run` appends each finished run to a file of results (by default benchmarks/results/defaults.jsonl) and makes only those
that the file does not have yet, each in a process of its own. `table` compares them, and writes a CSV beside the file.

Adam trains at 3e-4, 1e-3, 3e-3, 1e-2 and 3e-2 on seed 0, and at the rate with the lowest training loss on the other
seeds. A training loss is the mean that `fit` reports for an epoch; seconds are of training alone, tracing included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from command_line import INTERRUPTED, NOT_INSTALLED, OneLineParser, count, fail, package_is_missing
from execution import execute, missing
from problems import PROBLEMS
from race_table import format_table, write_losses
from races import RATES, races, summarise
from runs import SEARCH_SEED, Results, Run, cores
from tables import write_csv

OPTIMIZERS = ("adam", "kpsvd")
RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"


def make_plan(
    problems: Iterable[str],
    batch_sizes: Iterable[int] | None,
    seeds: Iterable[int],
    optimizers: Iterable[str] = OPTIMIZERS,
    options: dict[str, Any] | None = None,
    label: str = "kpsvd",
    epochs: int | None = None,
    kpsvd_epochs: int | None = None,
) -> list[Run]:
    """Every run of a comparison, in order: of each problem and batch size Adam's rates first, then seed by seed.

    Args:
        problems: names.
        batch_sizes: for all of them. None: each problem's own.
        seeds: of data, weights and batches. Adam's rates run on `SEARCH_SEED` whether it is among them or not.
        optimizers: "adam", "kpsvd" or both.
        options: KPSVD's arguments.
        label: KPSVD's name in the table.
        epochs: of every run. None: each problem's own.
        kpsvd_epochs: of KPSVD's. None: as many as Adam's.
    """
    plan = []
    seeds, optimizers = list(dict.fromkeys(seeds)), set(optimizers)
    for name in dict.fromkeys(problems):
        problem = PROBLEMS[name]
        for batch in dict.fromkeys(batch_sizes or problem.batch_sizes):

            def add(seed: int, optimizer: str, label: str, options: dict | None, name=name, batch=batch) -> None:
                grid = [{"learning_rate": rate} for rate in RATES] if options is None else None
                length = (kpsvd_epochs if optimizer == "kpsvd" else None) or epochs or PROBLEMS[name].epochs
                plan.append(Run(name, batch, seed, optimizer, label, options, length, grid))

            if "adam" in optimizers:
                for rate in RATES:
                    add(SEARCH_SEED, "adam", "adam", {"learning_rate": rate})
            for seed in seeds:
                if "adam" in optimizers and seed != SEARCH_SEED:
                    add(seed, "adam", "adam", None)
                if "kpsvd" in optimizers:
                    add(seed, "kpsvd", label, options or {})
    return plan


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected an object in JSON, got {text!r}")
    return options


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2147483647, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a wrong argument ends the program with one line that says what was wrong."""
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that the results lack")
    table = commands.add_parser("table", help="print what the results say, and write it as CSV beside them")
    for command in (run, table):
        command.add_argument("--results", type=Path, default=RESULTS, help="file of results (default: %(default)s)")
    table.add_argument("--losses", type=Path, help="a CSV for every epoch of every run (default: none)")
    table.add_argument(
        "--figure", type=Path, help="a picture of the runs labelled 'kpsvd' against Adam's (default: none)"
    )
    run.add_argument(
        "--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="problems (default: all)"
    )
    run.add_argument("--batch-sizes", nargs="+", type=count, help="default: each problem's own")
    run.add_argument("--seeds", nargs="+", type=_seed, default=[0, 1, 2], help="default: 0 1 2")
    run.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="default: both")
    run.add_argument("--options", type=_options, default={}, help="arguments of KPSVD, as JSON (default: none)")
    run.add_argument("--label", help="KPSVD's name in the table (default: made of the options)")
    run.add_argument("--epochs", type=count, help="default: each problem's own")
    run.add_argument("--kpsvd-epochs", type=count, help="of KPSVD's runs (default: as many as Adam's)")
    run.add_argument("--jobs", type=count, default=1, help="runs at a time; more than 1 spoils the seconds")
    run.add_argument("--threads", type=count, help="of each run (default: the cores, divided by --jobs)")
    run.add_argument("--again", action="store_true", help="make the runs that failed, too, once more")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if options.label == "adam":
            run.error("argument --label: 'adam' is Adam's own")
        options.label = options.label or " ".join(["kpsvd", *(f"{k}={v}" for k, v in options.options.items())])
        options.threads = options.threads or max(1, cores() // options.jobs)
    return options


def run_command(options: argparse.Namespace) -> int:
    """Makes the runs that are missing; returns 1 if one of them failed, 2 if none can be made."""
    if package_is_missing():
        return fail("defaults.py", NOT_INSTALLED)
    results = _open(options.results)
    if options.again:
        results.rows = {key: row for key, row in results.rows.items() if row["status"] != "failed"}
    plan = make_plan(
        options.only,
        options.batch_sizes,
        options.seeds,
        options.optimizers,
        options.options,
        options.label,
        options.epochs,
        options.kpsvd_epochs,
    )
    left = missing(plan, results)
    print(f"{len(plan)} runs planned, {len(plan) - len(left)} of them found in {options.results}", flush=True)
    made = execute(left, results, options.jobs, options.threads)
    return int(any(row["status"] == "failed" for row in made))


def table_command(options: argparse.Namespace) -> int:
    """Prints the table and writes the CSV; returns 1 if there is no result."""
    rows = _open(options.results).rows
    lines = summarise(rows)
    if not lines:
        print(f"{options.results} holds no results", file=sys.stderr)
        return 1
    path = options.results.with_suffix(".csv")
    write_csv(lines, path)
    print(f"{format_table(lines)}\nwritten to {path}")
    if options.losses is not None:
        write_losses(rows.values(), options.losses)
        print(f"every epoch: {options.losses}")
    if options.figure is not None and (found := races(rows.values())):
        from figures import draw_race, save  # Matplotlib is wanted here only.

        save(draw_race(found, "KPSVD() against Adam at the best of five rates, a line for each seed"), options.figure)
        print(f"drawn: {options.figure}")
    return 0


def _open(path: Path) -> Results:
    results = Results(path)
    if warning := results.warning():
        print(warning, file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    try:
        arguments = parse_arguments()
        sys.exit((run_command if arguments.command == "run" else table_command)(arguments))
    except KeyboardInterrupt:
        print("\nInterrupted; finished runs are kept.", file=sys.stderr)
        sys.exit(INTERRUPTED)
