"""What the study of errors says: tables of error 1 and error 2, and the paper's figures beside ours. Nothing is drawn.

Rows are those of `fisher_study.measure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from contestants import METHODS
from evidence import Spread
from runs import STUDY_IMAGES
from tables import as_markdown, ranged

Row = dict[str, Any]

DENSE_SIZE, SPECTRUM_SIZE = 8_192, 2_048  # the defaults of `fisher_study.measure`; a test holds them to the truth
SMALLEST_OF_FACES = 15_030  # rows of the Fisher block of its smallest layer; a test holds it to the network
PAPER = {"kfac": (0.2, 0.8)} | dict.fromkeys(METHODS[1:], (0.05, 0.2))  # error 1 of one small layer, CURVES and MNIST
_TWO_TERMS = ("deflation", "lanczos")


def section(studied: Mapping[str, Sequence[Row]]) -> str:
    """The report's section on the errors, as Markdown; the files it names are those of `fisher_study`.

    Args:
        studied: rows by problem; problems without any are said to have none.
    """
    parts = [
        "## Errors of the approximations during training",
        f"`kfac` trains; after the epochs shown the five approximations are made of the same {STUDY_IMAGES} training "
        "images with sampled targets, and compared with the dense Fisher block in float64: of every layer whose block "
        f"has at most {DENSE_SIZE:,} rows; error 2 of those of at most {SPECTRUM_SIZE:,}. FACES is not studied: the "
        f"block of its smallest layer has {SMALLEST_OF_FACES:,} rows. Error 1 is ‖F − F̂‖ / ‖F‖, error 2 the same of "
        "the sorted spectra. Tables: median over layers (range).",
    ]
    for problem, rows in studied.items():
        parts.append(f"### {problem}, errors")
        if not rows:
            parts.append("No layer is small enough.")
            continue
        parts += [layers_studied(rows), as_markdown(table(rows))]
        if said := sentences(rows):
            parts.append("\n".join(f"- {sentence}" for sentence in said))
    if any(studied.values()):
        parts += FILES
    return "\n\n".join(parts) + "\n"


FILES = (
    "![Error 1 and error 2 of the five methods](errors.png)",
    "![Singular values of the rearranged Fisher matrix](singular_values.png)",
    "Data: [errors](errors.csv), [singular values](singular_values.csv).",
)


def layers_studied(rows: Iterable[Row]) -> str:
    """A sentence: the layers, with the sizes of their blocks; those with error 2 are marked."""
    sizes = {row["layer"]: (row["d_in"], row["d_out"], _known(row, "error_2")) for row in rows}
    named = [f"{name} ({d_in} × {d_out}{', error 2 too' if two else ''})" for name, (d_in, d_out, two) in sizes.items()]
    return f"Layers studied (inputs with the bias × outputs): {', '.join(named)}."


def _known(row: Row, error: str) -> bool:
    return any(errors[error] is not None for errors in row["errors"].values())


def _values(rows: Iterable[Row], method: str, error: str, epoch: int | None = None) -> list[float]:
    """The errors of a method over layers, at one epoch or at all; without those not known."""
    found = [row["errors"].get(method, {}).get(error) for row in rows if epoch in (None, row["epoch"])]
    return [value for value in found if value is not None]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Methods by error 1 and error 2 at the first and the last epoch; error 2 only where it was computed."""
    epochs = sorted({row["epoch"] for row in rows})
    epochs = list(dict.fromkeys((epochs[0], epochs[-1])))
    errors = [error for error in ("error_1", "error_2") if any(_known(row, error) for row in rows)]
    cells = [["method", *(f"{error.replace('_', ' ')}, epoch {epoch}" for error in errors for epoch in epochs)]]
    for method in METHODS:
        spreads = [Spread(tuple(_values(rows, method, error, epoch))) for error in errors for epoch in epochs]
        cells.append([method, *(ranged(spread.columns("x"), "x", ".2g") for spread in spreads)])
    return cells


def sentences(rows: Sequence[Row]) -> list[str]:
    """The paper's claims on error 1, and how many layers and epochs of ours they hold for."""
    trained = [row for row in rows if row["epoch"] > 0]
    found = []
    for methods, words in ((METHODS[:1], "kfac at"), (METHODS[1:], "the four others at")):
        low, high = PAPER[methods[0]]
        values = {method: _values(trained, method, "error_1") for method in methods}
        listed = [
            f"{method} {sum(low <= value <= high for value in own)} of {len(own)}, median {median(own):.2g}"
            for method, own in values.items()
            if own
        ]
        if listed:
            found.append(
                f"The paper's one small layer has {words} {low:g} to {high:g}. Within that here, over layers and "
                f"epochs from the first on: {'; '.join(listed)}. The claim {_verdict(values, low, high)}."
            )
    return found + _orders(trained)


def _verdict(values: Mapping[str, Sequence[float]], low: float, high: float) -> str:
    """Whether all methods' medians lie in the paper's range; if not, whose do not."""
    inside = {method: low <= median(own) <= high for method, own in values.items() if own}
    if all(inside.values()):
        return "holds for the median"
    outside = [
        f"{method} is {'below' if median(values[method]) < low else 'above'}"
        for method, good in inside.items()
        if not good
    ]
    return f"does not hold for the median: {', '.join(outside)}"


def _orders(rows: Sequence[Row]) -> list[str]:
    """How often each method's error 1 is below KFAC's, and how far the two best two-term approximations are apart."""
    pairs = {
        method: [
            (row["errors"][method]["error_1"], row["errors"]["kfac"]["error_1"])
            for row in rows
            if all(_values([row], each, "error_1") for each in (method, "kfac"))
        ]
        for method in METHODS[1:]
    }
    counted = [
        f"{method} in {sum(own < kfac for own, kfac in both)} of {len(both)}" for method, both in pairs.items() if both
    ]
    found = []
    if counted:
        found.append(
            f"Error 1 is below kfac's, as in the paper: {', '.join(counted)} layers and epochs. By their definition "
            "none can be above it."
        )
    twins = [[value for method in _TWO_TERMS for value in _values([row], method, "error_1")] for row in rows]
    apart = [abs(twin[0] - twin[1]) / max(twin) for twin in twins if len(twin) == 2 and max(twin) > 0]
    if apart:
        found.append(
            "Converged, deflation and lanczos are the same matrix; the paper shows them apart. Here their error 1 "
            + (f"differs by at most {max(apart):.2g} of itself." if max(apart) > 0 else "is equal.")
        )
    return found
