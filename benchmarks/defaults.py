"""Does `KPSVD()` with its defaults beat Adam at the best of five rates, on problems that nobody tuned it for?

    python benchmarks/defaults.py run --only curves digits --seeds 0 1 2
    python benchmarks/defaults.py run --optimizers kpsvd --options '{"method": "kfac"}'
    python benchmarks/defaults.py run --only curves --epochs 200 --kpsvd-epochs 40
    python benchmarks/defaults.py table --losses losses.csv --figure race.png

`run` appends each finished run to a file of results (by default benchmarks/results/defaults.jsonl) and makes only those
that the file does not have yet, each in a process of its own. `table` compares them, and writes a CSV beside the file.

Adam trains at 3e-4, 1e-3, 3e-3, 1e-2 and 3e-2 on seed 0, and at the rate with the lowest training loss on the other
seeds. A training loss is the mean that `fit` reports for an epoch; seconds are of training alone, tracing included.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from command_line import INTERRUPTED, NOT_INSTALLED, OneLineParser, count, fail, package_is_missing
from execution import execute, missing
from problems import PROBLEMS
from runs import SEARCH_SEED, Key, Results, Row, Run, best_loss, best_options, cores

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OPTIMIZERS = ("adam", "kpsvd")
RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
_DASH = "–"


def make_plan(
    problems: Iterable[str],
    batch_sizes: Iterable[int] | None,
    seeds: Iterable[int],
    optimizers: Iterable[str] = OPTIMIZERS,
    options: dict[str, Any] | None = None,
    label: str = "kpsvd",
    epochs: int | None = None,
    kpsvd_epochs: int | None = None,
) -> list[Run]:
    """Every run of a comparison, in order: of each problem and batch size Adam's rates first, then seed by seed.

    Args:
        problems: names.
        batch_sizes: for all of them. None: each problem's own.
        seeds: of data, weights and batches. Adam's rates run on `SEARCH_SEED` whether it is among them or not.
        optimizers: "adam", "kpsvd" or both.
        options: KPSVD's arguments.
        label: KPSVD's name in the table.
        epochs: of every run. None: each problem's own.
        kpsvd_epochs: of KPSVD's. None: as many as Adam's.
    """
    plan = []
    seeds, optimizers = list(dict.fromkeys(seeds)), set(optimizers)
    for name in dict.fromkeys(problems):
        problem = PROBLEMS[name]
        for batch in dict.fromkeys(batch_sizes or problem.batch_sizes):

            def add(seed: int, optimizer: str, label: str, options: dict | None, name=name, batch=batch) -> None:
                grid = [{"learning_rate": rate} for rate in RATES] if options is None else None
                length = (kpsvd_epochs if optimizer == "kpsvd" else None) or epochs or PROBLEMS[name].epochs
                plan.append(Run(name, batch, seed, optimizer, label, options, length, grid))

            if "adam" in optimizers:
                for rate in RATES:
                    add(SEARCH_SEED, "adam", "adam", {"learning_rate": rate})
            for seed in seeds:
                if "adam" in optimizers and seed != SEARCH_SEED:
                    add(seed, "adam", "adam", None)
                if "kpsvd" in optimizers:
                    add(seed, "kpsvd", label, options or {})
    return plan


def summarise(rows: dict[Key, Row]) -> list[dict[str, Any]]:
    """One line for each optimizer on each problem, batch size and number of epochs, Adam's first; see `COLUMNS`.

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
    held_out = [("held_out_loss", "held_out_losses"), ("held_out_accuracy", "held_out_accuracies")]
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
        **{f"{unit}_ratio": None if is_adam else _median(race[f"{unit}_ratio"] for race in races) for unit in _UNITS},
        **{name: _median(row[series][-1] if row[series] else None for row in rows) for name, series in held_out},
        **{f"{name}_equal_time": _median(race[name] for race in races) for name, _ in held_out},
        "flags": "; ".join(flags),
    }


_UNITS = ("epochs", "seconds", "epoch_seconds")
_CONDITIONS = ("device", "jobs", "threads")


