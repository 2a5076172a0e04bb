"""How well the five approximations fit a model's Fisher blocks during training, and the singular values of `R(F)`.

The errors are those of Koroko et al. 2023, §5.1, with the dense matrices as reference: nothing here is shared with the
matrix-free route of `keras_kpsvd.fisher_errors` but the samples and the approximations. TensorFlow is imported by
`measure` and matplotlib by `plot`: writing results is quick.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from colours import METHOD_COLOURS

if TYPE_CHECKING:
    import keras
    from matplotlib.axes import Axes

VALUES = 20  # singular values kept of a layer
_BLOCK = 2**22  # entries of `F̂` formed at a time, 32 MiB
_MARKERS = {"kfac": "o", "kpsvd": "s", "deflation": "D", "lanczos": "x", "kfac_corrected": "^"}
_PANEL = 3.4, 2.6  # inches; two side by side are as wide as the legend
_DODGE = 3.5  # points between the methods' bars

Row = dict[str, Any]
Terms = list[tuple[np.ndarray, np.ndarray]]


def measure(
    model: keras.Model, x: Any, epoch: int, *, seed: int = 0, dense_size: int = 8192, spectrum_size: int = 2048
) -> list[Row]:
    """The errors of the five approximations on each layer whose dense Fisher block fits, and its singular values.

    One forward and backward pass at sampled targets, after which the model, its optimizer and all random states are as
    before; the rest is NumPy in float64, at most two matrices of `(d_in·d_out)²` at a time (1.1 GB for 8192).

    Args:
        model: compiled, with instrumented layers.
        x: inputs `[N, ...]`.
        epoch: goes into the rows.
        seed: of the sampled targets.
        dense_size: the largest `d_in·d_out` of a layer looked at.
        spectrum_size: the largest `d_in·d_out` for which error 2 is computed.

    Returns:
        A row for each layer, those of a model without small ones being none. "epoch", "layer", "d_in" (with the bias),
        "d_out"; "singular_values": the `VALUES` largest of `R(F)`, `[d_in², d_out²]`, largest first; "share_of_two":
        the part of `‖R(F)‖_F²` in the first two; "errors": `{method: {"error_1": ‖F − F̂‖_F / ‖F‖_F, "error_2":
        ‖λ(F) − λ(F̂)‖ / ‖λ(F)‖ of the sorted spectra}}`. A number is None where it is not finite or was not computed,
        an error 0 where `F` and `F̂` are both zero. Groups of a grouped convolution are layers "name/block_i", as in
        `keras_kpsvd.fisher_errors`.
    """
    from keras_kpsvd.curvature.samples import block_samples

    samples = block_samples(model, x, None, seed, fisher="sampled", likelihood="auto")
    rows = []
    for name, blocks in samples.items():
        for index, (activations, gradients) in enumerate(blocks):
            if activations.shape[-1] * gradients.shape[-1] > dense_size:
                continue
            row = {"epoch": epoch, "layer": name if len(blocks) == 1 else f"{name}/block_{index}"}
            rows.append(row | _of_layer(activations.numpy(), gradients.numpy(), spectrum_size))
    return rows


def _of_layer(activations: np.ndarray, gradients: np.ndarray, spectrum_size: int) -> Row:
    """The row of a layer from its samples `[N, shared, d_in]` and `[N, shared, d_out]`."""
    from keras_kpsvd import approximate_fisher
    from keras_kpsvd.curvature.approximations import METHODS

    activations, gradients = activations.astype(np.float64), gradients.astype(np.float64)
    d_in, d_out = activations.shape[-1], gradients.shape[-1]
    row: Row = {"d_in": d_in, "d_out": d_out}
    if not (np.isfinite(activations).all() and np.isfinite(gradients).all()):
        nothing = {method: {"error_1": None, "error_2": None} for method in METHODS}
        return row | {"singular_values": [], "share_of_two": None, "errors": nothing}
    fisher = dense_fisher(activations, gradients)
    norm = float(np.linalg.norm(fisher))
    values = singular_values(fisher, d_in, d_out)
    row["singular_values"] = values[:VALUES].tolist()
    row["share_of_two"] = _finite(float(np.sum(values[:2] ** 2)) / norm**2) if norm > 0 else None
    spectrum = np.linalg.eigvalsh(fisher) if d_in * d_out <= spectrum_size else None
    row["errors"] = {}
    for method in METHODS:
        approximation = approximate_fisher(activations, gradients, method)
        terms = [(left.numpy(), right.numpy()) for left, right in approximation.terms]
        row["errors"][method] = {
            "error_1": _ratio(distance(fisher, terms), norm),
            "error_2": None if spectrum is None else _ratio(_spectral_distance(spectrum, terms), norm),
        }
    return row


def dense_fisher(activations: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """`F = E_n[vec(D_n) vec(D_n)ᵀ]`, `[d_in·d_out, d_in·d_out]`, from `[N, shared, d_in]` and `[N, shared, d_out]`."""
    per_example = np.matmul(activations.transpose(0, 2, 1), gradients)
    rows = per_example.reshape(len(per_example), -1)
    fisher = rows.T @ rows
    fisher /= len(rows)
    return fisher


def singular_values(fisher: np.ndarray, d_in: int, d_out: int) -> np.ndarray:
    """All `min(d_in², d_out²)` singular values of `R(F)`, largest first, through Gram matrices of the dense `R(F)`.

    `F` is symmetric, hence `R(F) vec(Vᵀ)` the transpose of `R(F) vec(V)`: `R(F)` takes symmetric matrices to symmetric
    ones and skew to skew. Its singular values are those of these two parts, of a quarter of its size each, written in
    orthonormal bases. Values below `√eps` of the largest, where Gram matrices know no more, are 0.

    Args:
        fisher: `[d_in·d_out, d_in·d_out]`.
        d_in: rows of the kernel.
        d_out: its columns.
    """
    rows, columns = np.triu_indices(d_in)
    first, second = np.triu_indices(d_out)
    # [pairs i ≤ j, d_out, d_out]: half of R(F); the other half has these blocks transposed.
    blocks = fisher.reshape(d_in, d_out, d_in, d_out)[rows, :, columns, :]
    upper, lower = blocks[:, first, second], blocks[:, second, first]
    del blocks
    skew = (upper - lower)[rows < columns][:, first < second]
    upper += lower
    del lower
    # (E_ij + E_ji)/√2 are unit matrices but on the diagonal, where E_ii is one.
    upper[rows == columns] /= 2**0.5
    upper[:, first == second] /= 2**0.5
    squares = np.concatenate([_squared_singular_values(part) for part in (upper, skew)])
    values = np.sqrt(np.sort(np.maximum(squares, 0))[::-1])
    return np.where(values > 2 * np.finfo(values.dtype).eps ** 0.5 * values[0], values, 0)


def _squared_singular_values(matrix: np.ndarray) -> np.ndarray:
    """`[min(m, n)]`, through the smaller Gram matrix of `[m, n]`."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return np.linalg.eigvalsh(gram)


