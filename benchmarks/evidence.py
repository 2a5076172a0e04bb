"""What finished training runs say: arithmetic from rows, as `runs.py` writes them. Nothing is drawn or laid out here.

A row that failed (the run crashed) is counted and not measured. One that diverged is measured up to where it did.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from contestants import CONTESTANTS
from problems import PROBLEMS
from races import race
from runs import SEARCH_SEED, Row, best_loss, best_options

CONDITIONS = ("device", "jobs", "threads")
REFERENCES = ("adam", "kfac")  # whose lowest losses are the finish lines


class Setting(NamedTuple):
    """What is trained: only rows of one setting are compared."""

    problem: str
    batch: int
    samples: int | None
    epochs: int


def setting_of(row: Row) -> Setting:
    """The setting of a row or a planned run; where it leaves the samples open, they are the problem's own number."""
    samples = row.get("samples")
    if samples is None and row["problem"] in PROBLEMS:
        samples = PROBLEMS[row["problem"]].samples
    return Setting(row["problem"], row["batch"], samples, row["epochs"])


def settings_in_order(rows: Iterable[Row]) -> list[Setting]:
    """The settings of rows, in the order of `PROBLEMS`."""
    names = list(PROBLEMS)

    def place(setting: Setting) -> tuple:
        known = setting.problem in names
        return names.index(setting.problem) if known else len(names), setting[:2], setting.samples or 0, setting.epochs

    return sorted({setting_of(row) for row in rows}, key=place)


def title_of(setting: Setting, settings: Iterable[Setting]) -> str:
    """The problem's name, with what tells the setting from others of that problem among `settings`."""
    others = [other for other in settings if other.problem == setting.problem]
    parts = [
        f"{name} {value}"
        for k, (name, value) in enumerate(setting._asdict().items())
        if k and len({other[k] for other in others}) > 1
    ]
    return ", ".join([setting.problem, *parts])


@dataclass(frozen=True)
class Spread:
    """Values over seeds, infinite where the seed never got there: their median and range."""

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """None counts as never."""
        return cls(tuple(math.inf if value is None else value for value in values))

    @property
    def median(self) -> float | None:
        """None where it is infinite, or there is no value."""
        middle = median(self.values) if self.values else math.inf
        return middle if math.isfinite(middle) else None

    @property
    def low(self) -> float:
        """The lowest value; infinite where there is none."""
        return min(self.values, default=math.inf)

    @property
    def high(self) -> float:
        """The highest value; infinite where one seed never got there."""
        return max(self.values, default=math.inf)

    @property
    def finite(self) -> tuple[float, ...]:
        """The values of the seeds that got there."""
        return tuple(value for value in self.values if math.isfinite(value))

    def columns(self, name: str) -> dict[str, float | None]:
        """Median and range of the finite values, as cells of a table."""
        low, high = min(self.finite, default=None), max(self.finite, default=None)
        return {name: self.median, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True)
class Standing:
    """An optimizer on one setting, at the options with the lowest training loss on `SEARCH_SEED`.

    Attributes:
        setting, label: which.
        options: the chosen ones; None where none of its grid finished.
        rows: at these options, by seed.
        tried, tried_badly: settings of its grid with a row, and how many of them diverged or failed.
        measures: `Spread`s over the seeds, by name; see `measure`.
        flags: what to know about the seconds.
    """

    setting: Setting
    label: str
    options: dict[str, Any] | None
    rows: dict[int, Row]
    tried: int
    tried_badly: int
    measures: dict[str, Spread] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def count(self, status: str) -> int:
        """Seeds that ended so."""
        return sum(row["status"] == status for row in self.rows.values())


