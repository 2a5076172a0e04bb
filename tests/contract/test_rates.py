"""Learning rates that change: schedules, callables, callbacks, in graphs that were traced at another rate."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from tests import reference
from tests.contract.oracle import EVERY_STEP, PLAIN, assert_steps, moved, solved, squared_error_directions
from tests.networks import compiled, matrices, problem, tanh_network


def _follow(weights, batches, rates, decay=0.0):
    """Steps on batch after batch, each at its rate."""
    for (x, y), rate in zip(batches, rates, strict=True):
        step = squared_error_directions(weights, x, y)
        weights = moved([(1 - rate * decay) * w for w in weights], step, rate)
    return weights


def _rows(batches):
    return (np.concatenate(parts) for parts in zip(*batches, strict=True))


def test_a_schedule_is_followed_step_by_step_in_one_execution_of_a_graph():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [0.5, 0.25, 0.125])
    model = tanh_network()
    optimizer = KPSVD(**{**PLAIN, "learning_rate": schedule}, **EVERY_STEP, weight_decay=0.5)
    model.compile(optimizer, "mse", steps_per_execution=2)
    start = matrices(model)
    batches = [problem(seed=number) for number in range(4)]
    model.fit(*_rows(batches), batch_size=10, shuffle=False, verbose=0)
    expected = _follow(start, batches, [0.5, 0.25, 0.25, 0.125], decay=0.5)
    assert_steps(matrices(model), expected, start, 1e-5)


def test_a_callable_rate_is_asked_in_every_step():
    rate = tf.Variable(0.5)
    model = compiled(tanh_network(), KPSVD(**{**PLAIN, "learning_rate": lambda: rate}, **EVERY_STEP), run_eagerly=False)
    start = weights = matrices(model)
    for number, value in enumerate([0.5, 0.125, 0.25]):
        rate.assign(value)
        batch = problem(seed=number)
        model.train_on_batch(*batch)
        weights = _follow(weights, [batch], [value])
    assert_steps(matrices(model), weights, start, 1e-5)


class _Rates(keras.callbacks.Callback):
    """The rate after every epoch's callbacks."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))


@pytest.mark.parametrize("callback", ["LearningRateScheduler", "ReduceLROnPlateau"])
def test_a_rate_that_a_callback_sets_is_that_of_the_next_epochs_steps(callback):
    """Nothing is an improvement of 1e9: the plateau is seen after the second epoch, and after every later one."""
    one, expected = {
        "LearningRateScheduler": (keras.callbacks.LearningRateScheduler(lambda n, r: 0.5 / 2**n), [0.5, 0.25, 0.125]),
        "ReduceLROnPlateau": (
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9),
            [0.25, 0.25, 0.125],
        ),
    }[callback]
    x, y = problem()
    model = tanh_network()
    model.compile(KPSVD(**PLAIN, **EVERY_STEP), "mse")
    start = matrices(model)
    rates = _Rates()
    model.fit(x, y, batch_size=10, epochs=3, shuffle=False, verbose=0, callbacks=[one, rates])
    assert rates.seen == expected
    assert_steps(matrices(model), _follow(start, [(x, y)] * 3, expected), start, 1e-5)


def test_under_the_adaptive_rate_a_callback_sets_that_of_the_other_layers_only():
    """Newton's step for the instrumented layer, whatever the rate; the other has its own output and loss."""
    x, y = problem(rows=20, sizes=(4, 1))
    inputs = keras.Input((4,), dtype="float64")
    heads = [KPSVDDense(1, dtype="float64", name="curved"), keras.layers.Dense(1, dtype="float64", name="plain")]
    model = keras.Model(inputs, [head(inputs) for head in heads])
    model.compile(KPSVD(method="kfac", eigenvalues="kronecker", damping=1e-12), ["mse", "mse"])
    start = matrices(model)
    (gradient,) = reference.squared_error_gradients(start[1:], x, y)
    schedule = keras.callbacks.LearningRateScheduler(lambda *_: 0.5)
    model.fit(x, [y, y], batch_size=20, shuffle=False, verbose=0, callbacks=[schedule])
    best = np.linalg.lstsq(np.concatenate([x, np.ones((20, 1))], 1), y, rcond=None)[0]
    assert_steps(matrices(model), [best, start[1] - 0.5 * gradient], start, 1e-5)


def test_the_kl_bound_uses_the_rate_of_the_step():
    """`min(1, √(κ/(rate²·⟨Δ, ∇⟩)))`: binding at the first rate, not at the second."""
    clip = 1e-3
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 1e-3])
    model = tanh_network()
    model.compile(KPSVD(**{**PLAIN, "learning_rate": schedule, "kl_clip": clip}, **EVERY_STEP), "mse")
    start = weights = matrices(model)
    batches = [problem(seed=number) for number in range(2)]
    scales = []
    for (x, y), rate in zip(batches, [0.5, 1e-3], strict=True):
        gradients = reference.squared_error_gradients(weights, x, y)
        steps = solved(reference.squared_error_samples(weights, x), gradients)
        quadratic = rate**2 * sum(np.sum(g * d) for g, d in zip(gradients, steps, strict=True))
        scales.append(min(1, np.sqrt(clip / quadratic)))
        weights = moved(weights, steps, rate * scales[-1])
    assert scales[0] < 1 and scales[1] == 1
    model.fit(*_rows(batches), batch_size=10, shuffle=False, verbose=0)
    assert_steps(matrices(model), weights, start, 1e-5)


@pytest.mark.parametrize(
    ("options", "told"), [({}, True), ({"weight_decay": 0.1}, False), ({"learning_rate": 0.1}, False)]
)
def test_a_rate_that_nothing_trains_at_is_told_once(options, told):
    """Weight decay is at the rate that is set, also where every step is fitted."""
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(**options), run_eagerly=False)
    schedule = keras.callbacks.LearningRateScheduler(lambda *_: 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, batch_size=10, epochs=3, verbose=0)
        assert not [one for one in caught if "learning_rate" in str(one.message)]
        model.fit(x, y, batch_size=10, epochs=3, verbose=0, callbacks=[schedule])
    messages = [str(one.message) for one in caught if "has no effect" in str(one.message)]
    assert len(messages) == told
    assert all("ReduceLROnPlateau and LearningRateScheduler" in message for message in messages)
