"""The paper's results, and ours beside them, claim by claim.

Ours train on far fewer images and for far fewer epochs: losses cannot be compared in absolute terms, their order can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evidence import Setting, Spread, Standing, summarise, title_of
from tables import Columns, number, ranged, ranges

SOURCE = (
    "Koroko et al., Efficient approximations of the Fisher matrix in neural networks using Kronecker product singular "
    "value decomposition, ESAIM: ProcS 73 (2023), arXiv:2201.10285: the authors' published result files, on their GPU"
)
NOTES = (
    "Our networks train on far fewer images and, but for `--paper`, for fewer epochs than the paper's 200: losses "
    "cannot be compared in absolute terms, their order can. The paper's losses are those after 200 epochs, ours the "
    "lowest of an epoch. Seconds are of other machines.",
    "Our five methods are `KPSVD` with its defaults, but for the method and, where the options name it, λ: adaptive "
    "rate and λ, a refresh in every step at first and in every tenth later. The paper's have a fixed rate and λ, steps "
    "scaled to a KL bound of 0.01, and a refresh every 100 steps from a quarter of the batch.",
)
BATCHES = {"curves": 256, "mnist": 512, "faces": 1024}
CHANCE = (
    "Ranges over seeds that do not overlap need not mean anything: of two optimizers that are alike, those of three "
    "seeds each are apart by chance in 1 of 10 comparisons, those of two seeds in 1 of 3. One seed has no range: there "
    "the two numbers are compared, and the verdict says so. Equal numbers are a tie; the verdict is neither where no "
    "seed of both got there."
)
NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "kfac": "KFAC",
    "kpsvd": "KPSVD",
    "deflation": "Deflation",
    "lanczos": "Lanczos",
    "kfac_corrected": "KFAC-corrected",
}
METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def _by_label(*values: float, labels: tuple[str, ...] = METHODS) -> dict[str, float]:
    return dict(zip(labels, values, strict=True))


_LOSSES = ("adam", "sgd", *METHODS)
_COSTS = ("kfac", "kfac_corrected")
# Training loss after 200 epochs; epochs and seconds to Adam's lowest loss; an epoch's cost against Adam's.
PAPER: dict[str, dict[str, dict[str, float]]] = {
    "curves": {
        "loss": _by_label(0.0796, 0.0769, 0.0752, 0.0750, 0.0746, 0.0705, 0.0705, labels=_LOSSES),
        "epochs_to_adam": _by_label(80, 54, 50, 21, 17),
        "seconds_to_adam": _by_label(69, 47, 49, 24, 15) | {"adam": 88},
        "epoch_cost": _by_label(2.0, 2.2, labels=_COSTS),
    },
    "mnist": {
        "loss": _by_label(0.0732, 0.0768, 0.0692, 0.0693, 0.0653, 0.0652, 0.0644, labels=_LOSSES),
        "epochs_to_adam": _by_label(80, 84, 19, 17, 16),
        "seconds_to_adam": _by_label(383, 399, 94, 87, 78) | {"adam": 799},
        "epoch_cost": _by_label(1.2, 1.3, labels=_COSTS),
    },
    "faces": {
        "loss": _by_label(0.0383, 0.0456, 0.0312, 0.0317, 0.0169, 0.0164, 0.0172, labels=_LOSSES),
        "epochs_to_adam": _by_label(88, 95, 15, 14, 11),
        "seconds_to_adam": _by_label(239, 265, 54, 62, 35) | {"adam": 248},
        "epoch_cost": _by_label(1.7, 2.3, labels=_COSTS),
    },
}

HOLDS, FAILS, UNCLEAR, MISSING = "holds", "does not hold", "within the seeds' spread", "no result"
TIE, NEITHER = "tie", "neither"
ONE_SEED = " (one seed)"


def batch_sizes(settings: Iterable[Setting]) -> list[str]:
    """A sentence for those settings whose batch size is not the paper's, or none."""
    others = [
        f"{setting.problem} {setting.batch}, the paper's {BATCHES[setting.problem]}"
        for setting in dict.fromkeys(settings)
        if setting.batch != BATCHES.get(setting.problem, setting.batch)
    ]
    return [f"Batch sizes differ: {'; '.join(others)}."] if others else []


