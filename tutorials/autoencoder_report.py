"""The table, the pictures and the CSV of the autoencoder tutorial."""

import argparse
import csv
import math
import os
import platform
from pathlib import Path

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from autoencoder_problems import Problem
from autoencoder_training import Run

_COLOURS = {
    "adam": "#444444",
    "sgd": "#a0a0a0",
    "kfac": "#e69f00",
    "kpsvd": "#009e73",
    "deflation": "#cc79a7",
    "lanczos": "#56b4e9",
    "kfac_corrected": "#d55e00",
}
_DASH = "–"


def best_loss(losses: list[float]) -> float | None:
    """The lowest finite loss, or None."""
    return min((loss for loss in losses if math.isfinite(loss)), default=None)


def epochs_to(losses: list[float], target: float) -> int | None:
    """The first epoch, counted from 1, whose loss is at most `target`; None if none is."""
    return next((epoch for epoch, loss in enumerate(losses, start=1) if loss <= target), None)


def seconds_per_epoch(seconds: list[float]) -> float | None:
    """Median duration of the epochs after the first, which holds the tracing; of the first if it is the only one."""
    durations = np.diff([0.0, *seconds])
    if not len(durations):
        return None
    return float(np.median(durations[1:] if len(durations) > 1 else durations))


def table_rows(runs: list[Run]) -> list[list[str]]:
    """One row of text for each run, under the headings of `HEADINGS`."""
    adam = next((run for run in runs if run.method == "adam"), None)
    target = best_loss(adam.losses) if adam else None
    rows = []
    for run in runs:
        reached = None if target is None else epochs_to(run.losses, target)
        rows.append(
            [
                run.method,
                str(run.epochs),
                _text(best_loss(run.losses), ".5f"),
                _text(run.held_out_loss, ".5f"),
                _text(reached, "d"),
                _text(run.seconds[reached - 1] if reached else None, ".1f"),
                _text(seconds_per_epoch(run.seconds), ".2f"),
                _text(run.seconds[0] if run.seconds else None, ".1f"),
                run.status.partition(":")[0],
            ]
        )
    return rows


HEADINGS = (
    ("", "method"),
    ("", "epochs"),
    ("best", "loss"),
    ("held-out", "loss"),
    ("epochs to", "Adam's best"),
    ("seconds to", "Adam's best"),
    ("seconds", "per epoch"),
    ("first", "epoch (s)"),
    ("", "status"),
)


def format_table(rows: list[list[str]]) -> str:
    """Aligned text: first and last column to the left, numbers to the right."""
    lines = [*map(list, zip(*HEADINGS, strict=True)), *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS))]
    left = (0, len(HEADINGS) - 1)

    def aligned(line: list[str]) -> str:
        cells = (c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join([*map(aligned, lines[:2]), "  ".join("-" * width for width in widths), *map(aligned, rows)])


def describe_run(problem: Problem, options: argparse.Namespace) -> str:
    """What was trained on what, with which settings and where: belongs beside every number."""
    network = "-".join(map(str, problem.widths + problem.widths[-2::-1]))
    epochs = f"{options.epochs}"
    if options.kpsvd_epochs != options.epochs:
        epochs += f" ({options.kpsvd_epochs} for the methods of keras_kpsvd)"
    gpus = len(tf.config.list_physical_devices("GPU"))
    device = f"{gpus} GPU" if gpus else f"CPU, {_cores()} cores"
    return "\n".join(
        [
            f"Data:     {problem.source}",
            f"Network:  {network}, {problem.loss.name}; a perfect copy would have a loss of {problem.lowest_loss:.5f}",
            f"Training: {epochs} epochs, batch size {options.batch_size}, seed {options.seed}, {options.initializer}; "
            f"learning rates: Adam {options.adam_learning_rate:g}, SGD {options.sgd_learning_rate:g}, others default",
            f"Machine:  {device}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
            f"TensorFlow {tf.__version__}, Keras {keras.__version__}",
        ]
    )


def write_report(problem: Problem, runs: list[Run], description: str, folder: Path) -> str:
    """Writes `epochs.csv`, `table.txt`, `loss.png` and `reconstructions.png`; returns what to print."""
    table = "\n".join(
        [
            description,
            "",
            format_table(table_rows(runs)),
            "",
            *(f"{run.method} {run.status}" for run in runs if run.status.startswith("failed")),
            "Losses are training losses, Keras's mean over the batches of an epoch; the held-out loss is that of the",
            "weights after the last epoch. Seconds are training time alone, the first epoch's tracing and compiling",
            "included; seconds per epoch are the median of the epochs after the first.",
        ]
    )
    write_epochs(runs, folder / "epochs.csv")
    (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
    draw_losses(problem, runs, folder / "loss.png")
    draw_reconstructions(problem, runs, folder / "reconstructions.png")
    names = ("table.txt", "epochs.csv", "loss.png", "reconstructions.png")
    return "\n".join([table, "", "Written:", *(f"  {folder / name}" for name in names)])


def write_epochs(runs: list[Run], path: Path) -> None:
    """One row for every finished epoch of every method; `seconds` is the training time up to its end."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "epoch", "seconds", "loss"])
        for run in runs:
            for epoch, (seconds, loss) in enumerate(zip(run.seconds, run.losses, strict=True), start=1):
                writer.writerow([run.method, epoch, f"{seconds:.3f}", f"{loss:.7g}"])


def draw_losses(problem: Problem, runs: list[Run], path: Path) -> None:
    """Training loss against epochs and against seconds, with Adam's best as a dotted line."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    for panel, label in zip(panels, ("epochs", "seconds of training"), strict=True):
        for run in runs:
            if run.epochs:
                x = range(1, run.epochs + 1) if label == "epochs" else run.seconds
                marker = "o" if run.epochs < 6 else None
                panel.plot(x, run.losses, color=_COLOURS[run.method], label=run.method, lw=1.8, marker=marker, ms=4)
            if run.method == "adam" and (target := best_loss(run.losses)) is not None:
                panel.axhline(target, color=_COLOURS["adam"], ls=":", lw=1, label="Adam's best")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
        panel.yaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(_minor_label))
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(True, which="both", color="#e6e6e6", lw=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"training loss ({problem.loss.name.replace('_', ' ')})")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{problem.name.upper()} autoencoder", fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_reconstructions(problem: Problem, runs: list[Run], path: Path) -> None:
    """Held-out images in the first row, each method's reconstructions below."""
    shown = [run for run in runs if run.reconstructions is not None and np.isfinite(run.reconstructions).all()]
    columns = len(shown[0].reconstructions) if shown else 10
    rows = [("originals\n(held out)", problem.images_to_pixels(problem.test_images[:columns]))]
    rows += [(f"{run.method}\n{run.held_out_loss:.4f}", problem.to_pixels(run.reconstructions)) for run in shown]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(columns + 1.6, len(rows) * 1.05), squeeze=False, layout="constrained"
    )
    for line, (label, pixels) in zip(axes, rows, strict=True):
        for axis, image in zip(line, pixels, strict=True):
            axis.imshow(image.reshape(problem.image_shape), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _text(value: float | None, form: str) -> str:
    return _DASH if value is None else format(value, form)


def _minor_label(value: float, _position: int) -> str:
    """Labels 2 and 5 times a power of ten; a loss rarely spans a whole decade."""
    leading = value / 10 ** math.floor(math.log10(value))
    return f"{value:.3g}" if round(leading, 6) in (2, 3, 5, 7) else ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
