"""Races against Adam: what finished runs say of KPSVD and of Adam at its best rate. `race_table` prints it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from problems import PROBLEMS
from runs import SEARCH_SEED, Key, Row, best_loss, best_options

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # Adam's
UNITS = ("epochs", "seconds", "epoch_seconds", "late_epoch_seconds")
_CONDITIONS = ("device", "jobs", "threads")
_HELD_OUT = {"held_out_loss": "held_out_losses", "held_out_accuracy": "held_out_accuracies"}
_EQUAL_TIME = ["equal_time", *(f"{whose}{name}_equal_time" for whose in ("", "adams_") for name in _HELD_OUT)]
_RANGES = ("epochs", "epochs_ratio", "seconds_ratio", *_EQUAL_TIME)


def summarise(rows: dict[Key, Row]) -> list[dict[str, Any]]:
    """One line for each optimizer on each problem, batch size and number of epochs, Adam's first.

    Runs of a number of epochs in which Adam has none are held against the shortest of Adam's that are longer.
    """
    groups = _grouped(rows.values())
    lines = []
    for group, adam, rival, others in _pairings(groups):
        start = dict(zip(("problem", "batch", "epochs"), group, strict=True))
        if adam:
            lines.append(start | _line(adam, adam) | {"flags": "; ".join(_adam_flags(groups[group], adam))})
        lines += [start | _line(seeds, rival) for seeds in others]
    return lines


def races(rows: Iterable[Row], label: str = "kpsvd") -> dict[str, tuple[list[Row], list[Row]]]:
    """What `figures.draw_race` draws: of each problem and batch size Adam's runs at its best rate, and KPSVD's.

    Args:
        rows: of the results.
        label: KPSVD's name in them.
    """
    found = {}
    for (problem, batch, _), _, rival, others in _pairings(_grouped(rows)):
        own = [seeds for seeds in others if next(iter(seeds.values()))["label"] == label]
        if rival and own:
            found[f"{problem}, batch {batch}"] = (list(rival.values()), list(own[0].values()))
    return found


def _grouped(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["batch"], row["epochs"]), []).append(row)
    return groups


def _pairings(groups: dict[tuple, list[Row]]) -> Iterator[tuple]:
    """Of each group, in the order of `PROBLEMS`: Adam's rows by seed, those that the others race, and the others."""
    adams = {group: _by_optimizer(rows)[0] for group, rows in groups.items()}
    names = list(PROBLEMS)
    order = sorted(groups, key=lambda group: (names.index(group[0]) if group[0] in names else len(names), group))
    for group in order:
        adam, others = _by_optimizer(groups[group])
        longer = [other for other in adams if adams[other] and other[:2] == group[:2] and other[2] > group[2]]
        yield group, adam, adam or (adams[min(longer)] if longer else {}), others


def _by_optimizer(rows: list[Row]) -> tuple[dict[int, Row], list[dict[int, Row]]]:
    """Adam's rows at its best rate by seed, and those of every other label and set of options."""
    adams = [row for row in rows if row["optimizer"] == "adam"]
    best = best_options(adams)
    adam = {row["seed"]: row for row in adams if row["options"] == best}
    others: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        if row["optimizer"] != "adam":
            key = (row["label"], json.dumps(row["options"], sort_keys=True))
            others.setdefault(key, {})[row["seed"]] = row
    return adam, [others[key] for key in sorted(others)]


def _adam_flags(rows: list[Row], adam: dict[int, Row]) -> list[str]:
    tried = {
        row["options"]["learning_rate"] for row in rows if row["optimizer"] == "adam" and row["seed"] == SEARCH_SEED
    }
    rate = next(iter(adam.values()))["options"]["learning_rate"]
    flags = _bad_ends(adam)
    if len(tried) < len(RATES):
        flags.append(f"{len(tried)} of {len(RATES)} rates tried")
    elif rate in (min(RATES), max(RATES)):
        flags.append("best rate at the edge")
    return flags


def _bad_ends(seeds: dict[int, Row]) -> list[str]:
    counts = {status: sum(row["status"] == status for row in seeds.values()) for status in ("diverged", "failed")}
    return [f"{status} {count}/{len(seeds)}" for status, count in counts.items() if count]


