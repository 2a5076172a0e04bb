"""Training runs of `defaults.py`: what a run is, which runs a comparison needs, one of them made, results kept.

    python benchmarks/runs.py '{"problem": "digits", "batch": 64, "seed": 0, "optimizer": "kpsvd", "label": "kpsvd",
                                "options": {"method": "kfac"}, "epochs": 3}'

makes that run in this process and prints its row, as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any

from problems import PROBLEMS, Recorder

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEARCH_SEED = 0  # Adam's rates are compared on this seed
OPTIMIZERS = ("adam", "kpsvd")
_POLL_SECONDS = 0.2

Key = tuple[str, int, int, str, str, int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        problem, batch, seed, epochs: what is trained, in batches of which size, with which seed, how long.
        optimizer: "adam" or "kpsvd".
        label: the optimizer's name in the table.
        options: its arguments. None is Adam at the best of `RATES`, which is known once they are all through.
    """

    problem: str
    batch: int
    seed: int
    optimizer: str
    label: str
    options: dict[str, Any] | None
    epochs: int

    @property
    def key(self) -> Key:
        """What tells this run from others; the key of its row."""
        return key_of(asdict(self))

    def __str__(self) -> str:
        """The run in words, for a line of progress."""
        rate = "" if self.optimizer != "adam" else f" {self.options['learning_rate']:g}" if self.options else " best"
        return f"{self.problem}, batch {self.batch}, seed {self.seed}, {self.label}{rate}"


def key_of(row: Row) -> Key:
    """The key of a row, or of a run as a dictionary. Raises KeyError or TypeError where that is no row."""
    options = json.dumps(row["options"], sort_keys=True)
    return row["problem"], int(row["batch"]), int(row["seed"]), row["label"], options, int(row["epochs"])


def make_plan(
    problems: Iterable[str],
    batch_sizes: Iterable[int] | None,
    seeds: Iterable[int],
    optimizers: Iterable[str] = OPTIMIZERS,
    options: dict[str, Any] | None = None,
    label: str = "kpsvd",
    epochs: int | None = None,
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
    """
    plan = []
    seeds, optimizers = list(dict.fromkeys(seeds)), set(optimizers)
    for name in dict.fromkeys(problems):
        problem = PROBLEMS[name]
        for batch in dict.fromkeys(batch_sizes or problem.batch_sizes):

            def add(seed: int, optimizer: str, label: str, options: dict | None, name=name, batch=batch) -> None:
                plan.append(Run(name, batch, seed, optimizer, label, options, epochs or PROBLEMS[name].epochs))

            if "adam" in optimizers:
                for rate in RATES:
                    add(SEARCH_SEED, "adam", "adam", {"learning_rate": rate})
            for seed in seeds:
                if "adam" in optimizers and seed != SEARCH_SEED:
                    add(seed, "adam", "adam", None)
                if "kpsvd" in optimizers:
                    add(seed, "kpsvd", label, options or {})
    return plan


def best_loss(losses: Iterable[float | None]) -> float | None:
    """The lowest finite loss, or None."""
    return min((loss for loss in losses if loss is not None and math.isfinite(loss)), default=None)


def best_rate(rows: Iterable[Row]) -> float | None:
    """Adam's rate with the lowest training loss of those on `SEARCH_SEED` that neither diverged nor failed, or None.

    Args:
        rows: of one problem, batch size and number of epochs.
    """
    candidates = [
        (best_loss(row["losses"]), row["options"]["learning_rate"])
        for row in rows
        if row["optimizer"] == "adam" and row["seed"] == SEARCH_SEED and row["status"] == "finished"
    ]
    return min(candidates)[1] if candidates else None


def ready(run: Run, rows: dict[Key, Row]) -> Run | None:
    """The run with its options filled in; None while some of Adam's rates are still to be tried.

    Raises:
        LookupError: every rate diverged or failed.
    """
    if run.options is not None:
        return run
    tried = [replace(run, seed=SEARCH_SEED, options={"learning_rate": rate}).key for rate in RATES]
    if not all(key in rows for key in tried):
        return None
    rate = best_rate(rows[key] for key in tried)
    if rate is None:
        raise LookupError("every rate of Adam diverged or failed")
    return replace(run, options={"learning_rate": rate})


class Results:
    """Rows in a file, one line of JSON each. The last row of a key counts; damaged lines stay where they are.

    Attributes:
        path: the file.
        rows: by key.
        damaged: numbers of the lines that hold no row, counted from 1.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, Row] = {}
        self.damaged: list[int] = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                _check(row)
                self.rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                self.damaged.append(number)

    def warning(self) -> str | None:
        """One line that says which lines were passed over, or None."""
        if not self.damaged:
            return None
        lines = ", ".join(map(str, self.damaged))
        return f"warning: {self.path}: damaged and passed over, left as it is: line {lines}"

    def append(self, row: Row) -> None:
        """Adds a row to the file, on a line of its own also where the last one was cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        self.rows[key_of(row)] = row


_SERIES = ("losses", "seconds", "held_out_losses", "held_out_accuracies")


def _check(row: Row) -> None:
    if row["status"] not in ("finished", "diverged", "failed") or row["optimizer"] not in OPTIMIZERS:
        raise ValueError("no row")
    lengths = {len(row[name]) for name in _SERIES}
    if len(lengths) > 1 or (row["status"] == "finished" and (lengths == {0} or best_loss(row["losses"]) is None)):
        raise ValueError("no row")


def empty_row(run: Run, status: str, reason: str | None = None) -> Row:
    """A row without epochs."""
    return {**asdict(run), "status": status, "reason": reason, **{name: [] for name in _SERIES}}


def train(run: Run, threads: int | None = None, samples: int | None = None) -> Row:
    """Makes a run in this process.

    Args:
        run: which.
        threads: of TensorFlow's pools, which must not have started yet. None leaves them alone.
        samples: training examples. None: the problem's own number.

    Returns:
        Its row: `run`, "status" ("finished", "diverged" or "failed"), "reason", what `Recorder` recorded, "config" of
        the optimizer, KPSVD's "warnings", and where it ran.
    """
    import keras
    import tensorflow as tf

    import keras_kpsvd

    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    optimizer = {"adam": keras.optimizers.Adam, "kpsvd": keras_kpsvd.KPSVD}[run.optimizer]
    row, recorder = empty_row(run, "failed"), Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PROBLEMS[run.problem].train(
                lambda: optimizer(**run.options), run.batch, run.seed, run.epochs, recorder, samples
            )
            row |= {"status": "diverged" if recorder.reason else "finished", "reason": recorder.reason}
            row["config"] = model.optimizer.get_config()
        except Exception as error:  # one run's failure must not cost the others their results
            row["reason"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    row |= {name: getattr(recorder, name) for name in (*_SERIES, "setup_seconds")}
    gpus = tf.config.list_physical_devices("GPU")
    gpu = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else None
    return row | {
        "warnings": list(dict.fromkeys(str(warning.message) for warning in caught if "KPSVD" in str(warning.message))),
        "device": gpu or f"CPU, {cores()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__},
        "revision": _revision(),
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _revision() -> str | None:
    """The commit of the working tree, with "-dirty" where it differs from it; None outside a repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
            _check(row)
        except (IndexError, ValueError, KeyError, TypeError):
            last = next((line for line in reversed(errors) if line.strip()), "no message")
            row = empty_row(self.run, "failed", f"exit status {self.process.returncode}: {last}")
        return row | {"wall_seconds": time.perf_counter() - self.began}


