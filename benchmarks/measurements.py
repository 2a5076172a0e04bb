"""Measurements as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def write(rows: Sequence[Any], path: Path) -> None:
    """Writes instances of one dataclass, a line each, numbers to six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for one in rows:
            values = asdict(one).items()
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values})
