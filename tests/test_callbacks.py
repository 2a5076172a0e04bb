"""`CurvatureMonitor`: its numbers against dense oracles, where they go, and that training stays the same."""

import csv
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense, fisher_errors
from keras_kpsvd.callbacks import COLUMNS, Budget, CurvatureMonitor
from keras_kpsvd.curvature.observation import QUANTITIES
from keras_kpsvd.curvature.samples import block_samples
from tests import reference
from tests.networks import assert_same, problem, state, tanh_network

OFTEN = {"curvature_interval": 2, "inverse_interval": 3, "seed": 1}


def _dense():
    return tanh_network(dtype="float32")


def _convolutional():
    keras.utils.set_random_seed(2)
    grouped = KPSVDConv2D(4, 2, groups=2, activation="tanh", name="grouped")
    layers = [grouped, keras.layers.Flatten(), KPSVDDense(2, name="out")]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers], name="network")


def _data(model, rows=24):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, *model.input_shape[1:])).astype("float32")
    return x, np.tanh(rng.normal(size=(rows, 2))).astype("float32")


def _fit(monitor=None, build=_dense, optimizer=None, *, model=None, batch_size=8, epochs=2, callbacks=(), **arguments):
    """Compiles a model, or goes on with one, and fits."""
    if model is None:
        model = build()
        model.compile(optimizer or KPSVD(**OFTEN), "mse", **arguments)
    own = [] if monitor is None else [monitor]
    x, y = _data(model)
    history = model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=[*own, *callbacks]
    )
    return model, history.history


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
@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
@pytest.mark.parametrize("build", [_dense, _convolutional])
def test_the_first_refresh_has_the_numbers_of_the_dense_matrices(build, method, eager):
    model = build()
    optimizer = KPSVD(method=method, fisher="empirical", damping=0.125, fisher_batch_size=24, seed=0)
    model.compile(optimizer, "mse", run_eagerly=eager)
    optimizer.build(model.trainable_variables)
    x, y = _data(model)
    samples = _named(model, x, y)
    errors = fisher_errors(model, x, [method], y=y)
    monitor = CurvatureMonitor(rows=1000)
    model.fit(x, y, batch_size=24, epochs=1, shuffle=False, verbose=0, callbacks=[monitor])
    assert [record["layer"] for record in monitor.records] == list(samples)
    for record in monitor.records:
        a, g = samples[record["layer"]]
        fisher = reference.fisher(a, g)
        sigmas = np.linalg.svd(reference.rearrange(fisher, a.shape[-1], g.shape[-1]), compute_uv=False)
        several = a.shape[1] > 1
        # For several positions training finds its second term, with symmetric factors, by a few power iterations.
        loose = several and method == "kfac_corrected"
        assert record["error_1"] == pytest.approx(errors[record["layer"]][method].error_1, rel=0.1 if loose else 1e-4)
        np.testing.assert_allclose([record["sigma_1"], record["sigma_2"]], sigmas[:2], rtol=1e-3 if several else 1e-4)
        values = np.linalg.eigvalsh(reference.damped_sum([reference.kfac_factors(a, g)], 0.125))
        np.testing.assert_allclose([record["eigenvalue_max"], record["eigenvalue_min"]], values[[-1, 0]], rtol=1e-3)
        assert (record["update"], record["damping"]) == (0, 0.125)
        assert record["refresh_seconds"] > 0


def test_error_1_is_of_the_averaged_factors_and_of_the_first_rows():
    """Two refreshes at a rate of zero, on two batches: the weights stay, the factors are averaged."""
    model = _dense()
    model.compile(KPSVD(1e-30, fisher="empirical", curvature_interval=1, factor_decay=0.5, seed=0), "mse")
    x, y = _data(model)
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_scale_is_by_how_much_the_kl_bound_shortened_the_rate(nesterov):
    monitor = CurvatureMonitor(budget=None)
    _fit(monitor, optimizer=KPSVD(0.5, momentum=0.75, nesterov=nesterov, kl_clip=1e-6, **OFTEN), epochs=1)
    assert all(0 < record["kl_scale"] < 1 for record in monitor.records)
    assert all(record["rate"] == pytest.approx(0.5 * record["kl_scale"]) for record in monitor.records)
    assert {record["momentum"] for record in monitor.records} == {0.75}
    free = CurvatureMonitor()
    _fit(free, optimizer=KPSVD(0.5, kl_clip=None, **OFTEN), epochs=1)
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


