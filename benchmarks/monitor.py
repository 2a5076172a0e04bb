"""What `CurvatureMonitor` costs: `fit` with it against the same `fit` without it.

    python benchmarks/monitor.py [--rounds 7] [--epochs 10] [--quick] [--only conv] [--out FILE]

Three models of one network, with the same weights, data and seed, are trained side by side by stock `fit`: without a
monitor, with one at its default budget, and with one that observes every refresh, both writing CSV and TensorBoard
files; `problems.batches` says why not from arrays. A round is one `fit` of each, of so many epochs, so that the monitor
begins its budget anew in each; who comes first alternates. One epoch before the rounds traces all, and is in the table
by itself. That the weights agree to the last bit is checked.

Two per cent is less than rounds of the same thing differ by. What the monitor spends by its own account is known
exactly, and whether that account is right shows where every refresh is observed: there it is a larger part of the time.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from command_line import count
from measurements import write
from plans import refreshes_within
from problems import PROBLEMS, batches
from runs import cores

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import CurvatureMonitor

RESULTS = Path(__file__).parent / "results" / "monitor.csv"
PLAIN, WATCHED, ALWAYS = "without", "with", "always"
CASES = (("mnist", 512, "kfac"), ("curves", 256, "kfac"), ("curves", 256, "kfac_corrected"), ("conv", 64, "kfac"))
QUICK = CASES[:2]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        epoch_ms: of a `fit` with the monitor divided by its epochs, the median over rounds.
        ratio: of these to those without, of the same round, the median over rounds; above 1 the monitor costs time.
        ratio_low, ratio_high: the least and the largest of the rounds.
        observed: refreshes observed in one `fit`, median; and how many there were.
        own_share: the monitor's own account of the time it spent, as a part of the time of its `fit`; the largest.
        always_ratio: as `ratio`, of the monitor that observes every refresh.
        true_over_own: what that one took longer than no monitor, over its own account of it; the median over rounds.
        true_low, true_high: the least and the largest of the rounds.
        share: what the monitor at its default budget costs if its account is as wrong, be it by that factor, or by
            the same seconds however little is observed, whichever is more; as a part of its `fit`, the median.
        first_epoch_seconds: of the epoch before the rounds with the monitor and without it, tracing included.
    """

    network: str
    method: str
    batch: int
    epoch_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    observed: float
    refreshes: int
    own_share: float
    always_ratio: float
    true_over_own: float
    true_low: float
    true_high: float
    share: float
    first_epoch_seconds: float
    first_epoch_seconds_without: float
    rounds: int
    epochs: int
    device: str
    versions: str


