"""The ablation: tables of cases, and sentences that follow from their numbers, whatever these are. Nothing is drawn.

A row's label is "aspect: case", and its options name the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from contestants import METHODS
from evidence import (
    Setting,
    Spread,
    in_order,
    measure,
    measured,
    setting_of,
    settings_in_order,
    title_of,
)
from plans import DEFAULTS, refreshes_within
from runs import Row, best_loss
from tables import DASH, ranged

ONE_TERM = {"deflation": "kpsvd", "lanczos": "kpsvd", "kfac_corrected": "kfac"}  # what has the first term alone
MEASURES = (("loss", "lowest training loss", ".4g"), ("held_out_loss", "lowest held-out loss", ".4g"))
SECONDS = (
    ("epoch_seconds", "seconds of the median epoch after the first", ".3g"),
    ("first_epoch_seconds", "seconds of the first epoch, tracing included", ".3g"),
)
WITHIN = "within the seeds' spread"


@dataclass(frozen=True)
class Case:
    """One method under one case of an aspect: its rows by seed, and `evidence.measure` of them."""

    setting: Setting
    aspect: str
    case: str
    method: str
    rows: dict[int, Row]
    measures: dict[str, Spread]

    def count(self, status: str) -> int:
        """Seeds that ended so."""
        return sum(row["status"] == status for row in self.rows.values())


def split_label(label: str) -> tuple[str, str]:
    """The aspect and the case of a label."""
    aspect, _, case = label.partition(": ")
    return aspect, case


def cases_of(rows: Iterable[Row], planned: Iterable[dict[str, Any]] | None = None) -> list[Case]:
    """The cases of the study "ablation": in the order of the plan, or of the rows where there is none."""
    rows = [row for row in rows if row.get("study") == "ablation"]
    labels = [run["label"] for run in planned or () if run.get("study") == "ablation"]
    labels = in_order((row["label"] for row in rows), dict.fromkeys(labels))
    cases = []
    for setting in settings_in_order(rows):
        for label in labels:
            own = [row for row in rows if row["label"] == label and setting_of(row) == setting]
            for method in in_order((row["options"]["method"] for row in own), METHODS):
                seeds = {row["seed"]: row for row in own if row["options"]["method"] == method}
                seeds = {seed: seeds[seed] for seed in sorted(seeds)}
                cases.append(Case(setting, *split_label(label), method, seeds, measure(seeds, {})))
    return cases


def ablation_lines(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """One line for each case and method, its numbers unrounded; None where there is none."""
    lines = []
    for case in cases:
        line = case.setting._asdict() | {"aspect": case.aspect, "case": case.case, "method": case.method}
        line |= {"seeds": len(case.rows)} | {status: case.count(status) for status in ("diverged", "failed")}
        for name in ("loss", "held_out_loss", "held_out_accuracy", "seconds", "epoch_seconds", "first_epoch_seconds"):
            line |= case.measures[name].columns(name)
        lines.append(line)
    return lines


def table_of(cases: Sequence[Case], name: str, form: str) -> list[list[str]]:
    """Methods by cases of one setting and aspect: median and range of a measure, and the seeds that went wrong."""
    columns = list(dict.fromkeys(case.case for case in cases))
    by_place = {(case.method, case.case): case for case in cases}
    cells = [["method", *columns]]
    for method in in_order((case.method for case in cases), METHODS):
        cells.append([method, *(_cell(by_place.get((method, column)), name, form) for column in columns)])
    return cells


def _cell(case: Case | None, name: str, form: str) -> str:
    if case is None:
        return DASH
    counts = {status: case.count(status) for status in ("diverged", "failed")}
    bad = [f"{count} of {len(case.rows)} {status}" for status, count in counts.items() if count]
    return ", ".join([ranged(case.measures[name].columns("x"), "x", form), *bad])


@dataclass(frozen=True)
class Change:
    """What one case changes against another: the median over the seeds of both of the ratio, minus 1.

    Attributes:
        who: its name in a sentence.
        size: the change; infinite where only the other has a value.
        within: whether the ranges over these seeds overlap; None with a single seed, which has no range.
    """

    who: str
    size: float
    within: bool | None

    def __str__(self) -> str:
        if math.isinf(self.size):
            size = "no loss at all"
        elif self.size > 1:
            size = f"a factor of {1 + self.size:.3g}"
        else:
            size = f"{100 * self.size:+.1f} %".replace("-", "−")
        return f"{size} ({self.who}{f', {WITHIN}' if self.within else ''})"


def change(own: Case | None, other: Case | None, who: str, name: str = "loss") -> Change | None:
    """The change of `name` ("loss" or "epoch_seconds") from `other` to `own`; None where no seed has both."""
    if own is None or other is None:
        return None
    value = _epoch if name == "epoch_seconds" else _lowest
    others = {row["seed"]: value(row) for row in measured(other.rows)}
    pairs = [(value(row), others[row["seed"]]) for row in measured(own.rows) if others.get(row["seed"], 0)]
    pairs = [pair for pair in pairs if math.isfinite(pair[1]) and (name == "loss" or math.isfinite(pair[0]))]
    if not pairs:
        return None
    mine, theirs = (Spread(values) for values in zip(*pairs, strict=True))
    size = median(a / b for a, b in pairs) - 1
    within = mine.low <= theirs.high and theirs.low <= mine.high and math.isfinite(size)
    return Change(who, size, within if len(pairs) > 1 else None)


def _lowest(row: Row) -> float:
    loss = best_loss(row["losses"])
    return math.inf if loss is None else loss


def _epoch(row: Row) -> float:
    """Seconds of the median epoch after the first, which is mostly tracing."""
    seconds = row["seconds"][1:]
    return median(seconds) if seconds and row["status"] == "finished" else math.inf


def sentences(cases: Sequence[Case]) -> list[str]:
    """What the numbers say, a few sentences for each setting and aspect."""
    settings = list(dict.fromkeys(case.setting for case in cases))
    result = []
    for setting in settings:
        for aspect in dict.fromkeys(case.aspect for case in cases if case.setting == setting):
            own = [case for case in cases if (case.setting, case.aspect) == (setting, aspect)]
            start = f"On {title_of(setting, settings)}, {aspect}: "
            result += [start + sentence for sentence in aspect_sentences(own)]
    return result


def aspect_sentences(cases: Sequence[Case]) -> list[str]:
    """The sentences of one setting and aspect, without the words that name these."""
    aspect = cases[0].aspect
    found = _refresh_sentences(cases) + _same_sentences(cases)
    found += damping_sentences(cases) if aspect == "damping" else _case_sentences(cases)
    found += _second_term_sentences(cases) if aspect not in ("damping", "indefinite") else []
    for status in ("diverged", "failed"):
        bad = [
            f'{case.method} with "{case.case}" on {case.count(status)} of {len(case.rows)} seeds'
            for case in cases
            if case.count(status)
        ]
        found += [f"{status}: {', '.join(bad)}."] if bad else []
    return found


def _finder(cases: Iterable[Case]) -> Callable[[str, str], Case | None]:
    places = {(case.method, case.case): case for case in cases}
    return lambda method, case: places.get((method, case))


def _listed(changes: Iterable[Change | None]) -> str:
    return ", ".join(map(str, filter(None, changes)))


def _alone(changes: Iterable[Change | None]) -> str:
    single = any(c is not None and c.within is None for c in changes)
    return " One seed has no spread: such changes may be chance." if single else ""


# How often the curvature is refreshed, and cases that are one training


def refreshes(case: Case) -> tuple[int, int] | None:
    """Steps of a whole run, and how many of them refresh the curvature; None where the samples are not known."""
    if case.setting.samples is None or not case.rows:
        return None
    options = next(iter(case.rows.values()))["options"]
    interval = options.get("curvature_interval", DEFAULTS["curvature_interval"])
    steps = case.setting.epochs * math.ceil(case.setting.samples / case.setting.batch)
    return steps, refreshes_within(steps, interval)


def _refresh_sentences(cases: Sequence[Case]) -> list[str]:
    """How often each case refreshes, where they differ."""
    counts = {case.case: refreshes(case) for case in cases}
    if None in counts.values() or len(set(counts.values())) < 2:
        return []
    steps = next(iter(counts.values()))[0]
    listed = ", ".join(f'{number} with "{name}"' for name, (_, number) in counts.items())
    return [f"of the {steps} steps of a run these refresh the curvature: {listed}."]


def same_training(cases: Iterable[Case]) -> dict[tuple[str, str], str]:
    """By method and case: an earlier case whose losses are equal in every epoch of every seed."""
    first: dict[tuple, str] = {}
    found = {}
    for case in cases:
        series = [(seed, *row["losses"], *row["held_out_losses"]) for seed, row in case.rows.items() if row["losses"]]
        if series:
            earlier = first.setdefault((case.method, tuple(series)), case.case)
            if earlier != case.case:
                found[case.method, case.case] = earlier
    return found


def _same_sentences(cases: Sequence[Case]) -> list[str]:
    pairs: dict[tuple[str, str], list[str]] = {}
    for (method, name), earlier in same_training(cases).items():
        pairs.setdefault((name, earlier), []).append(method)
    return [
        f'"{name}" and "{earlier}" are the same training for {", ".join(methods)}: every loss is equal, and there is '
        "nothing to compare."
        for (name, earlier), methods in pairs.items()
    ]


# One case against the first


def _case_sentences(cases: Sequence[Case]) -> list[str]:
    """Each case against the first: what it does to the loss and the seconds of every method."""
    names = list(dict.fromkeys(case.case for case in cases))
    find, same = _finder(cases), same_training(cases)
    result = []
    for name in names[1:]:
        methods = [m for m in in_order((case.method for case in cases), METHODS) if (m, name) not in same]
        losses = [change(find(m, name), find(m, names[0]), m) for m in methods]
        seconds = [change(find(m, name), find(m, names[0]), m, "epoch_seconds") for m in methods]
        if any(losses):
            result.append(
                f'"{name}" against "{names[0]}" changes the lowest training loss by {_listed(losses)}, and the seconds '
                f"of an epoch after the first by {_listed(seconds) or DASH}; {_balance(losses)}.{_alone(losses)}"
            )
    return result


def _balance(changes: Iterable[Change | None]) -> str:
    """Whose loss it lowers and whose it raises, beyond the seeds' spread or on one seed."""
    changes = [c for c in changes if c is not None]
    found = []
    for single, where in ((False, "beyond the seeds' spread"), (True, "on one seed")):
        group = [c for c in changes if (c.within is None) == single]
        verbs = (
            ("lowers", [c.who for c in group if c.size < 0 and not c.within]),
            ("raises", [c.who for c in group if c.size > 0 and not c.within]),
        )
        parts = [f"it {verb} that of {', '.join(who)}" for verb, who in verbs if who]
        if group:
            found.append(f"{where} {' and '.join(parts) or 'no loss changes'}")
    return "; ".join(found)


