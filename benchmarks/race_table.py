"""The table of `defaults.py`: the lines that `races.summarise` makes, as text and CSV, and every epoch as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from races import UNITS
from runs import Row
from tables import number, ranges

# What `table` prints: the heading in two lines, then the cell.
COLUMNS = (
    ("", "problem", lambda line: line["problem"]),
    ("", "batch", lambda line: str(line["batch"])),
    ("", "epochs", lambda line: str(line["epochs"])),
    ("", "optimizer", lambda line: _name(line)),
    ("", "seeds", lambda line: str(line["seeds"])),
    ("lowest loss", "(range)", ranges("best_loss")),
    ("to Adam's", "reached", lambda line: line["reached"]),
    ("lowest:", "epochs", lambda line: number(line["epochs_to_adam"], "g")),
    ("", "seconds", lambda line: number(line["seconds_to_adam"], ".1f")),
    ("× Adam's:", "epochs", lambda line: number(line["epochs_ratio"], ".2f")),
    ("", "seconds", lambda line: number(line["seconds_ratio"], ".2f")),
    ("", "s/epoch", lambda line: number(line["epoch_seconds_ratio"], ".2f")),
    ("held out:", "loss", lambda line: number(line["held_out_loss"], ".4g")),
    ("", "accuracy", lambda line: number(line["held_out_accuracy"], ".3f")),
    ("in equal time:", "seconds", lambda line: number(line["equal_time"], ".1f")),
    ("", "loss", lambda line: number(line["held_out_loss_equal_time"], ".4g")),
    ("", "Adam's", lambda line: number(line["adams_held_out_loss_equal_time"], ".4g")),
    ("", "accuracy", lambda line: number(line["held_out_accuracy_equal_time"], ".3f")),
    ("", "Adam's", lambda line: number(line["adams_held_out_accuracy_equal_time"], ".3f")),
    ("", "flags", lambda line: line["flags"]),
)


def _name(line: dict[str, Any]) -> str:
    rate = json.loads(line["options"]).get("learning_rate")
    return f"{line['label']} {rate:g}" if line["label"] == "adam" else line["label"]


def format_table(lines: list[dict[str, Any]]) -> str:
    """Aligned text of `COLUMNS`, then `verdicts`."""
    cells = [[column[0] for column in COLUMNS], [column[1] for column in COLUMNS]]
    cells += [[column[2](line) for column in COLUMNS] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*text, "", *verdicts(lines)])


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """A sentence for each label: on how many problems it reached Adam's lowest loss in fewer epochs, and seconds.

    Where there are several labels, also how they stand to each other: `standings`.
    """
    counts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["label"] != "adam" and not line["reached"].endswith("/0"):
            counts.setdefault((line["label"], line["options"]), []).append(line)
    sentences = []
    for (label, options), own in counts.items():
        wins = {unit: sum((line[f"{unit}_ratio"] or math.inf) < 1 for line in own) for unit in UNITS}
        sentences.append(
            f"{label} {options}: reaches Adam's lowest training loss sooner in {wins['epochs']} of {len(own)} "
            f"comparisons by epochs, in {wins['seconds']} by seconds (medians over seeds)."
        )
    return sentences + (standings(list(counts.values())) if len(counts) > 1 else [])


def standings(labels: list[list[dict[str, Any]]]) -> list[str]:
    """A sentence for each label: how its median seconds to Adam's lowest loss stand to those of the fastest label.

    Args:
        labels: the lines of each. Comparisons count that all of them have; the mean is geometric, over those where the
            label reached that loss in the median.
    """
    seconds = [{(line["problem"], line["batch"]): line["seconds_to_adam"] for line in own} for own in labels]
    shared = [where for where in seconds[0] if all(where in own for own in seconds)]
    least = {
        where: min(times) for where in shared if (times := [s for own in seconds if (s := own[where]) is not None])
    }
    sentences = []
    for own, lines in zip(seconds, labels, strict=True):
        ratios = [own[where] / least[where] for where in least if own[where] is not None]
        mean = f"{math.exp(math.fsum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else "–"
        counts = [tuple(map(int, line["reached"].split("/"))) for line in lines]
        reached, runs = (sum(count[k] for count in counts) for k in (0, 1))
        sentences.append(
            f"{lines[0]['label']}: {mean} times the seconds of the fastest of {len(labels)}, the fastest in "
            f"{ratios.count(1.0)} of {len(least)} comparisons; {reached} of {runs} runs reached Adam's lowest loss."
        )
    return sentences


def write_losses(rows: Iterable[Row], path: Path) -> None:
    """Every epoch of every run: losses and seconds, as they are in the rows."""
    named = ("problem", "batch", "seed", "label", "options")
    series = {"loss": "losses", "held_out_loss": "held_out_losses", "seconds": "seconds"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*named, "epoch", *series])
        for row in rows:
            start = [json.dumps(row[name], sort_keys=True) if name == "options" else row[name] for name in named]
            for epoch, values in enumerate(zip(*(row[of] for of in series.values()), strict=True), start=1):
                writer.writerow([*start, epoch, *("" if value is None else f"{value:.6g}" for value in values)])