def _line(seeds: dict[int, Row], adam: dict[int, Row]) -> dict[str, Any]:
    """Cells of one optimizer. Medians over seeds; those against Adam over the seeds that both have."""
    rows = [seeds[seed] for seed in sorted(seeds)]
    bests = [loss for row in rows if (loss := best_loss(row["losses"])) is not None]
    shared = [
        (seeds[s], adam[s]) for s in sorted(seeds.keys() & adam.keys()) if best_loss(adam[s]["losses"]) is not None
    ]
    races = [race(own, other) for own, other in shared]
    is_adam = seeds is adam
    above = sum(race["ends_above"] for race in races)
    flags = _bad_ends(seeds)
    if not races:
        flags.append("no Adam on the same seeds")
    if above and not is_adam:
        flags.append(f"ends above Adam {above}/{len(races)}")
    if len({tuple(row.get(name) for name in _CONDITIONS) for pair in shared for row in pair}) > 1:
        flags.append("timed under other conditions than Adam")
    if any(row.get("jobs", 1) > 1 for row in rows):
        flags.append("timed beside other runs")
    return {
        "label": rows[0]["label"],
        "options": json.dumps(rows[0]["options"], sort_keys=True),
        "seeds": len(rows),
        "best_loss": median(bests) if bests else None,
        "best_loss_low": min(bests, default=None),
        "best_loss_high": max(bests, default=None),
        "reached": f"{sum(race['epochs'] is not None for race in races)}/{len(races)}",
        **{f"{unit}_to_adam": _median(race[unit] for race in races) for unit in ("epochs", "seconds")},
        **{f"{unit}_ratio": None if is_adam else _median(race[f"{unit}_ratio"] for race in races) for unit in UNITS},
        **{f"{name}_{end}": None if is_adam else at for name in _RANGES for end, at in _range(races, name).items()},
        "held_out_loss_at_goal": _median(race["held_out_loss_at_goal"] for race in races),
        **{name: _median(row[of][-1] if row[of] else None for row in rows) for name, of in _HELD_OUT.items()},
        **{name: _median(race[name] for race in races) for name in _EQUAL_TIME},
        "flags": "; ".join(flags),
    }


def race(own: Row, adam: Row) -> dict[str, Any]:
    """One run against Adam's of the same seed, whose lowest training loss is the finish.

    Returns:
        "epochs", "seconds": from the start to the first epoch at or below Adam's lowest loss, or None for never.
        "epochs_ratio", "seconds_ratio": these as parts of Adam's own. "epoch_seconds_ratio": of the median epoch
            without the first, None where a run has only one. "late_epoch_seconds_ratio": of the second half of epochs.
        "held_out_loss_at_goal": after the first epoch at or below Adam's lowest loss, or None.
        "held_out_loss_equal_time", "held_out_accuracy_equal_time": of this run and, as "adams_held_out_…", of Adam's,
            each after the last epoch that was over when the shorter of both runs was; None before the first.
        "equal_time": the seconds of the shorter run.
        "ends_above": the last training loss is above Adam's last, or not finite.
    """
    goal = best_loss(adam["losses"])
    epochs, adams = _epochs_to(own["losses"], goal), _epochs_to(adam["losses"], goal)
    seconds, adams_seconds = (
        sum(row["seconds"][:count]) if count else None for row, count in ((own, epochs), (adam, adams))
    )
    slow, fast = (median(row["seconds"][1:]) if len(row["seconds"]) > 1 else None for row in (own, adam))
    late = median(own["seconds"][len(own["seconds"]) // 2 :]) if slow else None
    end = min(sum(own["seconds"]), sum(adam["seconds"]))
    last, adams_last = (row["losses"][-1] if row["losses"] else None for row in (own, adam))
    return {
        "epochs": epochs,
        "seconds": seconds,
        "epochs_ratio": epochs / adams if epochs else None,
        "seconds_ratio": seconds / adams_seconds if epochs else None,
        "epoch_seconds_ratio": slow / fast if slow and fast else None,
        "late_epoch_seconds_ratio": late / fast if late and fast else None,
        "held_out_loss_at_goal": own["held_out_losses"][epochs - 1] if epochs else None,
        "equal_time": end,
        **_held_out("", own, end),
        **_held_out("adams_", adam, end),
        "ends_above": last is None or (adams_last is not None and last > adams_last),
    }


def _held_out(whose: str, row: Row, end: float) -> dict[str, float | None]:
    """Cells after the last epoch that was over `end` seconds after the start."""
    epochs = sum(sum(row["seconds"][: k + 1]) <= end for k in range(len(row["seconds"])))
    return {f"{whose}{name}_equal_time": row[of][epochs - 1] if epochs else None for name, of in _HELD_OUT.items()}


def _epochs_to(losses: list[float | None], goal: float) -> int | None:
    return next((epoch for epoch, loss in enumerate(losses, start=1) if loss is not None and loss <= goal), None)


def _range(races: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """The least and the largest over seeds, None standing for never."""
    values = [race[name] for race in races]
    found = [value for value in values if value is not None]
    return {"low": min(found, default=None), "high": None if None in values else max(found, default=None)}


def _median(values: Iterable[float | None]) -> float | None:
    """The median, None counting as infinity ("never", "diverged"); None where it is infinite."""
    values = [math.inf if value is None else value for value in values]
    middle = median(values) if values else math.inf
    return middle if math.isfinite(middle) else None