@pytest.mark.parametrize(
    ("build", "method", "arguments"),
    [
        (_dense, "kfac", {}),
        (_dense, "kfac_corrected", {"run_eagerly": True}),
        (_dense, "kpsvd", {"steps_per_execution": 3}),
        (_convolutional, "kfac_corrected", {}),
    ],
)
def test_training_and_what_is_saved_are_the_same_to_the_last_bit(build, method, arguments):
    plain, losses = _fit(build=build, optimizer=KPSVD(method=method, **OFTEN), **arguments)
    watched, logs = _fit(CurvatureMonitor(budget=None), build, KPSVD(method=method, **OFTEN), **arguments)
    assert_same(state(plain, but=()), state(watched, but=()))
    assert losses["loss"] == logs["loss"]
    names = [[variable.path for variable in model.optimizer.variables] for model in (plain, watched)]
    assert names[0] == names[1]
    assert plain.optimizer.get_config() == watched.optimizer.get_config()


@pytest.mark.parametrize("before", [True, False])
def test_a_run_resumed_with_a_monitor_is_the_run_without_one(before, tmp_path):
    """Saved with or without a monitor, the file is the same, and what goes on from it is."""
    plain, _ = _fit(epochs=3)
    first, _ = _fit(CurvatureMonitor(budget=None) if before else None, epochs=1)
    first.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    monitor = CurvatureMonitor(budget=None)
    _fit(monitor, model=resumed, epochs=2)
    assert_same(state(plain), state(resumed))
    assert [record["update"] for record in monitor.records[::2]] == [4, 6, 8]


def _traced(model):
    """Counts the times that a training step is traced."""
    calls = []
    step = model.train_step
    model.train_step = lambda data: (calls.append(1), step(data))[1]
    return calls


def test_a_model_trained_before_is_traced_once_more_and_then_no_more():
    model = _dense()
    calls = _traced(model)
    model.compile(KPSVD(**OFTEN), "mse")
    _fit(model=model)
    assert len(calls) > 0
    monitor, other = CurvatureMonitor(budget=None, rows=3), CurvatureMonitor(budget=None, rows=20)
    calls.clear()
    _fit(monitor, model=model)
    assert len(calls) == 1 and len(monitor.records) == 6
    _fit(monitor, model=model)
    _fit(other, model=model)
    assert len(monitor.records) == 12 and len(other.records) == 6
    _fit(model=model)
    assert len(calls) == 1 and len(monitor.records) == 12 and len(other.records) == 6
    model.compile(model.optimizer, "mse")
    _fit(monitor, model=model)
    assert len(monitor.records) == 18


def test_without_a_monitor_the_step_has_not_one_operation_more():
    def operations(watched):
        model = _dense()
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
    _, logs = _fit(monitor, epochs=3)
    assert [record["update"] for record in monitor.records] == [0, 0]
    assert logs["out/error_1"] == [monitor.records[1]["error_1"]] * 3
    _fit(monitor, epochs=1)
    assert len(monitor.records) == 4


def test_logs_have_the_last_observed_refresh_of_each_epoch():
    monitor = CurvatureMonitor(budget=None)
    _, logs = _fit(monitor)
    for layer in ("dense0", "out"):
        own = [record for record in monitor.records if record["layer"] == layer]
        assert [record["update"] for record in own] == [0, 2, 4]
        for name in QUANTITIES:
            assert logs[f"{layer}/{name}"] == [own[1][name], own[2][name]]
    _, logs = _fit(CurvatureMonitor(log_quantities=["damping"]))
    assert list(logs) == ["loss", "dense0/damping", "out/damping"]


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_file_has_a_line_per_block_and_refresh_and_a_resumed_run_goes_on_with_it(tmp_path):
    path = tmp_path / "new" / "curvature.csv"
    first, second = CurvatureMonitor(csv=path, budget=None), CurvatureMonitor(csv=str(path), budget=None)
    model, _ = _fit(first)
    assert len(_rows(path)) == len(first.records) == 6
    _fit(second, model=model)
    assert path.read_text().count("error_1") == 1
    for row, record in zip(_rows(path), first.records + second.records, strict=True):
        assert tuple(row) == COLUMNS and row.pop("layer") == record["layer"]
        assert {name: float(value) for name, value in row.items()} == {name: record[name] for name in row}


