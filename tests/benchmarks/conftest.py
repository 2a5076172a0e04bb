"""What tests of the benchmarks share."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    """Lets tests import the benchmarks' modules, which are scripts and not a package, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def make_row(
    losses, seconds=None, *, optimizer="adam", options=None, status="finished", seed=0, accuracies=None, **more
):
    """A row of digits, batch 64; held-out losses are ten times the losses."""
    options = {"learning_rate": 1e-3} if options is None and optimizer == "adam" else options or {}
    start = {"problem": "digits", "batch": 64, "seed": seed, "optimizer": optimizer, "label": optimizer}
    return {
        **start,
        "options": options,
        "epochs": 3,
        "status": status,
        "reason": None,
        "losses": losses,
        "seconds": seconds or [1.0] * len(losses),
        "held_out_losses": [loss and 10 * loss for loss in losses],
        "held_out_accuracies": accuracies or [None] * len(losses),
        "device": "CPU",
        "jobs": 1,
        "threads": 2,
        **more,
    }


@pytest.fixture
def started(monkeypatch):
    """Runs that end at once, their loss the rate; the list of those started. A run of `stop_at` is interrupted."""
    execution = pytest.importorskip("execution")
    started = SimpleNamespace(runs=[], stop_at=None)

    def start(run, threads):
        if len(started.runs) == started.stop_at:
            raise KeyboardInterrupt
        started.runs.append(run)
        made = {**make_row([(run.options or {}).get("learning_rate", 0.5)], wall_seconds=2.0), **vars(run)}
        process = SimpleNamespace(poll=lambda: 0, kill=lambda: None, wait=lambda: None)
        return SimpleNamespace(run=run, process=process, row=lambda: made)

    monkeypatch.setattr(execution, "_start", start)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return started


@pytest.fixture
def small(monkeypatch):
    """The quick scale with two problems' comparison of three contestants, two settings each, and two seeds."""
    import plans

    sizes = {"digits": plans.Size(96, 32, 2, seeds=2), "narrow": plans.Size(96, 32, 1, seeds=1)}
    ablation = {"digits": plans.Size(96, 32, 2, seeds=1)}
    errors = {"digits": plans.Size(96, 32, 2, 1)}
    scale = plans.Scale(2, sizes, errors, ablation, methods=("kfac",), further=("kfac",))
    monkeypatch.setitem(plans.SCALES, "quick", scale)
    few = {name: plans.CONTESTANTS[name] for name in ("adam", "kfac")}
    monkeypatch.setattr(plans, "CONTESTANTS", few)


def main_of_reproduce(path, command, *arguments):
    from reproduce import main

    return main([command, "--quick", "--results", str(path), *arguments])


def by_key(*rows):
    """Rows as `Results.rows` has them."""
    from runs import key_of

    return {key_of(row): row for row in rows}