def race(own: Row, adam: Row) -> dict[str, Any]:
    """One run against Adam's of the same seed, whose lowest training loss is the finish.

    Returns:
        "epochs", "seconds": from the start to the first epoch at or below Adam's lowest loss, or None for never.
        "epochs_ratio", "seconds_ratio": these as parts of Adam's own. "epoch_seconds_ratio": of the median epoch
            without the first, None where a run has only one.
        "held_out_loss", "held_out_accuracy": after the last epoch that was over when all of Adam's were, or None.
        "ends_above": the last training loss is above Adam's last, or not finite.
    """
    goal = best_loss(adam["losses"])
    epochs, adams = _epochs_to(own["losses"], goal), _epochs_to(adam["losses"], goal)
    seconds, adams_seconds = (
        sum(row["seconds"][:count]) if count else None for row, count in ((own, epochs), (adam, adams))
    )
    slow, fast = (median(row["seconds"][1:]) if len(row["seconds"]) > 1 else None for row in (own, adam))
    total = sum(adam["seconds"])
    in_time = sum(sum(own["seconds"][: k + 1]) <= total for k in range(len(own["seconds"])))
    last, adams_last = (row["losses"][-1] if row["losses"] else None for row in (own, adam))
    return {
        "epochs": epochs,
        "seconds": seconds,
        "epochs_ratio": epochs / adams if epochs else None,
        "seconds_ratio": seconds / adams_seconds if epochs else None,
        "epoch_seconds_ratio": slow / fast if slow and fast else None,
        "held_out_loss": own["held_out_losses"][in_time - 1] if in_time else None,
        "held_out_accuracy": own["held_out_accuracies"][in_time - 1] if in_time else None,
        "ends_above": last is None or (adams_last is not None and last > adams_last),
    }


def _epochs_to(losses: list[float | None], goal: float) -> int | None:
    return next((epoch for epoch, loss in enumerate(losses, start=1) if loss is not None and loss <= goal), None)


def _median(values: Iterable[float | None]) -> float | None:
    """The median, None counting as infinity ("never", "diverged"); None where it is infinite."""
    values = [math.inf if value is None else value for value in values]
    middle = median(values) if values else math.inf
    return middle if math.isfinite(middle) else None


# What `table` prints: the heading in two lines, then the cell.
COLUMNS = (
    ("", "problem", lambda line: line["problem"]),
    ("", "batch", lambda line: str(line["batch"])),
    ("", "epochs", lambda line: str(line["epochs"])),
    ("", "optimizer", lambda line: _name(line)),
    ("", "seeds", lambda line: str(line["seeds"])),
    ("lowest loss", "(range)", lambda line: _range(line)),
    ("to Adam's", "reached", lambda line: line["reached"]),
    ("lowest:", "epochs", lambda line: _number(line["epochs_to_adam"], "g")),
    ("", "seconds", lambda line: _number(line["seconds_to_adam"], ".1f")),
    ("× Adam's:", "epochs", lambda line: _number(line["epochs_ratio"], ".2f")),
    ("", "seconds", lambda line: _number(line["seconds_ratio"], ".2f")),
    ("", "s/epoch", lambda line: _number(line["epoch_seconds_ratio"], ".2f")),
    ("held out:", "loss", lambda line: _number(line["held_out_loss"], ".4g")),
    ("", "accuracy", lambda line: _number(line["held_out_accuracy"], ".3f")),
    ("in Adam's time:", "loss", lambda line: _number(line["held_out_loss_equal_time"], ".4g")),
    ("", "accuracy", lambda line: _number(line["held_out_accuracy_equal_time"], ".3f")),
    ("", "flags", lambda line: line["flags"]),
)


def _name(line: dict[str, Any]) -> str:
    rate = json.loads(line["options"]).get("learning_rate")
    return f"{line['label']} {rate:g}" if line["label"] == "adam" else line["label"]


def _range(line: dict[str, Any]) -> str:
    if line["best_loss"] is None:
        return _DASH
    return "{best_loss:.4g} ({best_loss_low:.4g}{dash}{best_loss_high:.4g})".format(**line, dash=_DASH)


def _number(value: float | None, form: str) -> str:
    return _DASH if value is None else format(value, form)