class Contestant:
    """A model that is trained on, with or without a monitor."""

    def __init__(self, problem: str, method: str, monitor: CurvatureMonitor | None):
        of = PROBLEMS[problem]
        self.model = of.build(0)
        self.model.compile(KPSVD(method=method, seed=0), of.loss)
        self.monitor = monitor

    def fit(self, x: np.ndarray, y: np.ndarray, batch: int, epochs: int) -> float:
        """The seconds of all of it."""
        callbacks = [] if self.monitor is None else [self.monitor]
        began = time.perf_counter()
        self.model.fit(batches(x, y, batch), epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
        return time.perf_counter() - began


def compare(problem: str, batch: int, method: str, rounds: int, epochs: int, folder: Path) -> Row:
    """Times one network.

    Raises:
        RuntimeError: the monitor changed the training.
    """
    x, y, *_ = PROBLEMS[problem].load(0)
    whole = len(x) // batch * batch
    x, y = x[:whole], y[:whole]
    monitors = {
        name: CurvatureMonitor(csv=folder / f"{name}.csv", tensorboard=folder / name, budget=budget)
        for name, budget in ((WATCHED, 0.02), (ALWAYS, None))
    }
    contestants = {name: Contestant(problem, method, monitors.get(name)) for name in (PLAIN, WATCHED, ALWAYS)}
    first = {name: one.fit(x, y, batch, 1) for name, one in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    own: dict[str, list[float]] = {name: [] for name in monitors}
    observed = []
    for number in range(rounds):
        names = list(contestants)
        for name in names[number % 3 :] + names[: number % 3]:
            before = len(monitors[WATCHED].records)
            seconds[name].append(contestants[name].fit(x, y, batch, epochs))
            if name in monitors:
                own[name].append(monitors[name].budget.seconds)
            if name == WATCHED:
                layers = len({record["layer"] for record in monitors[name].records})
                observed.append((len(monitors[name].records) - before) / layers)
    for name in monitors:
        check_agreement(f"{problem}, {name}", contestants[PLAIN].model, contestants[name].model)
    ratios, always = (
        [one / other for one, other in zip(seconds[name], seconds[PLAIN], strict=True)] for name in (WATCHED, ALWAYS)
    )
    own_share = max(one / total for one, total in zip(own[WATCHED], seconds[WATCHED], strict=True))
    excess = [one - other for one, other in zip(seconds[ALWAYS], seconds[PLAIN], strict=True)]
    true_over_own = [one / account for one, account in zip(excess, own[ALWAYS], strict=True)]
    shares = [
        max(account * factor, account + more - always_account) / total
        for account, factor, more, always_account, total in zip(
            own[WATCHED], true_over_own, excess, own[ALWAYS], seconds[WATCHED], strict=True
        )
    ]
    return Row(
        problem,
        method,
        batch,
        1e3 * median(seconds[WATCHED]) / epochs,
        median(ratios),
        min(ratios),
        max(ratios),
        median(observed),
        refreshes_within(len(x) // batch * epochs, KPSVD().curvature_interval),
        own_share,
        median(always),
        median(true_over_own),
        min(true_over_own),
        max(true_over_own),
        median(shares),
        first[WATCHED],
        first[PLAIN],
        rounds,
        epochs,
        f"CPU, {cores()} cores, {platform.machine()}",
        f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}",
    )


def check_agreement(case: str, plain: keras.Model, watched: keras.Model) -> None:
    """Raises a RuntimeError where weights or optimizer states differ in any bit."""
    pairs = zip(
        [*plain.variables, *plain.optimizer.variables], [*watched.variables, *watched.optimizer.variables], strict=True
    )
    different = [one.path for one, other in pairs if not np.array_equal(one.numpy(), other.numpy(), equal_nan=True)]
    if different:
        raise RuntimeError(f"{case}: the monitor changed the training. Expected the same bits, but not in {different}.")


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"{row.network}, {row.method}, batch {row.batch}: {row.ratio:.3f} ({row.ratio_low:.3f} … {row.ratio_high:.3f}) "
        f"times the seconds of an epoch, {row.epoch_ms:.0f} ms; {row.observed:g} of {row.refreshes} refreshes "
        f"observed, {100 * row.own_share:.2f} % by its own account; observing all takes {row.always_ratio:.3f} times "
        f"the seconds, {row.true_over_own:.2f} ({row.true_low:.2f} … {row.true_high:.2f}) of its account, which would "
        f"make it {100 * row.share:.2f} %; "
        f"first epoch {row.first_epoch_seconds:.1f} s, without {row.first_epoch_seconds_without:.1f} s"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=count, help="fits of each (default: 7, quick 3)")
    parser.add_argument("--epochs", type=count, help="of a fit (default: 10, quick 5)")
    parser.add_argument("--quick", action="store_true", help="the two auto-encoders by kfac only")
    names = list(dict.fromkeys(name for name, *_ in CASES))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="networks (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rounds, epochs = options.rounds or (3 if options.quick else 7), options.epochs or (5 if options.quick else 10)
    cases = [case for case in (QUICK if options.quick else CASES) if case[0] in options.only]
    if not cases:
        parser.error(f"--quick has none of {', '.join(options.only)}")
    rows: list[Row] = []
    for case in cases:
        keras.backend.clear_session()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(*case, rounds, epochs, Path(folder)))
        print(line(rows[-1]), flush=True)
        write(rows, options.out)
    print(f"{rows[0].device}; {rows[0].versions}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
