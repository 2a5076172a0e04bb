"""What `KPSVD` survives in long runs: failures that go on, interruptions, passes without a step, extreme numbers."""

import _thread
import threading
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature import corrected, inverses
from keras_kpsvd.curvature import state as state_module
from keras_kpsvd.curvature.approximations import METHODS
from keras_kpsvd.curvature.failures import MAX_FAILURES
from keras_kpsvd.linalg import pack
from keras_kpsvd.tracing import graph_function
from tests import reference
from tests.networks import assert_same, assert_told_once, compiled, matrices, problem, state, tanh_network, variable

PLAIN = {"learning_rate": 0.25, "momentum": 0.0, "damping": 2.0**-7, "kl_clip": None, "fisher": "exact"}
EVERY_STEP = {"curvature_interval": 1, "inverse_interval": 1}


def _network():
    return tanh_network(dtype="float32")


@pytest.mark.parametrize("eager", [True, False])
def test_steps_skipped_twenty_times_in_a_row_end_training_with_everything_intact(eager):
    x, y = problem(dtype="float32")
    model = compiled(_network(), KPSVD(**EVERY_STEP), run_eagerly=eager)
    bad = np.full_like(x, np.nan)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        for _ in range(MAX_FAILURES - 1):
            model.train_on_batch(bad, y)
        model.train_on_batch(x, y)  # Ends the row.
        before = state(model)
        for _ in range(MAX_FAILURES - 1):
            model.train_on_batch(bad, y)
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"gradient of layer 'network/dense0'.*20 times in a row"
        ):
            model.train_on_batch(bad, y)
    assert_same(state(model), before)
    model.train_on_batch(x, y)
    assert variable(model.optimizer, "skipped_steps") == 0
    assert variable(model.optimizer, "updates") == 2


