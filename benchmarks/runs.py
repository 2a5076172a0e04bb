"""Training runs of `defaults.py` and `reproduce.py`: what a run is, one of them made, results kept.

    python benchmarks/runs.py '{"problem": "digits", "batch": 64, "seed": 0, "optimizer": "kpsvd", "label": "kpsvd",
                                "options": {"method": "kfac"}, "epochs": 3}'

makes that run in this process and prints its row, as one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from contestants import METHODS, OPTIMIZERS, make_optimizer
from problems import PROBLEMS, Recorder

SEARCH_SEED = 0  # the settings of a grid are compared on this seed
STUDY_IMAGES = 256  # training examples whose Fisher matrix the study "errors" approximates
STUDY_EPOCHS = (0, 1, 2, 5, 10, 20, 50, 100)  # after which it does, and after the last

Key = tuple
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        problem, batch, seed, epochs: what is trained, in batches of which size, with which seed, how long.
        optimizer: a name in `contestants.OPTIMIZERS`.
        label: the name in tables.
        options: the optimizer's arguments. None is the best of `grid`, which is known once all of it is through.
        grid: sets of arguments, compared on `SEARCH_SEED`.
        study: what the run is for.
        samples: training examples. None: the problem's own number.
    """

    problem: str
    batch: int
    seed: int
    optimizer: str
    label: str
    options: dict[str, Any] | None
    epochs: int
    grid: Sequence[dict[str, Any]] | None = None
    study: str = "defaults"
    samples: int | None = None

    @property
    def key(self) -> Key:
        """What tells this run from others; the key of its row."""
        return key_of(asdict(self))

    def __str__(self) -> str:
        """The run in words, for a line of progress."""
        if self.options is None:
            chosen = "best of its grid"
        else:
            chosen = " ".join(f"{name}={value}" for name, value in self.options.items())
        study = "" if self.study in ("defaults", "comparison") else f"{self.study}, "
        return f"{study}{self.problem}, batch {self.batch}, seed {self.seed}, {self.label} {chosen}".rstrip()


def key_of(row: Row) -> Key:
    """The key of a row, or of a run as a dictionary. Raises KeyError or TypeError where that is no row."""
    return row.get("study", "defaults"), row["label"], *training_of(row)


def training_of(row: Row) -> Key:
    """The part of the key that says what is trained: rows that share it differ in name only."""
    options = json.dumps(row["options"], sort_keys=True)
    samples = row.get("samples")
    sizes = int(row["batch"]), int(row["seed"]), int(row["epochs"]), None if samples is None else int(samples)
    return row["problem"], row["optimizer"], options, *sizes


def best_loss(losses: Iterable[float | None]) -> float | None:
    """The lowest finite loss, or None."""
    return min((loss for loss in losses if loss is not None and math.isfinite(loss)), default=None)


def best_options(rows: Iterable[Row]) -> dict[str, Any] | None:
    """The options with the lowest training loss on `SEARCH_SEED` of the rows that neither diverged nor failed, or None.

    Args:
        rows: of one problem, batch size, number of epochs and optimizer. Of equals the first wins.
    """
    candidates = [
        (best_loss(row["losses"]), row["options"])
        for row in rows
        if row["seed"] == SEARCH_SEED and row["status"] == "finished"
    ]
    return min(candidates, key=lambda pair: pair[0])[1] if candidates else None


def ready(run: Run, rows: dict[Key, Row]) -> Run | None:
    """The run with its options filled in; None while some of its grid is still to be tried.

    Raises:
        LookupError: every setting diverged or failed.
    """
    if run.options is not None:
        return run
    tried = [replace(run, seed=SEARCH_SEED, options=options).key for options in run.grid]
    if not all(key in rows for key in tried):
        return None
    options = best_options(rows[key] for key in tried)
    if options is None:
        raise LookupError("every setting of its grid diverged or failed")
    return replace(run, options=options)


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
                check_row(row)
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


def check_row(row: Row) -> None:
    """Raises ValueError, KeyError or TypeError where that is no row."""
    if row["status"] not in ("finished", "diverged", "failed") or row["optimizer"] not in OPTIMIZERS:
        raise ValueError("no row")
    if not isinstance(row["options"], dict):
        raise TypeError("no row")
    for name in _SERIES:
        kinds = (int, float) if name == "seconds" else (int, float, type(None))
        if not isinstance(row[name], list) or any(type(value) not in kinds for value in row[name]):
            raise TypeError("no row")
    lengths = {len(row[name]) for name in _SERIES}
    if len(lengths) > 1 or (row["status"] == "finished" and (lengths == {0} or best_loss(row["losses"]) is None)):
        raise ValueError("no row")
    for of_layer in row.get("fisher") or []:
        _check_study(of_layer)


def _check_study(row: Row) -> None:
    """`check_row` of a row of `fisher_study.measure`."""
    known = [row["share_of_two"], *(row["errors"][method][f"error_{kind}"] for method in METHODS for kind in (1, 2))]
    counts = [type(row[name]) is int for name in ("epoch", "d_in", "d_out")]
    numbers = [type(value) in (int, float) for value in row["singular_values"]]
    if not all([isinstance(row["layer"], str), *counts, *numbers]):
        raise TypeError("no row")
    if any(type(value) not in (int, float, type(None)) for value in known):
        raise TypeError("no row")


def empty_row(run: Run, status: str, reason: str | None = None) -> Row:
    """A row without epochs."""
    start = asdict(run)
    del start["grid"]
    return {**start, "status": status, "reason": reason, **{name: [] for name in _SERIES}}


def train(run: Run, threads: int | None = None) -> Row:
    """Makes a run in this process.

    Args:
        run: which.
        threads: of TensorFlow's pools, which must not have started yet. None leaves them alone.

    Returns:
        Its row: `run`, "status" ("finished", "diverged" or "failed"), "reason", what `Recorder` recorded, "config" of
        the optimizer, KPSVD's "warnings", and where it ran. Those of the study "errors" have "fisher", the results of
        `fisher_study.measure`, made between the epochs.
    """
    import keras
    import tensorflow as tf

    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    row, recorder, study = empty_row(run, "failed"), Recorder(), []
    watch = functools.partial(_study, study, run.epochs) if run.study == "errors" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PROBLEMS[run.problem].train(
                lambda: make_optimizer(run.optimizer, run.options),
                run.batch,
                run.seed,
                run.epochs,
                recorder,
                run.samples,
                watch,
            )
            row |= {"status": "diverged" if recorder.reason else "finished", "reason": recorder.reason}
            row["config"] = model.optimizer.get_config()
        except Exception as error:  # one run's failure must not cost the others their results
            row["reason"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    row |= {name: getattr(recorder, name) for name in (*_SERIES, "setup_seconds")}
    if watch is not None:
        row["fisher"] = study
    gpus = tf.config.list_physical_devices("GPU")
    gpu = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else None
    return row | {
        "warnings": list(dict.fromkeys(str(warning.message) for warning in caught if "KPSVD" in str(warning.message))),
        "device": gpu or f"CPU, {cores()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__},
        "revision": _revision(),
    }


def _study(results: list[dict], epochs: int, model: Any, x: Any, epoch: int) -> None:
    """Adds the errors of the approximations of `model` to `results`, where the epoch is one of those studied."""
    import fisher_study

    if epoch in STUDY_EPOCHS or epoch == epochs:
        results += fisher_study.measure(model, x[:STUDY_IMAGES], epoch)


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
