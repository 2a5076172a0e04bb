"""What an epoch in the harness costs against an epoch of plain `fit`.

    python benchmarks/harness.py

The harness (`problems.Problem.train`, which `reproduce.py` and `defaults.py` use) hooks nothing to single batches and
evaluates between epochs, off the clock. Rounds on one model alternate between its epochs, timed by itself, and those of
a bare `model.fit` of the same batches without callbacks. Writes results/harness.csv.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from command_line import NOT_INSTALLED, OneLineParser, count, fail, package_is_missing

CASES = (("curves", 256, 4_000, "adam", {"learning_rate": 3e-3}), ("curves", 256, 4_000, "kpsvd", {"method": "kfac"}))
WARM_EPOCHS = 5
RESULTS = Path(__file__).parent / "results" / "harness.csv"


def ready(problem: str, batch: int, samples: int, optimizer: str, options: dict) -> tuple:
    """A compiled model that has traced all it needs, and past the steps that are dearer, with its data."""
    from contestants import make_optimizer
    from problems import PROBLEMS, Recorder, fit

    one = PROBLEMS[problem]
    data = one.load(0, samples)
    model = one.build(0)
    model.compile(optimizer=make_optimizer(optimizer, options), loss=one.loss, metrics=list(one.metrics))
    fit(model, data, batch, WARM_EPOCHS, Recorder())
    return model, data


def bare_seconds(model: Any, data: Any, batch: int, epochs: int) -> float:
    """Seconds of an epoch of plain `fit` on the same `problems.batches`."""
    from problems import batches

    training = batches(*data[:2], batch, shuffle=True)
    began = time.perf_counter()
    model.fit(training, epochs=epochs, shuffle=False, verbose=0)
    return (time.perf_counter() - began) / epochs


def harness_seconds(model: Any, data: Any, batch: int, epochs: int) -> float:
    """Seconds of an epoch in the harness, as its rows have them: what comes before the first is spread over all."""
    from problems import Recorder, fit

    recorder = Recorder()
    fit(model, data, batch, epochs, recorder)
    return (recorder.setup_seconds + sum(recorder.seconds)) / epochs


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table and writes it."""
    parser = OneLineParser(prog="harness.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=5, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=count, default=10, help="of each round (default: %(default)s)")
    options = parser.parse_args(arguments)
    if package_is_missing():
        return fail("harness.py", NOT_INSTALLED)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import tensorflow as tf

    versions = f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}"
    lines = []
    for case in CASES:
        pairs = []
        model, data = ready(*case)
        for number in range(options.rounds):
            both = [bare_seconds, harness_seconds][:: 1 if number % 2 else -1]
            seconds = {function: function(model, data, case[1], options.epochs) for function in both}
            pairs.append((seconds[harness_seconds], seconds[bare_seconds]))
            print(f"{case[0]}, {case[3]}, round {number + 1}: {pairs[-1][0] / pairs[-1][1]:.3f}", flush=True)
        ratios = [harness / bare for harness, bare in pairs]
        lines.append(
            {
                "problem": case[0],
                "batch": case[1],
                "optimizer": case[3],
                "bare_epoch_seconds": median(bare for _, bare in pairs),
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "rounds": options.rounds,
                "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
                "versions": versions,
            }
        )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print("{problem}, batch {batch}, {optimizer}: {ratio:.3f} ({lowest:.3f} to {highest:.3f})".format(**line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