@pytest.mark.parametrize("eager", [True, False])
def test_a_skipped_step_leaves_averages_and_what_they_overwrite(eager):
    """The fourth batch, which is skipped, would be the one to overwrite the weights; the sixth does."""
    x, y = problem(dtype="float32")
    options = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    model = compiled(_network(), KPSVD(**options), run_eagerly=eager)
    for _ in range(3):
        model.train_on_batch(x, y)
    before = state(model)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.train_on_batch(np.full_like(x, np.nan), y)
    assert_same(state(model), before)
    for _ in range(2):
        model.train_on_batch(x, y)
    averages = model.optimizer._model_variables_moving_average
    for one, average in zip(model.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(one.numpy(), average.numpy())


def test_at_the_end_of_fit_averages_replace_the_weights_though_the_last_step_was_skipped():
    x, y = problem(rows=24, dtype="float32")
    x[20] = np.nan
    model = compiled(_network(), KPSVD(use_ema=True, ema_momentum=0.5), run_eagerly=False)
    start = [variable.numpy() for variable in model.trainable_variables]
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    averages = model.optimizer._model_variables_moving_average
    for one, average, before in zip(model.trainable_variables, averages, start, strict=True):
        np.testing.assert_array_equal(one.numpy(), average.numpy())
        assert not np.array_equal(one.numpy(), before)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("module", "broken", "eigenvalues", "counted", "said"),
    [
        (inverses, "invert_one_term", "kronecker", "inversion_failures", "its decomposition failed"),
        (state_module, "_batch_terms", "kronecker", "refresh_failures", "its new curvature is not finite"),
        (state_module, "_batch_terms", "corrected", "refresh_failures", "its new curvature is not finite"),
        (corrected, "factor_eigenbasis", "corrected", "refresh_failures", "its new curvature is not finite"),
    ],
)
def test_a_layer_that_fails_twenty_times_in_a_row_ends_training_by_name(
    monkeypatch, module, broken, eigenvalues, counted, said, eager
):
    """The steps before the twentieth are taken; its own is not."""
    sound = getattr(module, broken)

    def spoilt(first, *rest):
        result = sound(first, *rest)  # Of `_batch_terms` with a boolean behind, which stays.
        size = tf.shape(rest[0].activations)[-1] if broken == "_batch_terms" else tf.shape(first)[0]
        factor = tf.where(size == 5, np.nan, 1.0)
        return tf.nest.map_structure(
            lambda one: one if one.dtype == tf.bool else tf.cast(factor, one.dtype) * one, result
        )

    monkeypatch.setattr(module, broken, spoilt)
    graph_function.cache_clear()
    x, y = problem(dtype="float32")
    model = compiled(_network(), KPSVD(eigenvalues=eigenvalues, **EVERY_STEP), run_eagerly=eager)
    try:
        with pytest.warns(RuntimeWarning, match=f"'dense0': {said}"):
            for _ in range(MAX_FAILURES - 2):
                model.train_on_batch(x, y)
            first = model.get_weights()
            model.train_on_batch(x, y)
            before = model.get_weights()
            with pytest.raises(tf.errors.InvalidArgumentError, match=r"layer 'dense0'.*20 times in a row"):
                model.train_on_batch(x, y)
    finally:
        graph_function.cache_clear()
    assert variable(model.optimizer, counted).tolist() == [MAX_FAILURES, 0]
    assert variable(model.optimizer, "updates") == MAX_FAILURES - 1
    for then, last, now in zip(first, before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(now, last)
        assert not np.array_equal(now, then)
    assert all(np.isfinite(values).all() for values in state(model).values())


class Spoilt(keras.layers.Layer):
    """Passes on what it gets; its output, or its gradient, is spoilt while `value` is not 1."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.value = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, inputs):
        @tf.custom_gradient
        def function(values):
            factor = tf.convert_to_tensor(self.value)
            forward = values * factor if self.where == "activation" else values
            return tf.identity(forward), lambda upstream: upstream * factor

        return function(inputs)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("where", ["activation", "gradient"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_middle_of_a_network_skips_the_step_and_names_the_layers(where, value, eager):
    keras.utils.set_random_seed(0)
    spoilt = Spoilt(where)
    layers = [KPSVDDense(3, activation="tanh", name="before"), spoilt, KPSVDDense(2, name="after")]
    model = compiled(keras.Sequential([keras.Input((4,)), *layers], name="network"), KPSVD(), run_eagerly=eager)
    x, y = problem(dtype="float32")
    model.train_on_batch(x, y)
    before = state(model)
    spoilt.value.assign(value)
    # A bad gradient concerns the layers before it only.
    named = "'network/before', 'network/after'" if where == "activation" else "'network/before' holds"
    with pytest.warns(RuntimeWarning, match=f"the gradient of layer {named}") as told:
        model.train_on_batch(x, y)
    assert_told_once(told)
    spoilt.value.assign(1.0)
    assert_same(state(model), before)
    model.train_on_batch(x, y)
    assert variable(model.optimizer, "updates") == 2


EXTREMES = {
    "zero": lambda size: np.zeros((size, size)),
    "rank one": lambda size: np.outer(np.arange(1, size + 1), np.arange(1, size + 1)),
    "1e30": lambda size: 1e30 * np.eye(size),
    "1e-30": lambda size: 1e-30 * np.eye(size),
    "slightly indefinite": lambda size: np.diag(np.linspace(-1e-6, 1, size)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "eager"), [("kfac", False), ("deflation", True), ("kfac_corrected", True)])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_factors_leave_a_descent_direction_or_the_layer_falls_back(extreme, method, eager):
    """Given to every factor of every layer: the weights stay finite and no step is lost."""
    x, y = problem(dtype="float32")
    options = {"curvature_interval": 10**6, "inverse_interval": 1}
    model = compiled(_network(), KPSVD(method=method, seed=0, **options), run_eagerly=eager)
    model.train_on_batch(x, y)
    for block in model.optimizer._blocks:
        rows = [factor.shape[0] for pair in block.blocks[0].factors for factor in pair]
        for kept, size in zip(block.blocks[0].refresh_targets, rows, strict=False):
            kept.assign(pack(tf.constant(EXTREMES[extreme](size))))
    start = [model.train_on_batch(x, y) for _ in range(4)]
    assert all(np.isfinite(one).all() for one in state(model).values())
    assert np.isfinite(start).all() and start[-1] <= start[0]
    assert variable(model.optimizer, "skipped_steps") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "eager"), [*((method, False) for method in METHODS), ("kfac", True), ("kfac_corrected", True)]
)
def test_a_dead_layer_that_lives_again_trains_as_one_that_never_died(method, eager):
    """While it is dead its curvature is zero; the first refresh afterwards brings it back."""
    keras.utils.set_random_seed(0)
    hidden = KPSVDDense(6, activation="relu")
    model = keras.Sequential([keras.Input((4,)), hidden, KPSVDDense(2)])
    compiled(model, KPSVD(method=method, seed=0, **EVERY_STEP), run_eagerly=eager)
    x, y = problem(rows=20, dtype="float32")
    bias = hidden.bias.numpy()
    hidden.bias.assign(bias - 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(3):
            model.train_on_batch(x, y)
        kernel = hidden.kernel.numpy()
        hidden.bias.assign(bias)
        losses = [model.train_on_batch(x, y) for _ in range(15)]
    assert not np.array_equal(hidden.kernel.numpy(), kernel)
    assert losses[-1] < 0.5 * losses[0]
    assert all(np.isfinite(one).all() for one in state(model).values())


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("learning_rate", ["adaptive", 0.25])
def test_sample_weights_of_zero_leave_every_weight_where_it_was(eager, learning_rate):
    x, y = problem(dtype="float32")
    options = {**PLAIN, "fisher": "sampled"} if learning_rate != "adaptive" else {}
    model = compiled(_network(), KPSVD(**options, **EVERY_STEP), run_eagerly=eager)
    before = model.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(2):
            model.train_on_batch(x, y, sample_weight=np.zeros(len(x), "float32"))
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    losses = [model.train_on_batch(x, y, sample_weight=np.ones(len(x), "float32")) for _ in range(10)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


class Stops(keras.callbacks.Callback):
    """Raises after a number of batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.batches:
            raise RuntimeError("the user's own")


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_an_exception_in_a_callback_leaves_whole_steps_and_training_goes_on(eager):
    x, y = problem(rows=48, dtype="float32")
    results = []
    for stopped in (False, True):
        model = compiled(_network(), KPSVD(curvature_interval=2, inverse_interval=3, seed=1), run_eagerly=eager)
        fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
        if stopped:
            with pytest.raises(RuntimeError, match="the user's own"):
                model.fit(x, y, callbacks=[Stops(4)], **fit)
            assert variable(model.optimizer, "updates") == 4
            model.fit(x[32:], y[32:], **fit)
        else:
            model.fit(x, y, **fit)
        results.append(state(model, but=()))
    assert_same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_ctrl_c_at_any_moment_leaves_whole_steps(eager):
    """The states after every step are known; an interrupted run must be at one of them, and goes on from there."""
    x, y = problem(rows=8, dtype="float32")
    model = compiled(_network(), KPSVD(curvature_interval=2, inverse_interval=3, seed=1), run_eagerly=eager)
    start = [v.numpy() for v in [*model.variables, *model.optimizer.variables]]
    steps = 30 if eager else 60
    data = (np.tile(x, (steps, 1)), np.tile(y, (steps, 1)))
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    states = [state(model, but=())]
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: states.append(state(model, but=())))
    model.fit(*data, callbacks=[note], **fit)
    begin = time.perf_counter()
    for one, value in zip([*model.variables, *model.optimizer.variables], start, strict=True):
        one.assign(value)
    model.fit(*data, **fit)
    seconds = time.perf_counter() - begin

    interrupted = 0
    for part in np.linspace(0.1, 0.9, 6):
        for one, value in zip([*model.variables, *model.optimizer.variables], start, strict=True):
            one.assign(value)
        timer = threading.Timer(part * seconds, _thread.interrupt_main)
        timer.start()
        try:
            model.fit(*data, **fit)
        except KeyboardInterrupt:
            interrupted += 1
        timer.cancel()
        # The metrics of an unfinished epoch are of no interest.
        now, done = state(model, but=()), int(variable(model.optimizer, "updates"))
        kept = {name for name in now if "metric" not in name and "loss" not in name}
        assert_same({n: v for n, v in now.items() if n in kept}, {n: v for n, v in states[done].items() if n in kept})
    assert interrupted >= 2


def test_a_last_smaller_batch_is_stepped_with_as_any_other():
    x, y = problem(rows=13)
    model = compiled(tanh_network(), KPSVD(method="kfac", **PLAIN, **EVERY_STEP, factor_decay=0.0), run_eagerly=False)
    seen = []
    watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(matrices(model)))
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0, callbacks=[watch])
    before, after = seen[-2:]
    gradients = reference.squared_error_gradients(before, x[12:], y[12:])
    samples = reference.squared_error_samples(before, x[12:])
    for now, was, gradient, sample in zip(after, before, gradients, samples, strict=True):
        step = reference.rule_solve(reference.method_terms(*sample, "kfac"), gradient, PLAIN["damping"])
        assert np.linalg.norm(now - was + 0.25 * step) <= 1e-6 * np.linalg.norm(0.25 * step)
