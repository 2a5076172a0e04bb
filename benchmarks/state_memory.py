"""How large the optimizer's state is: `KPSVD`'s, of each method, against Adam's on the same network.

    python benchmarks/state_memory.py [--out benchmarks/results/state_memory.csv]

Bytes of the variables of a built optimizer, by what they hold; nothing is trained. The weights themselves and what a
step takes for a while are not counted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from contestants import METHODS
from convolution import resnet20
from measurements import write
from problems import PROBLEMS

import keras_kpsvd

RESULTS = Path(__file__).parent / "results" / "state_memory.csv"
PARTS = ("momentum", "factors", "preconditioners")
MIB = 2**20


def _resnet20() -> keras.Model:
    return resnet20(keras_kpsvd.KPSVDConv2D, keras_kpsvd.KPSVDDense)


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "curves": lambda: PROBLEMS["curves"].build(0),
    "mnist": lambda: PROBLEMS["mnist"].build(0),
    "faces": lambda: PROBLEMS["faces"].build(0),
    "resnet-20": _resnet20,
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        parameters: trainable ones, MiB.
        adam: state, MiB.
        momentum, factors, preconditioners, other: of KPSVD, MiB.
        ratio: KPSVD's state over Adam's.
    """

    network: str
    method: str
    parameters: float
    adam: float
    momentum: float
    factors: float
    preconditioners: float
    other: float
    ratio: float


def size(variables: list[keras.Variable]) -> int:
    """Bytes."""
    return sum(variable.value.shape.num_elements() * variable.value.dtype.size for variable in variables)


INVERSES = ("inverse", "basis", "weights", "shift", "K1", "K2", "s1", "s2", "eigenvalues")


def part_of(variable: keras.Variable) -> str:
    """Which of `PARTS` a variable of KPSVD belongs to, or "other"."""
    if variable.name.startswith(("model_", "next_")):  # Of the step and of its intervals, not of a layer.
        return "other"
    kind = variable.name.rpartition("_")[2]
    if kind == "momentum":
        return "momentum"
    if kind in ("A", "G", "P", "Q"):
        return "factors"
    return "preconditioners" if kind in INVERSES else "other"


def measure(network: str, method: str) -> Row:
    """Builds both optimizers on one network."""
    model = NETWORKS[network]()
    optimizers = [keras.optimizers.Adam(), keras_kpsvd.KPSVD(method=method, seed=0)]
    for one in optimizers:
        one.build(model.trainable_variables)
    adam, ours = (size(one.variables) for one in optimizers)
    by_part = dict.fromkeys((*PARTS, "other"), 0)
    for variable in optimizers[1].variables:
        by_part[part_of(variable)] += size([variable])
    parts = {name: value / MIB for name, value in by_part.items()}
    return Row(network, method, size(model.trainable_variables) / MIB, adam / MIB, **parts, ratio=ours / adam)


def line(row: Row) -> str:
    """A row as text."""
    parts = ", ".join(f"{name} {getattr(row, name):.2f}" for name in (*PARTS, "other"))
    return (
        f"{row.network:10s} {row.method:15s} {row.ratio:.2f} × Adam's {row.adam:.2f} MiB "
        f"(parameters {row.parameters:.2f} MiB; {parts})"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = []
    for network in NETWORKS:
        for method in METHODS:
            rows.append(measure(network, method))
            print(line(rows[-1]), flush=True)
    write(rows, options.out)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
