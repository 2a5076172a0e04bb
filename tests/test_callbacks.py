"""`CurvatureMonitor`: its numbers against dense oracles, its budget, and that training stays the same."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense, fisher_errors
from keras_kpsvd.callbacks import Budget, CurvatureMonitor
from keras_kpsvd.curvature.corrected import EVEN, UNEVEN
from keras_kpsvd.curvature.samples import block_samples
from tests import reference
from tests.monitored import OFTEN, convolutional, data, dense, fit
from tests.networks import assert_same, problem, state


def _named(model, x, y):
    """The samples of each block at the targets, under the name of its records, float64.

    The optimizer's curvature is that of a mean over two outputs, `E[∇log p ∇log pᵀ]/2`; these gradients are the loss's
    own, `∇log p/2`.
    """
    return {
        name if len(blocks) == 1 else f"{name}/block_{index}": (a.numpy().astype(float), 2**0.5 * g.numpy())
        for name, blocks in block_samples(model, x, y, 0, fisher="sampled", likelihood="auto").items()
        for index, (a, g) in enumerate(blocks)
    }


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("method", "eigenvalues"), [("kfac", "kronecker"), ("kfac", "corrected"), ("kfac_corrected", "kronecker")]
)
@pytest.mark.parametrize("build", [dense, pytest.param(convolutional, marks=pytest.mark.slow)])
def test_the_first_refresh_has_the_numbers_of_the_dense_matrices(build, method, eigenvalues, eager):
    model = build()
    options = {"method": method, "eigenvalues": eigenvalues}
    optimizer = KPSVD(**options, fisher="empirical", damping=0.125, fisher_batch_size=24, seed=0)
    model.compile(optimizer, "mse", run_eagerly=eager)
    optimizer.build(model.trainable_variables)
    x, y = data(model)
    samples = _named(model, x, y)
    errors = fisher_errors(model, x, [method], y=y)
    monitor = CurvatureMonitor(rows=1000)
    model.fit(x, y, batch_size=24, epochs=1, shuffle=False, verbose=0, callbacks=[monitor])
    assert [record["layer"] for record in monitor.records] == list(samples)
    kurtosis = min(reference.length_kurtosis(*sample) for sample in samples.values())
    factored = np.clip((kurtosis - EVEN) / (UNEVEN - EVEN), 0, 1)  # Few directions are left free.
    for record in monitor.records:
        a, g = samples[record["layer"]]
        fisher = reference.fisher(a, g)
        sigmas = np.linalg.svd(reference.rearrange(fisher, a.shape[-1], g.shape[-1]), compute_uv=False)
        several = a.shape[1] > 1
        # For several positions training finds its second term, with symmetric factors, by a few power iterations.
        loose = several and method == "kfac_corrected"
        assert record["error_1"] == pytest.approx(errors[record["layer"]][method].error_1, rel=0.1 if loose else 1e-4)
        np.testing.assert_allclose([record["sigma_1"], record["sigma_2"]], sigmas[:2], rtol=1e-3 if several else 1e-4)
        pair = reference.kfac_factors(a, g)
        values = np.linalg.eigvalsh(reference.damped_sum([pair], 0.125))
        if eigenvalues == "corrected":
            (a_values, a_basis), (g_values, g_basis) = (np.linalg.eigh(factor) for factor in pair)
            diagonal, means = reference.diagonal_in_bases(fisher, a_basis, g_basis), (a_values.mean(), g_values.mean())
            damped = reference.corrected_diagonal(diagonal, a_values, g_values, *means, 0.125, factored)
            values = np.sort(damped, axis=None)
        np.testing.assert_allclose([record["eigenvalue_max"], record["eigenvalue_min"]], values[[-1, 0]], rtol=1e-3)
        assert (record["update"], record["damping"]) == (0, 0.125)
        assert record["refresh_seconds"] > 0


def test_error_1_is_of_the_averaged_factors_and_of_the_first_rows():
    """Two refreshes at a rate of zero, on two batches: the weights stay, the factors are averaged."""
    model = dense()
    model.compile(KPSVD(1e-30, fisher="empirical", curvature_interval=1, factor_decay=0.5, seed=0), "mse")
    x, y = data(model)
    blocks = [_named(model, x[part], y[part]) for part in (slice(0, 12), slice(12, 24))]
    monitor = CurvatureMonitor(budget=None, rows=5)
    model.fit(x, y, batch_size=12, epochs=1, shuffle=False, verbose=0, callbacks=[monitor])
    assert [record["update"] for record in monitor.records] == [0, 0, 1, 1]
    for record in monitor.records[2:]:
        a, g = ([block[record["layer"]][side] for block in blocks] for side in (0, 1))
        pairs = [reference.kfac_factors(*batch) for batch in zip(a, g, strict=True)]
        averaged = [(first + 2 * second) / 3 for first, second in zip(*pairs, strict=True)]
        fisher = reference.fisher(a[1][:5], g[1][:5])
        expected = np.linalg.norm(fisher - np.kron(*averaged)) / np.linalg.norm(fisher)
        assert record["error_1"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_scale_is_by_how_much_the_kl_bound_shortened_the_rate(nesterov):
    monitor = CurvatureMonitor(budget=None)
    fit(monitor, optimizer=KPSVD(0.5, momentum=0.75, nesterov=nesterov, kl_clip=1e-6, **OFTEN), epochs=1)
    assert all(0 < record["kl_scale"] < 1 for record in monitor.records)
    assert all(record["rate"] == pytest.approx(0.5 * record["kl_scale"]) for record in monitor.records)
    assert {record["momentum"] for record in monitor.records} == {0.75}
    free = CurvatureMonitor()
    fit(free, optimizer=KPSVD(0.5, kl_clip=None, **OFTEN), epochs=1)
    assert free.records[0]["kl_scale"] == 1 and free.records[0]["rate"] == 0.5


def test_with_the_adaptive_rate_the_scale_is_the_trusted_part():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 4)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), KPSVDDense(5, activation="softmax")])
    model.compile(KPSVD(damping=1e-6, seed=0), "sparse_categorical_crossentropy")
    monitor = CurvatureMonitor()
    model.fit(x, rng.integers(5, size=16), batch_size=16, epochs=1, verbose=0, callbacks=[monitor])
    (record,) = monitor.records
    expected = next(v.numpy() for v in model.optimizer.variables if v.name == "model_coefficients")
    assert 0 < record["kl_scale"] < 1
    assert record["rate"] == pytest.approx(-expected[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "method", "arguments"),
    [
        (dense, "kfac", {}),
        (dense, "kfac_corrected", {"run_eagerly": True}),
        (dense, "kpsvd", {"steps_per_execution": 3}),
        (convolutional, "kfac_corrected", {}),
    ],
)
def test_training_and_what_is_saved_are_the_same_to_the_last_bit(build, method, arguments):
    plain, losses = fit(build=build, optimizer=KPSVD(method=method, **OFTEN), **arguments)
    watched, logs = fit(CurvatureMonitor(budget=None), build, KPSVD(method=method, **OFTEN), **arguments)
    assert_same(state(plain, but=()), state(watched, but=()))
    assert losses["loss"] == logs["loss"]
    names = [[variable.path for variable in model.optimizer.variables] for model in (plain, watched)]
    assert names[0] == names[1]
    assert plain.optimizer.get_config() == watched.optimizer.get_config()


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_a_run_resumed_with_a_monitor_is_the_run_without_one(before, tmp_path):
    """Saved with or without a monitor, the file is the same, and what goes on from it is."""
    plain, _ = fit(epochs=3)
    first, _ = fit(CurvatureMonitor(budget=None) if before else None, epochs=1)
    first.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    monitor = CurvatureMonitor(budget=None)
    fit(monitor, model=resumed, epochs=2)
    assert_same(state(plain), state(resumed))
    assert [record["update"] for record in monitor.records[::2]] == [4, 6, 8]


def _traced(model):
    """Counts the times that a training step is traced."""
    calls = []
    step = model.train_step
    model.train_step = lambda data: (calls.append(1), step(data))[1]
    return calls


@pytest.mark.slow
def test_a_model_trained_before_is_traced_once_more_and_then_no_more():
    model = dense()
    calls = _traced(model)
    model.compile(KPSVD(**OFTEN), "mse")
    fit(model=model)
    assert len(calls) > 0
    monitor, other = CurvatureMonitor(budget=None, rows=3), CurvatureMonitor(budget=None, rows=20)
    calls.clear()
    fit(monitor, model=model)
    assert len(calls) == 1 and len(monitor.records) == 6
    fit(monitor, model=model)
    fit(other, model=model)
    assert len(monitor.records) == 12 and len(other.records) == 6
    fit(model=model)
    assert len(calls) == 1 and len(monitor.records) == 12 and len(other.records) == 6
    model.compile(model.optimizer, "mse")
    fit(monitor, model=model)
    assert len(monitor.records) == 18


def test_without_a_monitor_the_step_has_not_one_operation_more():
    def operations(watched):
        model = dense()
        model.compile(KPSVD(**OFTEN), "mse")
        model.optimizer.build(model.trainable_variables)
        if watched:
            from keras_kpsvd.curvature.observation import Observer

            model.optimizer.observer = Observer()
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        graph = step.get_concrete_function(*map(tf.constant, problem(dtype="float32"))).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        return sum(node.op == "PyFunc" for node in nodes), len(nodes)

    assert operations(True)[0] > operations(False)[0]
    assert operations(True)[1] > operations(False)[1]


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_budget_bounds_the_part_of_the_time_that_is_spent_and_always_has_the_first():
    clock = _Clock()
    budget = Budget(0.02, clock)
    clock.now = 1000.0
    budget.begins()
    observed = []
    for second in range(2000):
        clock.now = 1000.0 + second
        if budget.allows():
            budget.observed(1.0)
            observed.append(second)
        assert second < 50 or budget.seconds <= 0.02 * second
    assert observed == [0, *range(100, 2000, 50)]


def test_time_spent_writing_counts_and_every_training_begins_anew():
    clock = _Clock()
    budget = Budget(0.1, clock)
    budget.begins()
    assert budget.allows()
    budget.observed(1.0)
    clock.now = 20.0
    assert budget.allows()
    budget.wrote(0.5)
    assert not budget.allows()
    clock.now = 25.0
    assert budget.allows()
    budget.begins()
    assert budget.seconds == 0 and budget.allows()
    budget.observed(1.0)
    assert not budget.allows()


def test_without_a_budget_every_refresh_is_observed():
    budget = Budget(None, _Clock())
    for _ in range(5):
        assert budget.allows()
        budget.observed(1e9)


def test_refreshes_beyond_the_budget_are_passed_over_and_keep_the_last_values_in_the_logs():
    monitor = CurvatureMonitor(budget=1e-9)
    _, logs = fit(monitor, epochs=3)
    assert [record["update"] for record in monitor.records] == [0, 0]
    assert logs["out/error_1"] == [monitor.records[1]["error_1"]] * 3
    fit(monitor, epochs=1)
    assert len(monitor.records) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"csv": 3}, "`csv` must be a path or None. Received: csv=3"),
        ({"csv": ""}, "`csv` must be a path or None"),
        ({"tensorboard": True}, "`tensorboard` must be a path or None"),
        ({"budget": 0}, r"`budget` must be a number in \(0, 1\] or None. Received: budget=0"),
        ({"budget": 1.5}, "`budget` must be"),
        ({"budget": math.nan}, "`budget` must be"),
        ({"budget": "all"}, "`budget` must be"),
        ({"rows": 0}, "`rows` must be an integer of 1 or more"),
        ({"rows": 2.5}, "`rows` must be an integer of 1 or more"),
        ({"log_quantities": ["error_2"]}, "`log_quantities` must be some of 'error_1', .*Received: 'error_2'"),
        ({"log_quantities": 7}, "`log_quantities` must be some of"),
    ],
)
def test_an_argument_out_of_range_is_named_when_the_monitor_is_made(arguments, said):
    with pytest.raises(ValueError, match=said):
        CurvatureMonitor(**arguments)


def test_a_model_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"compiled with `KPSVD`\. Received: optimizer=Adam"):
        fit(CurvatureMonitor(), optimizer=keras.optimizers.Adam())


def _several():
    chosen = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"(network/)?dense0/.*": KPSVD(seed=0)})
    return keras.optimizers.MultiOptimizer(chosen)


@pytest.mark.parametrize("kind", ["LossScaleOptimizer", "MultiOptimizer"])
def test_a_kpsvd_inside_another_optimizer_is_found(kind):
    if not hasattr(keras.optimizers, kind):
        pytest.skip("came with a later Keras")
    wrapped = keras.optimizers.LossScaleOptimizer(KPSVD(seed=0)) if kind == "LossScaleOptimizer" else _several()
    monitor = CurvatureMonitor()
    fit(monitor, optimizer=wrapped, epochs=1)
    expected = ["dense0", "out"] if kind == "LossScaleOptimizer" else ["dense0"]
    assert [record["layer"] for record in monitor.records[: len(expected)]] == expected
    assert np.isfinite(monitor.records[0]["error_1"])