def comparison(rows: Iterable[Row]) -> list[Standing]:
    """The standings of the study "comparison": settings in the order of `PROBLEMS`, labels in that of `CONTESTANTS`."""
    rows = [row for row in rows if row.get("study") == "comparison"]
    standings = []
    for setting in settings_in_order(rows):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if setting_of(row) == setting:
                groups.setdefault(row["label"], []).append(row)
        choices = {label: best_options(own) for label, own in groups.items()}
        chosen = {
            label: {row["seed"]: row for row in sorted(own, key=lambda row: row["seed"]) if row["options"] == options}
            for label, own in groups.items()
            for options in [choices[label]]
        }
        for label in in_order(groups, CONTESTANTS):
            searched = [row for row in groups[label] if row["seed"] == SEARCH_SEED]
            seeds, adam = chosen[label], chosen.get("adam", {})
            standings.append(
                Standing(
                    setting,
                    label,
                    choices[label],
                    seeds,
                    len(searched),
                    sum(row["status"] != "finished" for row in searched),
                    measure(seeds, {name: chosen.get(name, {}) for name in REFERENCES}),
                    tuple(_flags(seeds, adam)),
                )
            )
    return standings


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names without repetition, the known ones first and in their order."""
    names, known = list(dict.fromkeys(names)), list(known)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def measured(seeds: dict[int, Row]) -> list[Row]:
    """The rows that did not fail, by seed."""
    return [seeds[seed] for seed in sorted(seeds) if seeds[seed]["status"] != "failed"]


def measure(seeds: dict[int, Row], references: dict[str, dict[int, Row]]) -> dict[str, Spread]:
    """Spreads over the seeds of one optimizer.

    Args:
        seeds: its rows.
        references: rows by seed of those whose lowest training loss on the same seed is a finish line, "adam" among
            them.

    Returns:
        "loss", "held_out_loss": the lowest. "held_out_accuracy": at the end. "seconds": of all epochs, where
            the run finished. "epoch_seconds": of the median epoch without the first; "first_epoch_seconds".
        "epochs_to_adam", "seconds_to_adam" (from the start, the first epoch and its tracing included), and so for each
            reference.
        "loss_ratio", "epochs_ratio", "seconds_ratio", "epoch_cost": against Adam on the same seed.
    """
    rows = measured(seeds)
    accuracies = [row["held_out_accuracies"][-1] for row in rows if row["held_out_accuracies"]]
    result = {
        "loss": Spread.of(best_loss(row["losses"]) for row in rows),
        "held_out_loss": Spread.of(best_loss(row["held_out_losses"]) for row in rows),
        "held_out_accuracy": Spread.of(value for value in accuracies if value is not None),
        "seconds": Spread.of(sum(row["seconds"]) for row in rows if row["status"] == "finished"),
        "epoch_seconds": Spread.of(median(row["seconds"][1:]) for row in rows if len(row["seconds"]) > 1),
        "first_epoch_seconds": Spread.of(row["seconds"][0] for row in rows if row["seconds"]),
    }
    for name, others in references.items():
        races = [race(own, other) for own, other in _pairs(seeds, others)]
        for unit in ("epochs", "seconds"):
            result[f"{unit}_to_{name}"] = Spread.of(race[unit] for race in races)
        if name == "adam":
            result["loss_ratio"] = Spread.of(
                None if best_loss(own["losses"]) is None else best_loss(own["losses"]) / best_loss(other["losses"])
                for own, other in _pairs(seeds, others)
            )
            for unit in ("epochs", "seconds"):
                result[f"{unit}_ratio"] = Spread.of(race[f"{unit}_ratio"] for race in races)
            costs = [race["epoch_seconds_ratio"] for race in races]
            result["epoch_cost"] = Spread.of(cost for cost in costs if cost is not None)
    return result


def _pairs(seeds: dict[int, Row], others: dict[int, Row]) -> list[tuple[Row, Row]]:
    """Rows of the same seed, where neither failed and the other has a loss."""
    rows = {row["seed"]: row for row in measured(others) if best_loss(row["losses"]) is not None}
    return [(row, rows[row["seed"]]) for row in measured(seeds) if row["seed"] in rows]


def _flags(seeds: dict[int, Row], adam: dict[int, Row]) -> list[str]:
    pairs = _pairs(seeds, adam)
    flags = [] if pairs or not seeds else ["no Adam on the same seeds"]
    if len({condition(row) for pair in pairs for row in pair}) > 1:
        flags.append("timed under other conditions than Adam")
    return flags


# How many runs, and where


def condition(row: Row) -> tuple:
    """Device, runs at a time and threads: seconds are compared where these are equal."""
    return tuple(row.get(name) for name in CONDITIONS)


_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _word(count: int) -> str:
    return _WORDS[count] if 0 <= count < len(_WORDS) else str(count)


def describe_condition(where: tuple) -> str:
    """A `condition` in words."""
    device, jobs, threads = where
    parts = [device or "device unknown"]
    if jobs is not None:
        parts.append(f"{_word(jobs)} run{'s' * (jobs > 1)} at a time")
    if threads is not None:
        parts.append(f"{_word(threads)} thread{'s' * (threads > 1)} each")
    return ", ".join(parts)


def conditions(rows: Iterable[Row]) -> list[str]:
    """One line where all rows ran under the same conditions; else a line for each, and a warning before them."""
    rows, groups = list(rows), {}
    several = len({(row.get("study"), row.get("problem")) for row in rows}) > 1
    for row in rows:
        who = f"{row['study']} on {row['problem']}" if several else row["label"]
        groups.setdefault(condition(row), []).append(who)
    if len(groups) < 2:
        return [f"Seconds: {describe_condition(where)}." for where in groups]
    lines = ["Conditions differ between these runs, and their seconds cannot be compared:"]
    return lines + [f"{describe_condition(where)}: {', '.join(dict.fromkeys(who))}." for where, who in groups.items()]


def _group(row: Row) -> tuple:
    method = (row["options"] or {}).get("method") if row.get("study") == "ablation" else None
    return row.get("study"), setting_of(row), row["label"], method, row["seed"]


def stands_on(rows: Iterable[Row], planned: Iterable[dict[str, Any]] | None) -> str:
    """A sentence: on how many runs a table stands, of how many planned, and how many of them went wrong."""
    rows = list(rows)
    if planned is None:
        text = f"Stands on {len(rows)} run{'s' * (len(rows) != 1)}"
    else:
        wanted, made = Counter(map(_group, planned)), Counter(map(_group, rows))
        text = f"Stands on {sum((made & wanted).values())} of {sum(wanted.values())} planned runs"
        if others := sum((made - wanted).values()):
            text += f" and {others} not planned"
    bad = [(status, sum(row["status"] == status for row in rows)) for status in ("diverged", "failed")]
    return text + "".join(f"; {count} {status}" for status, count in bad if count) + "."


# Lines of tables


def summarise(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """One line for each optimizer on each setting, its numbers unrounded; None where there is none."""
    lines = []
    for standing in standings:
        line = standing.setting._asdict() | {
            "label": standing.label,
            "options": None if standing.options is None else json.dumps(standing.options, sort_keys=True),
            "tried": standing.tried,
            "tried_badly": standing.tried_badly,
            "seeds": len(standing.rows),
            "diverged": standing.count("diverged"),
            "failed": standing.count("failed"),
        }
        for name, spread in standing.measures.items():
            line |= spread.columns(name)
            if "_to_" in name and name.startswith("epochs"):
                line["reached_" + name.rpartition("_")[2]] = f"{len(spread.finite)}/{len(spread.values)}"
        lines.append(line | {"flags": "; ".join(standing.flags)})
    return lines


def per_epoch(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """One line for each epoch of each optimizer: medians and ranges over the seeds that came so far."""
    lines = []
    for standing in standings:
        rows = measured(standing.rows)
        for epoch in range(max((len(row["losses"]) for row in rows), default=0)):
            here = [row for row in rows if len(row["losses"]) > epoch and row["losses"][epoch] is not None]
            held_out = [row["held_out_losses"][epoch] for row in here]
            if here:
                lines.append(
                    standing.setting._asdict()
                    | {"epochs": standing.setting.epochs, "label": standing.label, "epoch": epoch + 1}
                    | {"seeds": len(here)}
                    | Spread.of(row["losses"][epoch] for row in here).columns("loss")
                    | Spread.of(held_out).columns("held_out_loss")
                    | {"seconds": median(sum(row["seconds"][: epoch + 1]) for row in here)}
                )
    return lines
