"""Tables: lines, as `evidence.summarise` makes them, as cells, and these as text or Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DASH = "–"

Columns = Sequence[tuple[str, Callable[[dict[str, Any]], str]]]


def number(value: float | None, form: str = ".4g") -> str:
    """The number, or a dash."""
    return DASH if value is None else format(value, form)


def ranged(line: dict[str, Any], name: str, form: str = ".4g") -> str:
    """Median and, where it has more than one value, range of a measure: "0.07 (0.06–0.08)"."""
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    text = number(line[name], form)
    return text if low is None or low == high else f"{text} ({low:{form}}{DASH}{high:{form}})"


def ranges(name: str, form: str = ".4g") -> Callable[[dict[str, Any]], str]:
    """A column of `ranged`."""
    return lambda line: ranged(line, name, form)


def options_in_words(line: dict[str, Any]) -> str:
    """The chosen options, without the method, which the label names."""
    if line["options"] is None:
        return DASH
    return in_words(json.loads(line["options"]))


def in_words(options: Mapping[str, Any]) -> str:
    """Arguments of an optimizer, without the method, which the label names."""
    parts = [
        f"{name}={value:g}" if isinstance(value, int | float) else f"{name}={value}"
        for name, value in options.items()
        if name != "method"
    ]
    return ", ".join(parts) or "defaults"


def _ends(line: dict[str, Any]) -> str:
    """Seeds, and how many of them went wrong; of the search where none was chosen."""
    if line["options"] is None:
        return f"none of {line['tried']} settings finished"
    bad = [f"{line[status]} {status}" for status in ("diverged", "failed") if line[status]]
    return ", ".join([str(line["seeds"]), *bad])


def _to(name: str, unit: str, form: str) -> Callable[[dict[str, Any]], str]:
    return ranges(f"{unit}_to_{name}", form)


SUMMARY: Columns = (
    ("optimizer", lambda line: line["label"]),
    ("options", options_in_words),
    ("seeds", _ends),
    ("lowest loss", ranges("loss")),
    ("held-out loss", ranges("held_out_loss")),
    ("accuracy", ranges("held_out_accuracy", ".3f")),
    ("reached Adam", lambda line: line["reached_adam"]),
    ("epochs to Adam's", _to("adam", "epochs", "g")),
    ("seconds to Adam's", _to("adam", "seconds", ".1f")),
    ("× Adam's epochs", ranges("epochs_ratio", ".2f")),
    ("× Adam's seconds", ranges("seconds_ratio", ".2f")),
    ("reached KFAC", lambda line: line["reached_kfac"]),
    ("epochs to KFAC's", _to("kfac", "epochs", "g")),
    ("seconds to KFAC's", _to("kfac", "seconds", ".1f")),
    ("epoch, × Adam's", ranges("epoch_cost", ".2f")),
    ("first epoch, s", ranges("first_epoch_seconds", ".1f")),
    ("notes", lambda line: line["flags"]),
)


def cells_of(lines: Iterable[dict[str, Any]], columns: Columns) -> list[list[str]]:
    """The heading and a row for each line."""
    return [[heading for heading, _ in columns], *([cell(line) for _, cell in columns] for line in lines)]


def as_text(cells: list[list[str]]) -> str:
    """Aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def as_markdown(cells: list[list[str]]) -> str:
    """GitHub's table, the first row a heading."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([rows[0], "|" + "---|" * len(cells[0]), *rows[1:]])


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    """All numbers of the table, unrounded; nothing where the table has a dash."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
