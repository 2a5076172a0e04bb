"""The plan of `reproduce.py`: every run of the comparison, of the errors during training, and of the ablation.

A plan is written to a file before anything runs. `SCALES` says how large the problems are, `contestants.py` who takes
part, `ablation_cases` what the ablation varies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, METHODS, OPTIMIZERS
from problems import PROBLEMS
from runs import SEARCH_SEED, Run

FORMAT = 1  # of plan files; another number is another version's
STUDIES = ("comparison", "errors", "ablation")
TWO_TERM_METHODS = ("deflation", "lanczos", "kfac_corrected")
FIXED_DAMPING = 0.003  # what the adaptive one started at when the committed report was made

# KPSVD's own, of what the ablation changes. Keras is not imported to make a plan; a test holds them to the truth.
DEFAULTS = {"conjugate_steps": 1, "curvature_interval": "growing", "inverse_interval": "growing"}


def refreshes_within(updates: int, interval: int | str) -> int:
    """How many of the first updates refresh the curvature: `curvature.intervals.next_due`, without TensorFlow."""
    count = due = 0
    while due < updates:
        count, due = count + 1, due + (min(20, 1 + due // 10) if interval == "growing" else interval)
    return count


@dataclass(frozen=True)
class Size:
    """How large a problem is: training examples, batch size, epochs, and how many seeds from 0 on."""

    samples: int
    batch: int
    epochs: int
    seeds: int = 3


@dataclass(frozen=True)
class Scale:
    """How large the three studies are.

    Attributes:
        settings: of each grid that are tried.
        comparison, errors, ablation: sizes by problem.
        methods: whose damping and second term are ablated.
        further: whose intervals, batches and Fisher matrices are.
    """

    settings: int
    comparison: Mapping[str, Size]
    errors: Mapping[str, Size] = field(default_factory=dict)
    ablation: Mapping[str, Size] = field(default_factory=dict)
    methods: tuple[str, ...] = METHODS
    further: tuple[str, ...] = ("kfac", "kfac_corrected")


SCALES = {
    "quick": Scale(
        settings=1,
        comparison={"curves": Size(1_500, 256, 4, 1), "conv": Size(600, 128, 3, 1)},
        errors={"curves": Size(1_500, 256, 2, 1)},
        ablation={"digits": Size(512, 128, 4, 1)},
        methods=("kfac", "kfac_corrected"),
        further=("kfac",),
    ),
    "standard": Scale(
        settings=3,
        comparison={
            "curves": Size(5_000, 256, 15),
            "mnist": Size(4_000, 512, 10),
            "faces": Size(1_000, 256, 8),
            "conv": Size(2_000, 128, 8),
        },
        errors={"curves": Size(5_000, 256, 15, 1), "mnist": Size(4_000, 512, 10, 1)},
        ablation={"digits": Size(1_437, 128, 10, 2), "curves": Size(3_000, 256, 8, 1)},
    ),
    # The paper's batch sizes and epochs, and as many images as the offline data sets give: for a GPU and patience.
    "paper": Scale(
        settings=3,
        comparison={
            "curves": Size(20_000, 256, 200),
            "mnist": Size(4_000, 512, 200),
            "faces": Size(8_000, 1_024, 200),
            "conv": Size(4_000, 128, 50),
        },
        errors={"curves": Size(20_000, 256, 200, 1), "mnist": Size(4_000, 512, 200, 1)},
        ablation={"digits": Size(1_437, 128, 30), "curves": Size(20_000, 256, 50)},
    ),
}


def make_plan(scale: str) -> list[Run]:
    """Every run of a scale: of each problem and contestant the grid on seed 0, then the best of it on the others."""
    sizes = SCALES[scale]
    return [*_comparison(sizes), *_errors(sizes), *_ablation(sizes)]


def _run(study: str, problem: str, size: Size, seed: int, **more: Any) -> Run:
    return Run(problem, size.batch, seed, epochs=size.epochs, study=study, samples=size.samples, **more)


def _comparison(scale: Scale) -> Iterator[Run]:
    for problem, size in scale.comparison.items():
        for contestant in CONTESTANTS.values():
            grid = contestant.grid[: scale.settings]
            named = {"optimizer": contestant.optimizer, "label": contestant.label}
            for options in grid:
                yield _run("comparison", problem, size, SEARCH_SEED, options=options, **named)
            for seed in range(size.seeds):
                if seed != SEARCH_SEED:
                    yield _run("comparison", problem, size, seed, options=None, grid=grid, **named)


def _errors(scale: Scale) -> Iterator[Run]:
    """`kfac` trains; the five approximations are made of its network as it goes."""
    for problem, size in scale.errors.items():
        for seed in range(size.seeds):
            yield _run("errors", problem, size, seed, optimizer="kpsvd", label="kfac", options={"method": "kfac"})


def _ablation(scale: Scale) -> Iterator[Run]:
    for problem, size in scale.ablation.items():
        classes = bool(PROBLEMS[problem].metrics)
        for seed in range(size.seeds):
            for label, options in ablation_cases(size.batch, scale.methods, scale.further, exact=classes):
                yield _run("ablation", problem, size, seed, optimizer="kpsvd", label=label, options=options)


def ablation_cases(
    batch: int, methods: Sequence[str], further: Sequence[str], *, exact: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases of the ablation: "aspect: case", and KPSVD's options.

    Args:
        batch: the batch size.
        methods: of the scale.
        further: of the scale.
        exact: whether the model has few enough outputs for the exact Fisher matrix.
    """
    for method in methods:
        for rule in ("sqrt", "factor"):
            options = {"method": method} | ({} if rule == "sqrt" else {"damping_rule": rule})
            yield f"damping: {rule}, adaptive λ", options
            yield f"damping: {rule}, λ={FIXED_DAMPING}", options | {"damping": FIXED_DAMPING}
    for method in (method for method in TWO_TERM_METHODS if method in methods):
        yield "indefinite: absolute", {"method": method}
        yield "indefinite: reflect", {"method": method, "indefinite": "reflect"}
    for method in further:
        for steps in (1, 2, 3):
            yield f"conjugate gradients: {steps}", {"method": method} | _changed(conjugate_steps=steps)
        yield "interval: growing", {"method": method}
        for steps in (5, 20, 100):
            intervals = {"curvature_interval": steps, "inverse_interval": steps}
            yield f"interval: every {steps}", {"method": method} | intervals
        for name, rows in (("quarter", batch // 4), ("whole", batch)):
            yield f"batch: {name}", {"method": method, "fisher_batch_size": rows}
        yield "fisher: sampled", {"method": method}
        yield "fisher: empirical", {"method": method, "fisher": "empirical"}
        if exact:
            yield "fisher: exact", {"method": method, "fisher": "exact"}


def _changed(**options: Any) -> dict[str, Any]:
    """The options that are not KPSVD's defaults: runs with the defaults are made once for all aspects."""
    return {name: value for name, value in options.items() if DEFAULTS[name] != value}


class PlanError(Exception):
    """A plan that can't be used, in one line."""


def write_plan(path: Path, scale: str, plan: list[Run]) -> None:
    """Writes a plan; whatever stands at `path` stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "scale": scale, "runs": [asdict(run) for run in plan]}, indent=0)
    draft = path.with_suffix(".new")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read_plan(path: Path) -> tuple[str, list[Run]]:
    """The scale and the runs of a plan.

    Raises:
        PlanError: not there, damaged, or another version's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, scale, rows = content["format"], content["scale"], content["runs"]
    except FileNotFoundError:
        raise PlanError(f"{path} is not there; `reproduce.py run` makes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{path} holds no plan ({type(error).__name__}); move it away or give another --results"
        ) from None
    if version != FORMAT:
        raise PlanError(f"{path} is a plan of format {version!r}, this version's is {FORMAT}; give another --results")
    try:
        plan, known = [Run(**row) for row in rows], scale in SCALES
    except TypeError:
        known = False
    if not known:
        raise PlanError(f"{path} is a plan of another version, with runs unknown to this one; give another --results")
    for number, run in enumerate(plan, start=1):
        if not _sound(run):
            raise PlanError(
                f"{path} is damaged or a plan of another version: run {number} is none that this one can make; "
                "give another --results"
            )
    return scale, plan


def _sound(run: Run) -> bool:
    """Whether a run has the values that a run can have."""
    sizes = [run.batch, run.epochs, *([] if run.samples is None else [run.samples])]
    if not all(type(number) is int for number in [*sizes, run.seed]) or min(sizes) < 1 or run.seed < 0:
        return False
    names = (run.problem, run.optimizer, run.study, run.label)
    if not all(isinstance(name, str) for name in names):
        return False
    settings = [run.options] if run.options is not None else run.grid
    return (
        run.problem in PROBLEMS
        and run.optimizer in OPTIMIZERS
        and run.study in STUDIES
        and isinstance(settings, list | tuple)
        and len(settings) > 0
        and all(isinstance(one, dict) for one in settings)
    )


def same(one: list[Run], other: list[Run]) -> bool:
    """Whether two plans ask for the same runs."""
    return [json.dumps(asdict(run), sort_keys=True) for run in one] == [
        json.dumps(asdict(run), sort_keys=True) for run in other
    ]