def _second_term_sentences(cases: Sequence[Case]) -> list[str]:
    """What the second term does to the loss under each case."""
    names, find = list(dict.fromkeys(case.case for case in cases)), _finder(cases)
    same, result = same_training(cases), []
    for two, one in ONE_TERM.items():
        own = [name for name in names if not {(two, name), (one, name)} <= same.keys()]
        changes = [change(find(two, name), find(one, name), f'"{name}"') for name in own]
        if any(changes):
            result.append(
                f"the second term ({two} against {one}) changes the lowest training loss by {_listed(changes)}; "
                f"{_helps(changes)}.{_alone(changes)}"
            )
    return result


def _helps(changes: Iterable[Change | None]) -> str:
    changes = [c for c in changes if c is not None]
    found = []
    for single, where in ((False, "beyond the seeds' spread"), (True, "on one seed")):
        group = [c for c in changes if (c.within is None) == single]
        lower, higher = (sum(sign * c.size > 0 and not c.within for c in group) for sign in (-1, 1))
        if group:
            cases = f"{len(group)} case{'s' if len(group) > 1 else ''}"
            found.append(f"{where} it lowers it in {lower} and raises it in {higher} of {cases}")
    return "; ".join(found)


# Damping: the rule against the second term


def damping_sentences(cases: Sequence[Case]) -> list[str]:
    """For each way to choose λ and each pair of methods: does the damping rule matter more, or the second term?

    A case is "rule, λ". The paper's code adds √λ to each factor of one-term methods and λ to those of two-term ones,
    so that its comparison changes both at once.
    """
    find = _finder(cases)
    split = [tuple(case.case.partition(", ")[::2]) for case in cases]
    rules, lambdas = (in_order((pair[k] for pair in split), known) for k, known in ((0, ("sqrt", "factor")), (1, ())))
    result = []
    for choice in lambdas:
        for two, one in ONE_TERM.items():
            result += _rule_or_term(find, two, one, rules, choice)
        if lambdas.index(choice):
            result += _fixed_or_adaptive(cases, rules, choice, lambdas[0])
    return result


