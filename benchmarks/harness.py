"""What an epoch in the harness costs against an epoch of plain `fit`.

    python benchmarks/harness.py

The harness (`problems.Problem.train`, which `reproduce.py` and `defaults.py` use) hooks nothing to single batches and
evaluates between epochs, off the clock. Rounds alternate between its epochs, timed by itself, and those of a bare
`model.fit` without callbacks; the first epoch of each is left out. Writes results/harness.csv.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

from command_line import NOT_INSTALLED, OneLineParser, count, fail, package_is_missing

CASES = (("curves", 256, 4_000, "adam", {"learning_rate": 3e-3}), ("curves", 256, 4_000, "kpsvd", {"method": "kfac"}))
RESULTS = Path(__file__).parent / "results" / "harness.csv"


def bare_seconds(problem: str, batch: int, samples: int, optimizer: str, options: dict, epochs: int) -> float:
    """Seconds of an epoch of plain `fit`: of a second call, so that nothing is traced in it."""
    import keras
    from contestants import make_optimizer
    from problems import PROBLEMS

    one = PROBLEMS[problem]
    x, y, *_ = one.load(0, samples)
    keras.backend.clear_session()
    model = one.build(0)
    model.compile(optimizer=make_optimizer(optimizer, options), loss=one.loss, metrics=list(one.metrics))
    model.fit(x, y, batch_size=batch, epochs=1, verbose=0)
    began = time.perf_counter()
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return (time.perf_counter() - began) / epochs


def harness_seconds(problem: str, batch: int, samples: int, optimizer: str, options: dict, epochs: int) -> float:
    """Seconds of an epoch in the harness, as its rows have them."""
    from contestants import make_optimizer
    from problems import PROBLEMS, Recorder

    recorder = Recorder()
    PROBLEMS[problem].train(lambda: make_optimizer(optimizer, options), batch, 0, epochs + 1, recorder, samples)
    return sum(recorder.seconds[1:]) / epochs


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
        for number in range(options.rounds):
            both = [bare_seconds, harness_seconds][:: 1 if number % 2 else -1]
            seconds = {function: function(*case, options.epochs) for function in both}
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