def execute(plan: list[Run], results: Results, jobs: int, threads: int) -> list[Row]:
    """Makes the runs of `plan`, `jobs` at a time, and appends each one's row to `results`; returns the rows made."""
    pending, children, made = list(plan), [], []
    try:
        while pending or children:
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
                if chosen.key not in results.rows:
                    children.append(_start(chosen, threads))
            done = [child for child in children if child.process.poll() is not None]
            for child in done:
                children.remove(child)
                row = child.row() | {"jobs": jobs, "threads": threads}
                results.append(row)
                made.append(row)
                left = [child.run for child in children] + pending
                print(
                    f"[{len(made)}/{len(made) + len(left)}] {_progress(child.run, row, left, results, jobs)}",
                    flush=True,
                )
            if not done and children:
                time.sleep(_POLL_SECONDS)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    return made


def _start(run: Run, threads: int) -> _Child:
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(run))]
    command += ["--threads", str(threads), "--parent", str(os.getpid())]
    output, errors = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115 -- outlives this call
    process = subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
    return _Child(run, process, output, errors, time.perf_counter())


def _progress(run: Run, row: Row, left: list[Run], results: Results, jobs: int) -> str:
    loss = best_loss(row["losses"])
    outcome = f"loss {loss:.5g}" if loss is not None else "no loss"
    outcome += f" in {sum(row['seconds']):.1f} s of training"
    if row["status"] != "finished":
        outcome += f", {row['status']}: {row['reason']}"
    seconds = sum(expected_seconds(run, results.rows.values()) for run in left) / jobs
    return f"{run}: {outcome}; " + (f"about {_duration(seconds)} left" if left else "all done")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main(arguments: list[str] | None = None) -> None:
    """Makes the run of the command line and prints its row as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="a Run as JSON")
    parser.add_argument("--threads", type=int, help="of TensorFlow (default: its own choice)")
    parser.add_argument("--parent", type=int, help="process that must live on for this one to")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    row = train(Run(**json.loads(options.run)), options.threads)
    print(json.dumps(row, default=str), flush=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
