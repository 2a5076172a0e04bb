"""What a step of `kfac` takes: floating-point operations and bytes by formula, against the time it is measured to take.

    python benchmarks/cost_model.py [--networks curves mnist conv] [--rounds 7] [--steps 20]

`costs.py` has the formulas. Parts of a step are measured as differences between whole training steps with and without
them, in blocks that take turns, each from the same state; the median over rounds. Formulas become times by the rate of
a large matrix product and the bandwidth of adding large vectors, both measured in the same run: an operation takes the
longer of the two.

Written: one line for each part of each network (`cost_model.csv`), and for each layer (`cost_model_layers.csv`).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import costs
import keras
import tensorflow as tf
from guards import device
from measurements import write
from problems import PROBLEMS
from traced_step import TracedStep

from keras_kpsvd import KPSVD
from keras_kpsvd.curvature import natural_gradient
from keras_kpsvd.curvature.intervals import LONGEST
from keras_kpsvd.curvature.inverses import RANK
from keras_kpsvd.curvature.reduction import refresh_rows
from keras_kpsvd.optimizer import FIT_INTERVAL

RESULTS = Path(__file__).parent / "results" / "cost_model.csv"
NETWORKS = {"curves": 256, "mnist": 512, "conv": 128}  # and batch sizes
# Updates after which all of the default step is as seldom as it gets.
EARLY = 200
NEVER = {"curvature_interval": 10**9, "inverse_interval": 10**9}
# Arguments of `KPSVD`; of the others the optimizer itself.
CASES: dict[str, dict | Callable[[], keras.optimizers.Optimizer]] = {
    "sgd": lambda: keras.optimizers.SGD(1e-6, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(1e-6),
    "given rate": {"learning_rate": 1e-6, "damping": 0.1, "eigenvalues": "corrected", **NEVER},
    "one direction": {"fit_interval": 1, **NEVER},
    "two conjugate steps": {"conjugate_steps": 2, **NEVER},
    "three conjugate steps": {"conjugate_steps": 3, **NEVER},
    "always refreshed": {"fit_interval": 1, **NEVER, "curvature_interval": 1},
    "always inverted": {"fit_interval": 1, **NEVER, "curvature_interval": 1, "inverse_interval": 1},
    "default": {},
}
# What is measured: one case less another.
PARTS = {
    "gradient and update": ("sgd", None),
    "preconditioner and checks": ("given rate", "sgd"),
    "model of two directions": ("one direction", "given rate"),
    "a conjugate step": ("three conjugate steps", "two conjugate steps"),
    "refresh": ("always refreshed", "one direction"),
    "inversion": ("always inverted", "always refreshed"),
    "whole default step": ("default", None),
}


@dataclass(frozen=True)
class Row:
    """One line: a part of a step of a network.

    Attributes:
        gflop, mb: by formula, 1e9 operations and 1e6 bytes.
        reckoned_ms: what they take at the rates of this machine.
        measured_ms: median over rounds.
        low_ms, high_ms: the least and the largest of the rounds.
        of_adam: `measured_ms` as a part of Adam's whole step.
    """

    network: str
    batch: int
    part: str
    gflop: float
    mb: float
    reckoned_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    of_adam: float
    gflops: float
    gb_per_second: float
    device: str
    versions: str


@dataclass(frozen=True)
class LayerRow:
    """One line: a part of a step of one layer, by formula."""

    network: str
    batch: int
    layer: str
    d_in: int
    d_out: int
    positions: int
    part: str
    gflop: float
    mb: float
    reckoned_ms: float


def counted(block: costs.Block, batch: int, intervals: int) -> dict[str, list[costs.Cost]]:
    """Every part of `PARTS` of one block, by formula.

    Args:
        block: the block.
        batch: examples.
        intervals: of refresh and inversion in the default step.
    """
    # Of a given rate: each layer's slope for the KL bound, and whether the gradient is finite, for which all waits.
    used = refresh_rows("kfac", [(block.d_in, block.d_out)], block.positions, corrected=True)
    weights = block.d_in * block.d_out
    precondition, tangent = costs.precondition(block, RANK), costs.tangent(block, batch)
    conjugate = [*tangent, *costs.cotangent(block, batch), *precondition, *costs.conjugate_vectors(block)]
    # Of two directions: their inner products with each other and with the gradient, their lengths and the weights'.
    products = costs.passes(weights, 11)
    model = [*tangent, *tangent, products]
    refresh, inversion = costs.refresh(block, batch, used, RANK), costs.inversion(block, RANK)
    gradient = [*costs.gradient(block, batch), *costs.update(block)]
    now_and_then = [costs.Cost(one.flops / intervals, one.moved / intervals) for one in (*refresh, *inversion)]
    fits = [costs.Cost(one.flops / FIT_INTERVAL, one.moved / FIT_INTERVAL) for one in (*tangent, *tangent)]
    default = [*gradient, *precondition, products, *fits, *now_and_then]
    preconditioner = [*precondition, costs.passes(weights, 5)]
    parts = (gradient, preconditioner, model, conjugate, refresh, inversion, default)
    return dict(zip(PARTS, parts, strict=True))


def machine() -> tuple[float, float]:
    """Operations a second of a matrix product of 2,048 rows, and bytes a second of adding 32 MiB vectors."""
    square, vector = tf.random.normal([2048, 2048]), tf.random.normal([2**23])
    product = _fastest(tf.function(lambda: tf.reduce_sum(tf.matmul(square, square)[0])))
    added = _fastest(tf.function(lambda: tf.reduce_sum((vector + vector)[:1])))
    return costs.product(2048, 2048, 2048).flops / product, 2 * costs.ITEM * 2**23 / added


def _fastest(function: Callable[[], tf.Tensor], times: int = 9) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        float(function())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measure(network: str, batch: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step of every case, a number for each round."""
    problem = PROBLEMS[network]
    classes = 10 if problem.loss.startswith("sparse") else None
    made: dict[str, tuple[TracedStep, list[tf.Tensor]]] = {}
    for name, case in CASES.items():
        optimizer = case() if callable(case) else KPSVD(seed=0, **case)
        # On one batch again and again slopes soon hold no more, and conjugate gradients would end after one step.
        with mock.patch.object(natural_gradient, "holds_on_other_batches", lambda _: tf.constant(True)):
            one = TracedStep(problem.build(0), optimizer, problem.loss, batch, classes)
        one.run(2 if name != "default" else EARLY)
        made[name] = one, one.state()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        names = list(made)[number % len(made) :] + list(made)[: number % len(made)]
        for name in names:
            one, state = made[name]
            one.restore(state)
            began = time.perf_counter()
            one.run(steps)
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def differences(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of every part of `PARTS`, a number for each round."""
    parts = {}
    for name, (case, less) in PARTS.items():
        others = [0.0] * len(seconds[case]) if less is None else seconds[less]
        parts[name] = [one - other for one, other in zip(seconds[case], others, strict=True)]
    return parts


def compare(network: str, batch: int, rounds: int, steps: int) -> tuple[list[Row], list[LayerRow]]:
    """Both tables of one network."""
    rate, bandwidth = machine()
    seconds = measure(network, batch, rounds, steps)
    blocks = [(one, counted(one, batch, LONGEST)) for one in costs.blocks_of(PROBLEMS[network].build(0))]
    adam = median(seconds["adam"])
    rows, layers = [], []
    for part, of_rounds in differences(seconds).items():
        operations = [cost for _, parts in blocks for cost in parts[part]]
        total, reckoned = costs.total(operations), sum(one.seconds(rate, bandwidth) for one in operations)
        found = [1e3 * one for one in (median(of_rounds), min(of_rounds), max(of_rounds))]
        rows.append(
            Row(
                network,
                batch,
                part,
                total.flops / 1e9,
                total.moved / 1e6,
                1e3 * reckoned,
                *found,
                found[0] / (1e3 * reckoned),
                found[0] / (1e3 * adam),
                rate / 1e9,
                bandwidth / 1e9,
                device(),
                f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}",
            )
        )
    for block, parts in blocks:
        for part, operations in parts.items():
            total = costs.total(operations)
            reckoned = 1e3 * sum(one.seconds(rate, bandwidth) for one in operations)
            sizes = (block.d_in, block.d_out, block.positions)
            counts = (total.flops / 1e9, total.moved / 1e6, reckoned)
            layers.append(LayerRow(network, batch, block.name, *sizes, part, *counts))
    return rows, layers


_LINE = "  {:26s}{:>8s}{:>8s}{:>10s}{:>10s}{:>18s}{:>8s}{:>9s}"
_HEAD = ("part", "GFLOP", "MB", "reckoned", "measured", "of rounds, ms", "ratio", "of Adam")


def table(rows: list[Row]) -> str:
    """The lines of one network as text."""
    first = rows[0]
    rates = f"{first.gflops:.0f} GFLOP and {first.gb_per_second:.1f} GB a second"
    lines = [f"{first.network}, kfac, batch {first.batch}; {rates}", _LINE.format(*_HEAD)]
    for one in rows:
        numbers = f"{one.gflop:.2f}", f"{one.mb:.0f}", f"{one.reckoned_ms:.1f}", f"{one.measured_ms:.1f}"
        others = f"{one.low_ms:.1f} … {one.high_ms:.1f}", f"{one.ratio:.2f}", f"{one.of_adam:.2f}"
        lines.append(_LINE.format(one.part, *numbers, *others))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=7, help="timed blocks of each case")
    parser.add_argument("--steps", type=int, default=LONGEST, help=f"of a block, a multiple of {LONGEST}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.steps < 1 or options.steps % LONGEST:
        parser.error(f"--rounds must be positive, and --steps a multiple of {LONGEST}")
    rows: list[Row] = []
    layers: list[LayerRow] = []
    for network in options.networks:
        keras.backend.clear_session()
        made, of_layers = compare(network, NETWORKS[network], options.rounds, options.steps)
        print(f"{table(made)}\n", flush=True)
        rows, layers = rows + made, layers + of_layers
        write(rows, options.out)
        write(layers, options.out.with_name(f"{options.out.stem}_layers.csv"))
    print(f"{rows[0].device}; {rows[0].versions}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