def _rule_or_term(
    find: Callable[[str, str], Case | None], two: str, one: str, rules: Sequence[str], choice: str
) -> list[str]:
    terms = [change(find(two, f"{rule}, {choice}"), find(one, f"{rule}, {choice}"), rule) for rule in rules]
    others = [
        change(find(method, f"{rule}, {choice}"), find(method, f"{rules[0]}, {choice}"), method)
        for rule in rules[1:]
        for method in (one, two)
    ]
    if not any(terms):
        return []
    text = (
        f"with {choice}, the second term ({two} against {one}) changes the lowest training loss by {_listed(terms)} "
        "at equal damping rule"
    )
    if not any(others):
        return [f"{text}; {_helps(terms)}.{_alone(terms)}"]
    text += f"; the rule {rules[1]} instead of {rules[0]} changes it by {_listed(others)}: {_larger(terms, others)}."
    both = change(find(two, f"factor, {choice}"), find(one, f"sqrt, {choice}"), f"{two} with factor, {one} with sqrt")
    if both is not None:
        text += f" Both at once, as in the published code: {both}."
    return [text + _alone([*terms, *others])]


def _larger(terms: Iterable[Change | None], rules: Iterable[Change | None]) -> str:
    """Which of the two moves the loss by the larger factor, counting what is not within the seeds' spread."""
    terms, rules = list(terms), list(rules)
    if any(c and math.isinf(c.size) for c in (*terms, *rules)):
        return "without a loss these cannot be weighed"
    clear = [[c.size for c in some if c and not c.within] for some in (terms, rules)]
    term, rule = (max((abs(math.log1p(size)) for size in sizes), default=0.0) for sizes in clear)
    if any(c and c.within is None for c in (*terms, *rules)):
        if term == rule:
            return "on one seed neither moves it more"
        return f"on one seed {'the second term' if term > rule else 'the damping rule'} moves it more"
    if term == rule == 0:
        return "neither moves it beyond the seeds' spread"
    if term == rule:
        return "both matter as much"
    return "the second term matters more" if term > rule else "the damping rule matters more"


def _fixed_or_adaptive(cases: Sequence[Case], rules: Sequence[str], choice: str, first: str) -> list[str]:
    find, methods = _finder(cases), in_order((case.method for case in cases), METHODS)
    changes = [
        change(find(method, f"{rule}, {choice}"), find(method, f"{rule}, {first}"), f"{method} with {rule}")
        for method in methods
        for rule in rules
    ]
    if not any(changes):
        return []
    text = f"{choice} against {first} changes the lowest training loss by {_listed(changes)}; {_balance(changes)}."
    return [text + _alone(changes)]