def format_table(lines: list[dict[str, Any]]) -> str:
    """Aligned text of `COLUMNS`, then `verdicts`."""
    cells = [[column[0] for column in COLUMNS], [column[1] for column in COLUMNS]]
    cells += [[column[2](line) for column in COLUMNS] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*text, "", *verdicts(lines)])


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """A sentence for each label: on how many problems it reached Adam's lowest loss in fewer epochs, and seconds."""
    counts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["label"] != "adam" and not line["reached"].endswith("/0"):
            counts.setdefault((line["label"], line["options"]), []).append(line)
    sentences = []
    for (label, options), own in counts.items():
        wins = {unit: sum((line[f"{unit}_ratio"] or math.inf) < 1 for line in own) for unit in _UNITS}
        sentences.append(
            f"{label} {options}: reaches Adam's lowest training loss sooner in {wins['epochs']} of {len(own)} "
            f"comparisons by epochs, in {wins['seconds']} by seconds (medians over seeds)."
        )
    return sentences


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    """All numbers of the table, unrounded; nothing where the table has a dash."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


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


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected an object in JSON, got {text!r}")
    return options


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2147483647, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a wrong argument ends the program with one line that says what was wrong."""
    parser = OneLineParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that the results lack")
    table = commands.add_parser("table", help="print what the results say, and write it as CSV beside them")
    for command in (run, table):
        command.add_argument("--results", type=Path, default=RESULTS, help="file of results (default: %(default)s)")
    table.add_argument("--losses", type=Path, help="a CSV for every epoch of every run (default: none)")
    table.add_argument(
        "--figure", type=Path, help="a picture of the runs labelled 'kpsvd' against Adam's (default: none)"
    )
    run.add_argument(
        "--only", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="problems (default: all)"
    )
    run.add_argument("--batch-sizes", nargs="+", type=count, help="default: each problem's own")
    run.add_argument("--seeds", nargs="+", type=_seed, default=[0, 1, 2], help="default: 0 1 2")
    run.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="default: both")
    run.add_argument("--options", type=_options, default={}, help="arguments of KPSVD, as JSON (default: none)")
    run.add_argument("--label", help="KPSVD's name in the table (default: made of the options)")
    run.add_argument("--epochs", type=count, help="default: each problem's own")
    run.add_argument("--kpsvd-epochs", type=count, help="of KPSVD's runs (default: as many as Adam's)")
    run.add_argument("--jobs", type=count, default=1, help="runs at a time; more than 1 spoils the seconds")
    run.add_argument("--threads", type=count, help="of each run (default: the cores, divided by --jobs)")
    run.add_argument("--again", action="store_true", help="make the runs that failed, too, once more")
    options = parser.parse_args(arguments)
    if options.command == "run":
        if options.label == "adam":
            run.error("argument --label: 'adam' is Adam's own")
        options.label = options.label or " ".join(["kpsvd", *(f"{k}={v}" for k, v in options.options.items())])
        options.threads = options.threads or max(1, cores() // options.jobs)
    return options


def run_command(options: argparse.Namespace) -> int:
    """Makes the runs that are missing; returns 1 if one of them failed, 2 if none can be made."""
    if package_is_missing():
        return fail("defaults.py", NOT_INSTALLED)
    results = _open(options.results)
    if options.again:
        results.rows = {key: row for key, row in results.rows.items() if row["status"] != "failed"}
    plan = make_plan(
        options.only,
        options.batch_sizes,
        options.seeds,
        options.optimizers,
        options.options,
        options.label,
        options.epochs,
        options.kpsvd_epochs,
    )
    left = missing(plan, results)
    print(f"{len(plan)} runs planned, {len(plan) - len(left)} of them found in {options.results}", flush=True)
    made = execute(left, results, options.jobs, options.threads)
    return int(any(row["status"] == "failed" for row in made))


def table_command(options: argparse.Namespace) -> int:
    """Prints the table and writes the CSV; returns 1 if there is no result."""
    rows = _open(options.results).rows
    lines = summarise(rows)
    if not lines:
        print(f"{options.results} holds no results", file=sys.stderr)
        return 1
    path = options.results.with_suffix(".csv")
    write_csv(lines, path)
    print(f"{format_table(lines)}\nwritten to {path}")
    if options.losses is not None:
        write_losses(rows.values(), options.losses)
        print(f"every epoch: {options.losses}")
    if options.figure is not None and (found := races(rows.values())):
        from figures import draw_race, save  # Matplotlib is wanted here only.

        save(draw_race(found, "KPSVD() against Adam at the best of five rates, a line for each seed"), options.figure)
        print(f"drawn: {options.figure}")
    return 0


def _open(path: Path) -> Results:
    results = Results(path)
    if warning := results.warning():
        print(warning, file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    try:
        arguments = parse_arguments()
        sys.exit((run_command if arguments.command == "run" else table_command)(arguments))
    except KeyboardInterrupt:
        print("\nInterrupted; finished runs are kept.", file=sys.stderr)
        sys.exit(INTERRUPTED)
