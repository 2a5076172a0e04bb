"""What the guards of a step cost: the step of `KPSVD` against the same step without them, as ratios within one run.

    python benchmarks/guards.py [--rounds 9] [--steps 20] [--quick] [--out benchmarks/results/guards.csv]

`unguarded.GUARDS` lists the guards, which are taken out while a step is traced. The arithmetic that is left is the
same, which is checked: the weights agree with the stock step's to rounding, and exact fits come in the same steps.

Two steps are looked at: one with three conjugate steps, and the default one as it is from the 190th update on, in which
guards weigh most. All steps of one network start every timed block from the same weights and the same state of the
optimizer, on one batch of random data, past the first updates in which every fit is exact. A block is a whole number of
periods of refresh and inversion. "stock again" is the stock step once more: what its ratio is off 1 by is the noise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measurements import write
from problems import PROBLEMS
from runs import cores
from traced_step import TracedStep
from unguarded import GUARDS, without

from keras_kpsvd import KPSVD
from keras_kpsvd.curvature.extrapolation import EXACT_UPDATES
from keras_kpsvd.curvature.intervals import LONGEST

RESULTS = Path(__file__).parent / "results" / "guards.csv"
STOCK, AGAIN, ALL = "stock", "stock again", "all"
PERIOD = LONGEST  # updates between refreshes, inversions and exact fits
# Arguments of `KPSVD`: one with conjugate gradients, and what a user gets later on, in which guards weigh most.
STEPS = {
    "conjugate": {"conjugate_steps": 3, "curvature_interval": 5, "inverse_interval": 5},
    "default": {
        "conjugate_steps": 1,
        **dict.fromkeys(("curvature_interval", "inverse_interval", "fit_interval"), PERIOD),
    },
}
# Weights agree after so many steps, the first with a refresh and an inversion, to this part of how far they moved. In
# each further step rounding grows tenfold, and more with conjugate gradients: training is a chaotic map.
AGREEING_STEPS, TOLERANCES = 2, {"conjugate": 1e-2, "default": 1e-3}


@dataclass(frozen=True)
class Network:
    """What is trained, and by which method.

    Attributes:
        name: in the table.
        build: the uncompiled model, the same weights each time.
        loss: Keras's name.
        batch: examples.
        classes: of integer targets; None where the inputs themselves are the targets.
        method: of `KPSVD`.
        step: one of `STEPS`.
        alone: each guard is taken out alone too.
    """

    name: str
    build: Callable[[], keras.Model]
    loss: str
    batch: int
    classes: int | None
    method: str
    step: str
    alone: bool

    def cases(self) -> dict[str, tuple[str, ...]]:
        """The guards taken out in each case, by its name."""
        alone = {name: (name,) for name in GUARDS} if self.alone else {}
        return {STOCK: (), AGAIN: (), ALL: tuple(GUARDS), **alone}


def network(problem: str, batch: int, method: str, step: str, *, alone: bool = False) -> Network:
    """The network of one of `problems.PROBLEMS`."""
    one = PROBLEMS[problem]
    classes = 10 if one.loss.startswith("sparse") else None
    return Network(problem, functools.partial(one.build, 0), one.loss, batch, classes, method, step, alone)


@dataclass(frozen=True)
class Observation:
    """What a block of steps does.

    Attributes:
        weights: after `AGREEING_STEPS`.
        exact_fits: of each step, whether it made one.
    """

    weights: list[np.ndarray]
    exact_fits: list[bool]


class Trainer(TracedStep):
    """The step of a network without some of its guards.

    Args:
        of: the network.
        removed: guards that the step does not have.
    """

    def __init__(self, of: Network, removed: Iterable[str]):
        with without(removed):
            optimizer = KPSVD(method=of.method, seed=0, **STEPS[of.step])
            super().__init__(of.build(), optimizer, of.loss, of.batch, of.classes)

    def weights(self) -> list[np.ndarray]:
        """Of the model."""
        return [variable.numpy() for variable in self.model.trainable_variables]

    def observe(self, start: list[tf.Tensor], steps: int) -> Observation:
        """What a block from the state `start` does; also what makes later blocks warm ones."""
        self.restore(start)
        next_fit = self.optimizer._natural._next_fit
        due, weights = [int(next_fit.numpy())], []
        for number in range(1, steps + 1):
            self.run(1)
            due.append(int(next_fit.numpy()))
            if number == AGREEING_STEPS:
                weights = self.weights()
        return Observation(weights, [one != other for one, other in itertools.pairwise(due)])

    def operations(self) -> Counter[str]:
        """How many operations of each type the step is made of, in all of its branches and functions."""
        definition = self.step.graph.as_graph_def()
        nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
        return Counter(node.op for node in nodes)


def train_past_exact_updates(trainer: Trainer, steps: int) -> list[tf.Tensor]:
    """The state from which blocks start: after a few steps, at an update from which on most fits are extrapolated."""
    trainer.optimizer._natural.updates.assign(EXACT_UPDATES)
    trainer.run(steps)
    return trainer.state()


def difference(weights: list[np.ndarray], stock: list[np.ndarray], start: list[np.ndarray]) -> float:
    """How far weights are off the stock step's, relative to how far that has moved them, of the worst variable."""
    parts = [
        np.linalg.norm(one - other) / max(np.linalg.norm(other - before), np.finfo(np.float32).eps)
        for one, other, before in zip(weights, stock, start, strict=True)
    ]
    return float(max(parts))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        step_ms: median over rounds of the mean step of a block.
        ratio: of the stock step's seconds to this one's in the same round, the median over rounds; above 1 the guards
            cost time.
        ratio_low, ratio_high: the least and the largest of the rounds.
        ratio_of_best: of the fastest rounds of either.
        difference: see the function.
        operations: of the step.
        first_seconds: of tracing and the first step.
        exact_fits: steps of a block that made one.
    """

    network: str
    method: str
    batch: int
    step: str
    without: str
    step_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_of_best: float
    difference: float
    operations: int
    first_seconds: float
    exact_fits: int
    rounds: int
    steps: int
    device: str
    versions: str


def compare(of: Network, rounds: int, steps: int) -> list[Row]:
    """Times all cases of one network.

    Raises:
        RuntimeError: weights do not agree, so that the steps did not do the same.
    """
    trainers = {name: Trainer(of, removed) for name, removed in of.cases().items()}
    start = train_past_exact_updates(trainers[STOCK], 2 * PERIOD)
    before = trainers[STOCK].weights()
    observed = {name: trainer.observe(start, steps) for name, trainer in trainers.items()}
    stock = observed[STOCK]
    differences = {name: difference(one.weights, stock.weights, before) for name, one in observed.items()}
    for name, one in observed.items():
        case = f"{of.name}, {of.method}, {name!r}"
        check_agreement(case, differences[name], TOLERANCES[of.step], one.exact_fits, stock.exact_fits)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds):
        # Each round starts elsewhere: what follows what must not matter.
        names = list(trainers)[number % len(trainers) :] + list(trainers)[: number % len(trainers)]
        for name in names:
            trainers[name].restore(start)
            began = time.perf_counter()
            trainers[name].run(steps)
            seconds[name].append((time.perf_counter() - began) / steps)
    return [
        row(of, name, trainer, observed[name], differences[name], seconds[STOCK], seconds[name])
        for name, trainer in trainers.items()
    ]


def check_agreement(case: str, off: float, tolerance: float, exact_fits: list[bool], stock_fits: list[bool]) -> None:
    """Raises a RuntimeError where a case did not do what the stock step does."""
    if not off <= tolerance:
        raise RuntimeError(
            f"{case}: the weights are off by {off:.1e} of how far {AGREEING_STEPS} stock steps moved them. Expected at "
            f"most {tolerance}: the same arithmetic."
        )
    if exact_fits != stock_fits:
        raise RuntimeError(
            f"{case}: {sum(exact_fits)} steps with exact fits are not the stock's {sum(stock_fits)}. They take longer, "
            "so that times cannot be compared."
        )


def row(
    of: Network,
    name: str,
    trainer: Trainer,
    observed: Observation,
    off: float,
    stock: list[float],
    seconds: list[float],
) -> Row:
    """The line of one case, from the seconds of a step in each round."""
    ratios = [one / other for one, other in zip(stock, seconds, strict=True)]
    return Row(
        of.name,
        of.method,
        of.batch,
        of.step,
        name,
        1e3 * median(seconds),
        median(ratios),
        min(ratios),
        max(ratios),
        min(stock) / min(seconds),
        off,
        trainer.operations().total(),
        trainer.first_seconds,
        sum(observed.exact_fits),
        len(ratios),
        len(observed.exact_fits),
        device(),
        f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}",
    )


def device() -> str:
    """What steps run on."""
    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else None
    return name or f"CPU, {cores()} cores, {platform.machine()}"


_HEAD = ("case", "ms a step", "ratio", "of rounds", "of best", "weights off by", "operations", "first step s")
_LINE = "  {:16s}{:>10s}{:>8s}{:>16s}{:>9s}{:>16s}{:>12s}{:>14s}"


def table(rows: list[Row]) -> str:
    """The lines of one network as text."""
    first = rows[0]
    title = f"{first.network}, {first.method}, batch {first.batch}, {first.step} step: {first.rounds} rounds of "
    title += f"{first.steps} steps, {first.exact_fits} of them fitted exactly"
    lines = [title, _LINE.format(*_HEAD)]
    for one in rows:
        ratios = f"{one.ratio:.3f}", f"{one.ratio_low:.3f} … {one.ratio_high:.3f}", f"{one.ratio_of_best:.3f}"
        others = f"{one.difference:.1e}", str(one.operations), f"{one.first_seconds:.1f}"
        lines.append(_LINE.format(one.without, f"{one.step_ms:.2f}", *ratios, *others))
    return "\n".join(lines)


def networks(*, quick: bool) -> list[Network]:
    """What is timed: each guard alone on one network only, since tracing takes long; a quick run has the quick ones."""
    if quick:
        return [network("curves", 256, "kfac", "default"), network("conv", 64, "kfac", "default")]
    cases = [("mnist", 512, "kfac"), ("curves", 256, "kfac"), ("conv", 64, "kfac"), ("curves", 256, "kfac_corrected")]
    return [
        *(network(*case, "default") for case in cases),
        *(network(*case, "cheapest", alone=case == ("curves", 256, "kfac")) for case in cases),
    ]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="timed blocks of each case (default: 9, quick 5)")
    parser.add_argument("--steps", type=int, default=PERIOD, help=f"of a block, a multiple of {PERIOD}")
    parser.add_argument("--quick", action="store_true", help="two small networks, and no guard alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rounds = options.rounds or (5 if options.quick else 9)
    if rounds < 1 or options.steps < 1 or options.steps % PERIOD:
        parser.error(f"--rounds must be positive, and --steps a multiple of {PERIOD}")
    print("\n".join(f"{name}: {meaning}" for name, (meaning, _) in GUARDS.items()))
    rows: list[Row] = []
    for one in networks(quick=options.quick):
        keras.backend.clear_session()
        made = compare(one, rounds, options.steps)
        print(f"\n{table(made)}", flush=True)
        rows += made
        write(rows, options.out)
    print(f"\n{rows[0].device}; {rows[0].versions}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