def beside(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """The paper's numbers and ours, a line for each of the paper's problems and optimizers; None where there is none.

    "loss_ratio" and "seconds_ratio" are against Adam's, and can be compared across machines and sizes.
    """
    lines = []
    for line in summarise(standings):
        paper = PAPER.get(line["problem"])
        if paper is None or line["label"] not in paper["loss"]:
            continue
        label = line["label"]
        figures = {name: values.get(label) for name, values in paper.items()}
        figures["loss_ratio"] = figures["loss"] / paper["loss"]["adam"]
        seconds = figures["seconds_to_adam"]
        figures["seconds_ratio"] = None if seconds is None else seconds / paper["seconds_to_adam"]["adam"]
        lines.append(
            {name: line[name] for name in (*Setting._fields, "label", "seeds")}
            | {f"paper_{name}": value for name, value in figures.items()}
            | {name + end: line[name + end] for name in figures for end in ("", "_low", "_high")}
        )
    return lines


def _cell(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda line: number(line[name], form)


BESIDE: Columns = (
    ("optimizer", lambda line: line["label"]),
    ("loss: paper", _cell("paper_loss", ".4f")),
    ("ours", ranges("loss")),
    ("× Adam's: paper", _cell("paper_loss_ratio", ".2f")),
    ("ours", ranges("loss_ratio", ".2f")),
    ("epochs to Adam's: paper", _cell("paper_epochs_to_adam", "g")),
    ("ours", ranges("epochs_to_adam", "g")),
    ("seconds: paper", _cell("paper_seconds_to_adam", "g")),
    ("ours", ranges("seconds_to_adam", ".1f")),
    ("× Adam's: paper", _cell("paper_seconds_ratio", ".2f")),
    ("ours", ranges("seconds_ratio", ".2f")),
    ("epoch, × Adam's: paper", _cell("paper_epoch_cost", ".1f")),
    ("ours", ranges("epoch_cost", ".2f")),
)


@dataclass(frozen=True)
class Claim:
    """One claim: a measure of one optimizer is below that of another, or at most the paper's own number.

    Attributes:
        text: with `{side}` ("higher" or "lower", as in the paper), `{figure}` where it has them.
        measure: a name of `evidence.measure` and of `PAPER`.
        label: whose.
        against: the other one; None is the paper's number.
        strict: whether equal is not enough.
        as_there: whether the side is the paper's.
    """

    text: str
    measure: str
    label: str
    against: str | None
    strict: bool = True
    as_there: bool = False


CLAIMS = (
    Claim("KFAC reaches a lower loss than Adam", "loss", "kfac", "adam"),
    Claim("KPSVD reaches a loss at or below KFAC's", "loss", "kpsvd", "kfac", strict=False),
    *(Claim(f"{NAMES[label]} reaches a lower loss than KFAC", "loss", label, "kfac") for label in METHODS[2:]),
    Claim("SGD reaches a {side} loss than Adam", "loss", "sgd", "adam", as_there=True),
    *(
        Claim(f"{NAMES[label]} reaches Adam's best in fewer epochs than KFAC", "epochs_to_adam", label, "kfac")
        for label in METHODS[2:]
    ),
    *(
        Claim(f"{NAMES[label]} reaches Adam's best in less time than Adam", "seconds_to_adam", label, "adam")
        for label in METHODS
    ),
    *(
        Claim(f"an epoch of {NAMES[label]} costs at most {{figure}} × Adam's", "epoch_cost", label, None, strict=False)
        for label in _COSTS
    ),
)


def verdict(own: Spread, other: Spread, strict: bool = True) -> str:
    """Whether `own` is below `other`, or at most that if not `strict`: whole ranges over seeds are compared.

    Seeds that never got there are infinite. "neither" where none of either got there, "tie" where all are equal.
    """
    if not own.values or not other.values:
        return MISSING
    if not own.finite and not other.finite:
        return NEITHER
    if own.low == own.high == other.low == other.high and strict:
        return TIE
    if own.high < other.low or (not strict and own.high == other.low):
        return HOLDS
    if own.low > other.high or (strict and own.low == other.high):
        return FAILS
    return UNCLEAR


def judge(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """Every claim on every setting of the paper's problems: its figures, ours, whether it holds there and here."""
    standings = list(standings)
    settings = [setting for setting in dict.fromkeys(s.setting for s in standings) if setting.problem in PAPER]
    lines = []
    for setting in settings:
        own = {standing.label: standing for standing in standings if standing.setting == setting}
        for claim in CLAIMS:
            lines.append({"problem": title_of(setting, settings)} | _judge(claim, PAPER[setting.problem], own))
    return lines


def _judge(claim: Claim, paper: dict[str, dict[str, float]], own: dict[str, Standing]) -> dict[str, Any]:
    figures = paper[claim.measure]
    there = [Spread((figures[claim.label],)), Spread((figures[claim.against or claim.label],))]
    here = [
        own[label].measures[claim.measure] if label in own else Spread()
        for label in (claim.label, claim.against)
        if label is not None
    ]
    one_seed = any(len(spread.values) == 1 for spread in here)
    if claim.against is None:
        here.append(there[1])
    side = "higher" if claim.as_there and there[0].low > there[1].low else "lower"
    order = slice(None, None, -1 if side == "higher" else 1)
    form = {"loss": ".4g", "epochs_to_adam": "g", "seconds_to_adam": ".1f", "epoch_cost": ".2f"}[claim.measure]
    rows = [row for label in (claim.label, claim.against) if label in own for row in own[label].rows.values()]
    timed = claim.measure in ("seconds_to_adam", "epoch_cost")
    notes = list(own[claim.label].flags) if claim.label in own and timed else []
    notes += [note for label in (claim.label, claim.against) if label in own for note in _went_wrong(own[label])]
    word = verdict(*here[order], strict=claim.strict)
    return {
        "claim": claim.text.format(side=side, figure=f"{there[1].low:g}"),
        "paper": _figures(there if claim.against else there[:1], ".4g"),
        "paper_verdict": verdict(*there[order], strict=claim.strict),
        "ours": _figures(here if claim.against else here[:1], form),
        "verdict": word + ONE_SEED if one_seed and word in (HOLDS, FAILS) else word,
        "seeds": len({row["seed"] for row in rows}),
        "notes": "; ".join(notes),
    }


def _went_wrong(standing: Standing) -> list[str]:
    counts = {status: standing.count(status) for status in ("diverged", "failed")}
    return [
        f"{standing.label}: {count} of {len(standing.rows)} seeds {status}" for status, count in counts.items() if count
    ]


def _figures(spreads: list[Spread], form: str) -> str:
    return " against ".join(_figure(spread, form) for spread in spreads)


def _figure(spread: Spread, form: str) -> str:
    if spread.values and not spread.finite:
        return "never"
    text = ranged(spread.columns("x"), "x", form)
    missed = len(spread.values) - len(spread.finite)
    return f"{text}, {missed} of {len(spread.values)} never" if missed else text


CLAIM_COLUMNS: Columns = (
    ("claim", lambda line: line["claim"]),
    ("paper", lambda line: line["paper"]),
    ("there it", lambda line: line["paper_verdict"]),
    ("ours", lambda line: line["ours"]),
    ("here it", lambda line: line["verdict"]),
    ("seeds", lambda line: str(line["seeds"])),
    ("notes", lambda line: line["notes"]),
)


def count_verdicts(lines: list[dict[str, Any]]) -> str:
    """A sentence: how many claims hold, on how many seeds, and where the paper's own figures are against them."""
    known = [HOLDS, HOLDS + ONE_SEED, FAILS, FAILS + ONE_SEED, TIE, NEITHER, UNCLEAR, MISSING]
    counts = {word: sum(line["verdict"] == word for line in lines) for word in known}
    parts = ", ".join(f"{count} × {word}" for word, count in counts.items() if count)
    other = [f"{line['problem']}: {line['claim']}" for line in lines if line["paper_verdict"] == FAILS]
    text = f"Of {len(lines)} claims: {parts}."
    return text + (f" The paper's own figures are against: {'; '.join(other)}." if other else "")
