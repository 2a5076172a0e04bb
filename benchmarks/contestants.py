"""The optimizers that `reproduce.py` compares: each one's class, and the settings it is tried with.

To add one, add a `Contestant`; where its class is none of `OPTIMIZERS`, add that too. Keras is imported by what makes
an optimizer, not by this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


def _keras(name: str) -> Callable[[], type]:
    def find() -> type:
        import keras

        return getattr(keras.optimizers, name)

    return find


def _kpsvd() -> type:
    import keras_kpsvd

    return keras_kpsvd.KPSVD


OPTIMIZERS: dict[str, Callable[[], type]] = {
    "sgd": _keras("SGD"),
    "adam": _keras("Adam"),
    "adamw": _keras("AdamW"),
    "muon": _keras("Muon"),
    "kpsvd": _kpsvd,
}


def make_optimizer(name: str, options: dict[str, Any]) -> keras.optimizers.Optimizer:
    """An optimizer of the class `OPTIMIZERS[name]`, with `options` as its arguments."""
    return OPTIMIZERS[name]()(**options)


@dataclass(frozen=True)
class Contestant:
    """An optimizer as the tables know it.

    Attributes:
        label: its name there.
        optimizer: a name in `OPTIMIZERS`.
        grid: the settings it is tried with, the most usual one first. All contestants have as many.
    """

    label: str
    optimizer: str
    grid: tuple[dict[str, Any], ...]


_RATES = ({"learning_rate": 3e-3}, {"learning_rate": 1e-3}, {"learning_rate": 1e-2})
_SGD_RATES = tuple({"momentum": 0.9, "learning_rate": rate} for rate in (1.0, 0.1, 10.0))
METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")

CONTESTANTS = {
    contestant.label: contestant
    for contestant in (
        Contestant("sgd", "sgd", _SGD_RATES),
        Contestant("adam", "adam", _RATES),
        Contestant("adamw", "adamw", _RATES),
        Contestant("muon", "muon", _RATES),
        *(
            Contestant(
                method,
                "kpsvd",
                ({"method": method}, *({"method": method, "damping": value} for value in (0.01, 0.001))),
            )
            for method in METHODS
        ),
    )
}


def edge_of_grid(label: str, options: dict[str, Any] | None) -> str | None:
    """Where a chosen setting is the largest or the smallest number that its grid tries: a better one may lie beyond.

    Args:
        label: of a contestant; of others nothing is known.
        options: the chosen setting; None for none.

    Returns:
        For example "learning_rate=0.01 is the largest tried"; None inside the grid, and for what is not a number.
    """
    if options is None or label not in CONTESTANTS:
        return None
    for name, value in options.items():
        numbers = {one[name] for one in CONTESTANTS[label].grid if isinstance(one.get(name), int | float)}
        if len(numbers) < 2 or value not in numbers:
            continue
        for extreme, word in ((max(numbers), "largest"), (min(numbers), "smallest")):
            if value == extreme:
                return f"{name}={value:g} is the {word} tried"
    return None
