"""`KPSVD` in stock `fit` on two devices: the steps of one device with the whole batch."""

import contextlib
import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense
from keras_kpsvd.curvature import inverses
from keras_kpsvd.curvature import state as state_module
from tests import reference
from tests.networks import assert_told_once, matrices, problem, tanh_network, variable

DAMPING = 2.0**-7
PLAIN = {"learning_rate": 0.25, "momentum": 0.0, "damping": DAMPING, "kl_clip": None, "fisher": "exact"}
OFTEN = {"curvature_interval": 2, "inverse_interval": 3, "seed": 1}


def _scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _fitted(strategy, build, optimizer, x, y, loss="mse", batch_size=8, epochs=2, **arguments):
    with _scope(strategy):
        model = build()
        model.compile(optimizer(), loss)
        model.optimizer.build(model.trainable_variables)
    history = model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **arguments)
    return model, history.history["loss"]


def _copies(one):
    return [copy.numpy() for copy in one.value.values]


def _assert_replicas_agree(model):
    for one in [*model.trainable_variables, *model.optimizer.variables]:
        first, second = _copies(one)
        np.testing.assert_array_equal(first, second, err_msg=one.path)


def _network():
    return tanh_network(dtype="float32")


class Interrupted(keras.layers.Layer):
    """Lets all replicas meet in the middle of the forward pass, as layers that keep running averages do."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, aggregation="mean")

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs


def _interrupted():
    model = _network()
    first, second = model.layers
    return keras.Sequential([keras.Input((4,)), first, Interrupted(), second], name="network")


def _images():
    keras.utils.set_random_seed(2)
    layers = [KPSVDConv2D(3, 3, activation="relu"), keras.layers.Flatten(), KPSVDDense(3, activation="softmax")]
    return keras.Sequential([keras.Input((6, 6, 1)), *layers])


def _two_outputs():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    hidden = KPSVDDense(5, activation="tanh")(inputs)
    return keras.Model(inputs, [KPSVDDense(2)(hidden), KPSVDDense(3, activation="softmax")(hidden)])


CASES = {
    "defaults": (_network, {}),
    # λ held: where it has fallen to its floor, a step multiplies rounding along directions that hardly matter.
    "kpsvd": (_network, {"method": "kpsvd", "damping": 0.01}),
    "kfac_corrected, empirical": (_network, {"method": "kfac_corrected", "fisher": "empirical", "use_ema": True}),
    "given rate, exact": (_network, {**PLAIN, "momentum": 0.5, "kl_clip": 1e-2, "weight_decay": 0.1}),
    "nesterov": (_network, {**PLAIN, "momentum": 0.5, "nesterov": True}),
    "few rows": (_network, {"fisher_batch_size": 5}),
    "replicas meet in the forward pass": (_interrupted, {}),
}


SHORT = ("defaults", "replicas meet in the forward pass")


@pytest.mark.parametrize(
    "case", [case if case in SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_losses_and_weights_are_those_of_one_device_and_replicas_agree(strategy, case):
    build, options = CASES[case]
    x, y = problem(rows=40, dtype="float32")
    (one, alone), (two, together) = (
        _fitted(where, build, lambda: KPSVD(**OFTEN, **options), x, y) for where in (None, strategy)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    for here, there in zip(two.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)
    assert variable(two.optimizer, "updates") == 10
    _assert_replicas_agree(two)
    assert "compute_loss" not in vars(two)


@pytest.mark.parametrize("eigenvalues", ["kronecker", "corrected"])
def test_layers_are_refreshed_and_decomposed_on_both_devices(strategy, eigenvalues, monkeypatch):
    """Each layer on one of them, in the graph of the step. (Corrected eigenvalues are decomposed in refreshes.)"""
    places, sound = {"_refresh": [], "_invert": []}, state_module.traced_once

    def noted(function, *arguments, **options):
        values, good = sound(function, *arguments, **options)
        places[function.__name__].append({tf.DeviceSpec.from_string(one.device).device_index for one in values})
        return values, good

    for module in (state_module, inverses):
        monkeypatch.setattr(module, "traced_once", noted)
    x, y = problem(rows=8, dtype="float32")
    _fitted(strategy, _network, lambda: KPSVD(eigenvalues=eigenvalues, seed=1), x, y, epochs=1)
    for name, calls in places.items():
        corrected = name == "_invert" and eigenvalues == "corrected"
        assert sorted(calls, key=min) == ([] if corrected else [{0}, {1}])


@pytest.mark.slow
def test_convolutions_classes_and_sample_weights_are_those_of_one_device(strategy):
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(24, 6, 6, 1)).astype("float32"), rng.integers(0, 3, 24), rng.random(24)
    losses = [
        _fitted(where, _images, lambda: KPSVD(**OFTEN), x, y, "sparse_categorical_crossentropy", sample_weight=weights)[
            1
        ]
        for where in (None, strategy)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_several_outputs_are_those_of_one_device(strategy, fisher):
    x, y = problem(rows=24, dtype="float32")
    targets = [y, keras.ops.one_hot(np.arange(24) % 3, 3).numpy()]
    losses = [
        _fitted(
            where, _two_outputs, lambda: KPSVD(fisher=fisher, **OFTEN), x, targets, ["mse", "categorical_crossentropy"]
        )[1]
        for where in (None, strategy)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("rows", [5, 1])
def test_on_an_uneven_batch_curvature_weights_examples_alike_and_the_gradient_is_kerass(strategy, rows):
    """Kept to one step: an even batch leaves the optimizer's state, the uneven one is held against the oracle."""
    x, y = problem(rows=8 + rows)
    with strategy.scope():
        model = tanh_network()
        model.compile(KPSVD(method="kfac", **PLAIN, curvature_interval=1, inverse_interval=1, factor_decay=0.0), "mse")
    steps = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(matrices(model)))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[watch])
    before, after = steps
    x, y = x[8:], y[8:]
    halves = np.array_split(np.arange(rows), 2)
    parts = [reference.squared_error_gradients(before, x[half], y[half]) for half in halves if len(half)]
    samples = reference.squared_error_samples(before, x)
    for layer, sample in enumerate(samples):
        gradient = sum(part[layer] for part in parts) / 2
        step = reference.rule_solve(reference.method_terms(*sample, "kfac"), gradient, DAMPING)
        error = np.linalg.norm(after[layer] - before[layer] + 0.25 * step)
        assert error <= 1e-6 * np.linalg.norm(0.25 * step)
    _assert_replicas_agree(model)