def distance(fisher: np.ndarray, terms: Terms) -> float:
    """`‖F − Σ A ⊗ G‖_F` of dense matrices; the sum is formed some rows of `A` at a time.

    Args:
        fisher: `[d_in·d_out, d_in·d_out]`.
        terms: of `(A [d_in, d_in], G [d_out, d_out])`.
    """
    d_in, d_out = len(terms[0][0]), len(terms[0][1])
    step = max(1, _BLOCK // (d_out * len(fisher)))
    squares = 0.0
    for start in range(0, d_in, step):
        difference = fisher[start * d_out : (start + step) * d_out] - _dense(terms, slice(start, start + step))
        squares += float(np.vdot(difference, difference))
    return math.sqrt(squares)


def _dense(terms: Terms, rows: slice = slice(None)) -> np.ndarray:
    """The rows of `Σ A ⊗ G` that come from `rows` of the `A`."""
    total: Any = 0.0
    for left, right in terms:
        total = np.kron(left[rows], right) + total
    return total


def _spectral_distance(spectrum: np.ndarray, terms: Terms) -> float:
    """`‖λ − λ(Σ A ⊗ G)‖` for an ascending `spectrum`, `[d_in·d_out]`."""
    if len(terms) == 1:  # products of the factors' eigenvalues
        other = np.sort(np.outer(*(np.linalg.eigvalsh(factor) for factor in terms[0])), axis=None)
    else:
        other = np.linalg.eigvalsh(_dense(terms))
    return float(np.linalg.norm(spectrum - other))


def _ratio(error: float, norm: float) -> float | None:
    if norm == 0:
        return 0.0 if error == 0 else None
    return _finite(error / norm)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_csv(rows_by_problem: Mapping[str, Iterable[Row]], path: Path | str) -> None:
    """The errors, a line for each problem, epoch, layer and method; what was not computed is empty."""
    names = ("problem", "epoch", "layer", "d_in", "d_out", "method", "error_1", "error_2")
    _write(path, names, _error_lines(rows_by_problem))


def _error_lines(rows_by_problem: Mapping[str, Iterable[Row]]) -> Iterator[tuple]:
    for problem, rows in rows_by_problem.items():
        for row in rows:
            for method, errors in row["errors"].items():
                layer = row["epoch"], row["layer"], row["d_in"], row["d_out"]
                yield problem, *layer, method, errors["error_1"], errors["error_2"]


def write_singular_values(rows_by_problem: Mapping[str, Iterable[Row]], path: Path | str) -> None:
    """The singular values of `R(F)`, a line for each, `index` from 1; relative ones by the layer's first."""
    names = ("problem", "epoch", "layer", "index", "singular_value", "relative")
    _write(path, names, _value_lines(rows_by_problem))


def _value_lines(rows_by_problem: Mapping[str, Iterable[Row]]) -> Iterator[tuple]:
    for problem, rows in rows_by_problem.items():
        for row in rows:
            for index, (value, relative) in enumerate(
                zip(row["singular_values"], _relative(row["singular_values"]), strict=True), start=1
            ):
                yield problem, row["epoch"], row["layer"], index, value, relative


def _relative(values: list[float]) -> list[float | None]:
    """Each over the first; None where that is zero."""
    return [value / values[0] if values[0] > 0 else None for value in values]


def _write(path: Path | str, names: tuple[str, ...], lines: Iterable[tuple]) -> None:
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(lines)


def plot(rows_by_problem: Mapping[str, list[Row]], directory: Path | str) -> list[Path]:
    """Draws `errors.png` and `singular_values.png`, problems without rows left out.

    Args:
        rows_by_problem: the rows of `measure` of all epochs, by the name of the problem.
        directory: of the pictures, made if need be.

    Returns:
        Their paths; none if there are no rows.
    """
    problems = {name: rows for name, rows in rows_by_problem.items() if rows}
    if not problems:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    Path(directory).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, shape, draw in (
        ("errors", (len(problems), 2), _draw_errors),
        ("singular_values", (1, len(problems)), _draw_singular_values),
    ):
        count, across = shape
        figure = Figure((_PANEL[0] * max(across, 2), _PANEL[1] * count + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(count, across, squeeze=False)
        handles = draw(problems, panels)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        paths.append(Path(directory) / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _draw_errors(problems: dict[str, list[Row]], panels: np.ndarray) -> list[Any]:
    """A row of panels for each problem, a column for each error; returns what the legend shows."""
    handles: dict[str, Any] = {}
    for (problem, rows), of_problem in zip(problems.items(), panels, strict=True):
        for error, panel in zip(("error_1", "error_2"), of_problem, strict=True):
            drawn = _draw_error(panel, rows, error)
            handles |= {name: handle for name, handle in drawn.items() if name not in handles}
            layers = {row["layer"] for row in rows if any(each[error] is not None for each in row["errors"].values())}
            counted = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}" if layers else "not computed"
            words = error.replace("_", " ")
            panel.set_title(f"{problem}, {words}, {counted}", fontsize=10)
            if not layers:
                panel.set_axis_off()
                continue
            panel.set_ylabel(f"{words}, median and range", fontsize=9)
            _epoch_axis(panel, sorted({row["epoch"] for row in rows}))
    return [handles[method] for method in METHOD_COLOURS if method in handles]


def _draw_error(panel: Axes, rows: list[Row], error: str) -> dict[str, Any]:
    """A curve for each method, the median over layers, and bars from the least to the largest; returns the curves."""
    from matplotlib.transforms import ScaledTranslation

    handles, largest, least = {}, 0.0, math.inf
    methods = [method for method in METHOD_COLOURS if any(method in row["errors"] for row in rows)]
    panel.set_yscale("log")
    for place, method in enumerate(methods):
        points: dict[int, list[float]] = {}
        for row in rows:
            value = row["errors"].get(method, {}).get(error)
            if value is not None:
                points.setdefault(row["epoch"], []).append(value)
        if not points:
            continue
        positive = [value for values in points.values() for value in values if value > 0]
        largest, least = max([largest, *positive]), min([least, *positive])
        epochs = sorted(points)
        aside = ScaledTranslation((place - (len(methods) - 1) / 2) * _DODGE / 72, 0, panel.figure.dpi_scale_trans)
        style = {"color": METHOD_COLOURS[method], "transform": panel.transData + aside}
        # Converged, "deflation" and "lanczos" are the same: one dashed, so that both are seen.
        (handles[method],) = panel.plot(
            epochs,
            [median(points[epoch]) for epoch in epochs],
            marker=_MARKERS.get(method, "."),
            markersize=4,
            linestyle="--" if method == "lanczos" else "-",
            linewidth=2.5 if method == "deflation" else 1.5,
            label=method,
            **style,
        )
        for epoch in epochs:
            ends = min(points[epoch]), max(points[epoch])
            panel.plot([epoch, epoch], ends, linewidth=0.8, alpha=0.7, marker="_", markersize=3, **style)
    if largest > 0:  # a zero lies below the axis
        panel.set_ylim(least / 1.5, largest * 1.5)
    return handles


def _epoch_axis(panel: Axes, epochs: list[int]) -> None:
    """Epochs, logarithmic from 1, with ticks at those measured."""
    panel.set_xscale("symlog", linthresh=1)
    panel.set_xlim(-0.3, max(0.3, 1.4 * epochs[-1]))
    # The last one always; one before it only where there is room for both numbers.
    named = [epoch for epoch in epochs if epoch == epochs[-1] or 1.4 * epoch < epochs[-1]]
    panel.set_xticks(named, [str(epoch) for epoch in named])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("epochs (log scale from 1)", fontsize=9)
    panel.tick_params(labelsize=8, which="both")
    panel.grid(alpha=0.3)


def _draw_singular_values(problems: dict[str, list[Row]], panels: np.ndarray) -> list[Any]:
    """A panel for each problem, a thin line for each layer; returns what the legend shows."""
    from matplotlib.lines import Line2D

    looks = {"first epoch measured": ("#0072B2", "-"), "last epoch measured": ("#D55E00", "--")}
    for (problem, rows), panel in zip(problems.items(), panels[0], strict=True):
        epochs = sorted({row["epoch"] for row in rows})
        ends = dict(zip((epochs[0], epochs[-1]), looks.values(), strict=True))
        for row in rows:
            if row["epoch"] not in ends or not row["singular_values"]:
                continue
            colour, style = ends[row["epoch"]]
            relative = [value or math.nan for value in _relative(row["singular_values"])]  # no zeros on a log axis
            panel.plot(range(1, len(relative) + 1), relative, color=colour, linestyle=style, linewidth=0.8)
        panel.set_yscale("log")
        panel.set_title(f"{problem}, after epochs {epochs[0]} and {epochs[-1]}", fontsize=10)
        panel.set_xlabel("k", fontsize=9)
        panel.set_ylabel(r"$\sigma_k / \sigma_1$ of $R(F)$ (log scale)", fontsize=9)
        panel.set_xticks([1, 5, 10, 15, 20])
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    return [
        Line2D([], [], color=colour, linestyle=style, linewidth=1.2, label=name)
        for name, (colour, style) in looks.items()
    ]
