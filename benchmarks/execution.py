"""Runs made one after another or several at a time, each in a process of its own, with a line of progress for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO

from runs import Results, Row, Run, best_loss, check_row, empty_row, ready, training_of

_POLL_SECONDS = 0.2


def expected_seconds(run: Run, rows: Iterable[Row]) -> float:
    """What `run` will take, from the median of the runs most like it: same problem, batch size, optimizer; 0 if none.

    A run like it is one of the same optimizer, problem and batch size; else of the same optimizer and problem; else of
    the same optimizer; else any. Time is taken to grow with the number of epochs.
    """
    rows = [row for row in rows if row["losses"] and row.get("wall_seconds")]
    for names in (("optimizer", "problem", "batch"), ("optimizer", "problem"), ("optimizer",), ()):
        alike = [row for row in rows if all(row[name] == getattr(run, name) for name in names)]
        if alike:
            return run.epochs * median(row["wall_seconds"] / len(row["losses"]) for row in alike)
    return 0.0


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen
    output: IO[str]
    errors: IO[str]
    began: float

    def row(self) -> Row:
        """The finished child's row; one that says why if it left none."""
        self.output.seek(0)
        self.errors.seek(0)
        lines, errors = self.output.read().splitlines(), self.errors.read().split("\n")
        try:
            row = json.loads(lines[-1])
            check_row(row)
        except (IndexError, ValueError, KeyError, TypeError):
            last = next((line for line in reversed(errors) if line.strip()), "no message")
            row = empty_row(self.run, "failed", f"exit status {self.process.returncode}: {last}")
        return row | {"wall_seconds": time.perf_counter() - self.began}


def missing(plan: Iterable[Run], results: Results) -> list[Run]:
    """The runs of `plan` that `results` has no row of; also those whose options are open until others are through."""
    left = []
    for run in plan:
        try:
            chosen = ready(run, results.rows)
        except LookupError:
            continue
        if chosen is None or chosen.key not in results.rows:
            left.append(run)
    return left


def execute(
    plan: list[Run],
    results: Results,
    jobs: int,
    threads: int,
    *,
    share: bool = False,
    tell: Callable[[list[Run]], None] = lambda running: None,
) -> list[Row]:
    """Makes the runs of `plan`, `jobs` at a time, and appends each one's row to `results`; returns the rows made.

    Args:
        plan: with the grids of the runs whose options are open.
        results: rows that are there are not made again.
        jobs: at a time.
        threads: of each.
        share: whether a run that differs in name only from one that is through takes over its row.
        tell: is given what is running whenever that changes.
    """
    pending, children, made = list(plan), [], []

    def ended(run: Run, row: Row) -> None:
        results.append(row)
        made.append(row)
        left = [child.run for child in children] + pending
        print(f"[{len(made)}/{len(made) + len(left)}] {_progress(run, row, left, results, jobs)}", flush=True)

    try:
        while pending or children:
            before = len(pending)
            for run in list(pending):
                if len(children) == jobs:
                    break
                try:
                    chosen = ready(run, results.rows)
                except LookupError as error:
                    print(f"{run}: left out, {error}", flush=True)
                    pending.remove(run)
                    continue
                if chosen is None:
                    continue
                pending.remove(run)
                if chosen.key in results.rows:
                    continue
                twin = _twin(chosen, results.rows.values(), jobs, threads) if share else None
                if twin is not None:
                    ended(chosen, {**twin, "study": chosen.study, "label": chosen.label, "shared": True})
                    continue
                children.append(_start(chosen, threads))
                print(f"running: {chosen}", flush=True)
                tell([child.run for child in children])
            if not children and len(pending) == before:
                break  # What is left waits for settings that nobody tries.
            done = [child for child in children if child.process.poll() is not None]
            for child in done:
                children.remove(child)
                ended(child.run, child.row() | {"jobs": jobs, "threads": threads})
            if not done and children:
                time.sleep(_POLL_SECONDS)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
        tell([])
    return made


def _twin(run: Run, rows: Iterable[Row], jobs: int, threads: int) -> Row | None:
    """The row of a run that trained the same under the same conditions, or None. One that failed is no twin."""
    if run.study == "errors":
        return None
    training, conditions = training_of(asdict(run)), (jobs, threads)
    for row in rows:
        same = training_of(row) == training and (row.get("jobs"), row.get("threads")) == conditions
        if same and row["status"] != "failed" and row.get("study") != "errors":
            return row
    return None


def _start(run: Run, threads: int) -> _Child:
    command = [sys.executable, str(Path(__file__).with_name("runs.py").resolve()), json.dumps(asdict(run))]
    command += ["--threads", str(threads), "--parent", str(os.getpid())]
    output, errors = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115 -- outlives this call
    environment = {"OPENBLAS_NUM_THREADS": str(threads), **os.environ}  # NumPy's, which reads it when it is imported
    process = subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, env=environment)
    return _Child(run, process, output, errors, time.perf_counter())


def _progress(run: Run, row: Row, left: list[Run], results: Results, jobs: int) -> str:
    loss = best_loss(row["losses"])
    outcome = f"loss {loss:.5g}" if loss is not None else "no loss"
    outcome += f" in {sum(row['seconds']):.1f} s of training"
    if row["status"] != "finished":
        outcome += f", {row['status']}: {row['reason']}"
    seconds = sum(expected_seconds(run, results.rows.values()) for run in left) / jobs
    return f"{run}: {outcome}; " + (f"about {duration(seconds)} left" if left else "all done")


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