def test_with_defaults_a_device_without_rows_is_no_reason_to_lose_a_step(strategy):
    """The last of three batches is one row; the factors are refreshed by it."""
    x, y = problem(rows=17, dtype="float32")
    with strategy.scope():
        model = _network()
        model.compile(KPSVD(seed=1), "mse")
    weights = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[watch])
    assert all(np.isfinite(one.numpy()).all() for one in [*model.variables, *model.optimizer.variables])
    for before, after in itertools.pairwise(weights):
        assert all(not np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert variable(model.optimizer, "updates") == 6
    assert [v.numpy() for v in model.optimizer.variables if v.name.endswith("_refreshes")] == [6, 6]
    _assert_replicas_agree(model)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_factors_of_an_uneven_batch_are_those_of_one_device(strategy, fisher):
    """Steps too short to matter; Keras's own loss weights the examples of the smaller part more."""
    x, y = problem(rows=9, dtype="float32")
    options = {"learning_rate": 1e-9, "damping": 1.0, "fisher": fisher, "curvature_interval": 1, "seed": 1}
    factors = []
    for where in (None, strategy):
        model, _ = _fitted(where, _network, lambda: KPSVD(**options), x, y, batch_size=6, epochs=1)
        factors.append([factor.numpy() for block in model.optimizer._blocks for factor in block.blocks[0].factors[0]])
    for one, other in zip(*factors, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_has_curvature_on_every_device(strategy, policy):
    """The step of float16 is traced by other threads than the forward pass. (Conjugate gradients would multiply the
    rounding of half precision, in which the replicas differ.)
    """

    def build():
        keras.utils.set_random_seed(0)
        layers = [KPSVDDense(8, activation="tanh"), KPSVDDense(2, dtype="float32")]
        return keras.Sequential([keras.Input((4,)), *layers])

    x, y = problem(rows=40, dtype="float32")
    keras.config.set_dtype_policy(policy)
    try:
        (_, alone), (model, together) = (
            _fitted(where, build, lambda: KPSVD(**OFTEN, conjugate_steps=1), x, y, epochs=3)
            for where in (None, strategy)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(together, alone, rtol=0.1)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert [int(v.numpy()) for v in optimizer.variables if v.name.endswith("_refreshes")] == [8, 8]
    _assert_replicas_agree(model)


@pytest.mark.parametrize("row", [0, 7])
def test_nan_on_one_device_skips_the_step_on_both(strategy, row):
    x, y = problem(rows=16, dtype="float32")
    x[8 + row] = np.nan
    with strategy.scope():
        model = _network()
        model.compile(KPSVD(**OFTEN), "mse")
    seen = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(model.get_weights()))
    with pytest.warns(
        RuntimeWarning, match="skipped a step: the gradient of layer 'network/dense0', 'network/out'"
    ) as told:
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[watch])
    assert_told_once(told)
    for before, after in zip(*seen, strict=True):
        np.testing.assert_array_equal(before, after)
    assert variable(model.optimizer, "updates") == 1
    _assert_replicas_agree(model)


@pytest.mark.slow
def test_a_run_saved_under_the_strategy_goes_on_bit_for_bit(strategy, tmp_path):
    x, y = problem(rows=40, dtype="float32")
    model, _ = _fitted(strategy, _network, lambda: KPSVD(**OFTEN, method="kfac_corrected"), x, y, epochs=1)
    model.save(tmp_path / "m.keras")
    with strategy.scope():
        loaded = keras.models.load_model(tmp_path / "m.keras")
    for one in (model, loaded):
        one.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    values = [[v.numpy() for v in [*one.variables, *one.optimizer.variables]] for one in (model, loaded)]
    for here, there in zip(*values, strict=True):
        np.testing.assert_array_equal(here, there)
    _assert_replicas_agree(loaded)


@pytest.mark.parametrize("argument", ["gradient_accumulation_steps", "ema_overwrite_frequency"])
def test_what_keras_does_inside_a_branch_is_refused_by_name(strategy, argument):
    x, y = problem(rows=16, dtype="float32")
    with pytest.raises(ValueError, match=f"`{argument}` does not work on several devices"):
        _fitted(strategy, _network, lambda: KPSVD(use_ema=True, **{argument: 2}), x, y)


@pytest.mark.parametrize("eager", [True, False])
def test_steps_per_execution_is_refused_by_name(strategy, eager):
    """Where TensorFlow would end the loop with an error of its own, and eagerly never end it."""
    x, y = problem(rows=32, dtype="float32")
    with strategy.scope():
        model = _network()
        model.compile(KPSVD(seed=1), "mse", steps_per_execution=2, run_eagerly=eager)
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be 1 .* steps_per_execution=2 with 2 replicas"):
        model.fit(x, y, batch_size=8, verbose=0)


def test_steps_per_execution_has_no_meaning_in_a_hand_written_loop(strategy):
    x, y = problem(rows=8, dtype="float32")
    with strategy.scope():
        model = _network()
        model.compile(KPSVD(seed=1), "mse", steps_per_execution=2)
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)

    def step():
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_mean((model(x, training=True) - y) ** 2) / 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    tf.function(lambda: strategy.run(step))()
    assert variable(optimizer, "updates") == 1


def test_a_strategy_that_does_not_mirror_variables_is_refused():
    with (
        tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"]).scope(),
        pytest.raises(ValueError, match="Received: CentralStorageStrategy with 2 replicas"),
    ):
        KPSVD().build(_network().trainable_variables)