def test_lines_are_there_as_epochs_end(tmp_path):
    path, counts = tmp_path / "curvature.csv", []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(_rows(path))))
    _fit(CurvatureMonitor(csv=path, budget=None), callbacks=[count])
    assert counts == [4, 6]


def test_a_file_of_something_else_is_refused_before_training_and_left_as_it_is(tmp_path):
    path = tmp_path / "curvature.csv"
    for content in ("epoch,loss\n1,2\n", ",".join(COLUMNS)[:-3], ",".join(reversed(COLUMNS)) + "\n"):
        path.write_text(content)
        model = _dense()
        model.compile(KPSVD(**OFTEN), "mse")
        before = state(model)
        with pytest.raises(ValueError, match="`csv` must be a new file or one that `CurvatureMonitor` wrote"):
            _fit(CurvatureMonitor(csv=path), model=model)
        assert path.read_text() == content
        assert all(np.array_equal(value, state(model)[name]) for name, value in before.items())


def test_a_line_torn_by_a_killed_run_spoils_no_other(tmp_path):
    path = tmp_path / "curvature.csv"
    path.write_text(",".join(COLUMNS) + "\ndense0,0,1.2")
    monitor = CurvatureMonitor(csv=path)
    _fit(monitor)
    rows = _rows(path)
    assert rows[0]["sigma_1"] is None and [row["layer"] for row in rows[1:]] == ["dense0", "out"] * (len(rows) // 2)


def test_tensorboard_gets_every_scalar_at_its_update(tmp_path):
    monitor = CurvatureMonitor(tensorboard=tmp_path / "logs", budget=None)
    _fit(monitor)
    (file,) = (tmp_path / "logs").iterdir()
    found = {
        (value.tag, event.step): value.simple_value
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    expected = {
        (f"{record['layer']}/{name}", record["update"]): np.float32(record[name])
        for record in monitor.records
        for name in QUANTITIES
        if name != "update"
    }
    assert found == expected


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
        _fit(CurvatureMonitor(), optimizer=keras.optimizers.Adam())


def _several():
    chosen = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {"(network/)?dense0/.*": KPSVD(seed=0)})
    return keras.optimizers.MultiOptimizer(chosen)


@pytest.mark.parametrize("kind", ["LossScaleOptimizer", "MultiOptimizer"])
def test_a_kpsvd_inside_another_optimizer_is_found(kind):
    if not hasattr(keras.optimizers, kind):
        pytest.skip("came with a later Keras")
    wrapped = keras.optimizers.LossScaleOptimizer(KPSVD(seed=0)) if kind == "LossScaleOptimizer" else _several()
    monitor = CurvatureMonitor()
    _fit(monitor, optimizer=wrapped, epochs=1)
    expected = ["dense0", "out"] if kind == "LossScaleOptimizer" else ["dense0"]
    assert [record["layer"] for record in monitor.records[: len(expected)]] == expected
    assert np.isfinite(monitor.records[0]["error_1"])


def test_dead_layers_and_steps_that_are_not_finite_do_no_harm(tmp_path):
    """The output weights are zero: no gradient reaches the first layer. Then targets overflow the second step."""
    model = _dense()
    model.layers[-1].kernel.assign(np.zeros_like(model.layers[-1].kernel))
    model.compile(KPSVD(0.1, curvature_interval=1, inverse_interval=1, seed=0), "mse")
    x, y = _data(model)
    x[8:16] = np.nan
    monitor = CurvatureMonitor(csv=tmp_path / "curvature.csv", tensorboard=tmp_path / "logs", budget=None)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[monitor])
    assert monitor.records[0]["layer"] == "dense0" and monitor.records[0]["error_1"] == 0
    assert [record["update"] for record in monitor.records] == [0, 0, 1, 1]
    assert len(_rows(tmp_path / "curvature.csv")) == 4
