"""Steps whose forward pass nobody recorded: said once, harmless, and nothing is concluded from them."""

import warnings

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD
from keras_kpsvd.curvature import extrapolation
from keras_kpsvd.curvature.damping import control_after
from keras_kpsvd.curvature.extrapolation import KeptModel, needs_exact_fit
from tests import reference
from tests.networks import compiled, matrices, problem, tanh_network, variable

TOLD = "saw no forward pass.*training=True"


def _stepper(model, optimizer, in_graph, **arguments):
    """One step of a hand-written loop, `arguments` passed on to the model."""

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, **arguments) - y))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    return tf.function(step) if in_graph else step


def _told(caught):
    return [str(one.message) for one in caught if "saw no forward pass" in str(one.message)]


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("in_graph", [True, False])
def test_a_loop_without_training_mode_is_told_once_and_descends_by_the_gradient(in_graph, built):
    model, optimizer = tanh_network(), KPSVD(likelihood="normal")
    if built:
        optimizer.build(model.trainable_variables)
    x, y = (tf.constant(values) for values in problem())
    step, velocity = _stepper(model, optimizer, in_graph), 0.0
    with pytest.warns(UserWarning, match=TOLD) as caught:
        for _ in range(4):
            start = matrices(model)
            step(x, y)
            gradients = reference.squared_error_gradients(start, x.numpy(), y.numpy())
            gradient = np.concatenate([one.reshape(-1) for one in gradients])
            velocity = 0.9 * velocity - 0.01 * gradient
            moved = [now - before for now, before in zip(matrices(model), start, strict=True)]
            np.testing.assert_allclose(np.concatenate([one.reshape(-1) for one in moved]), velocity, rtol=1e-6)
    assert len(_told(caught)) == 1


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_loop_in_training_mode_is_told_nothing(in_graph):
    model, optimizer = tanh_network(), KPSVD(likelihood="normal")
    step = _stepper(model, optimizer, in_graph, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(3):
            step(*(tf.constant(values) for values in problem(seed=seed)))
    assert variable(optimizer, "updates") == 3


def test_what_follows_an_unrecorded_step_is_as_if_there_had_been_none(monkeypatch):
    """λ goes on by what was known before, and the next model is exact: the last one was of another step."""
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 1)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 1)
    intervals = {"curvature_interval": 100, "inverse_interval": 100, "fit_interval": 100}
    model = compiled(tanh_network(), KPSVD(likelihood="normal", **intervals))
    x, y = problem()
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    before = variable(model.optimizer, "slope_averages")
    with pytest.warns(UserWarning, match=TOLD):
        _stepper(model, model.optimizer, in_graph=False)(tf.constant(x), tf.constant(y))
    np.testing.assert_array_equal(variable(model.optimizer, "slope"), [0.0, 0.0])
    found = variable(model.optimizer, "slope_averages")
    model.train_on_batch(x, y)
    after = variable(model.optimizer, "slope_averages")
    assert found[0] < 0 and before[0] <= 0
    np.testing.assert_allclose(after, 0.8 * found, rtol=1e-6)
    assert variable(model.optimizer, "next_fit") == 3 + 100


def test_no_slope_is_no_evidence():
    values = [tf.constant(value, tf.float32) for value in ([0.0, 0.0], 0.5, [-2.0, -1.0], 7.0, -3.0, 1.0)]
    last, damping, averages = control_after(*values)
    np.testing.assert_allclose(averages, [-1.6, -0.8], rtol=1e-6)
    np.testing.assert_allclose(damping, 0.5 * 0.8, rtol=1e-6)  # By 1 + 0.8/1.6, as before.
    np.testing.assert_allclose(last, [0.0, -3.0])


def test_a_model_is_not_extrapolated_beyond_a_step_that_was_not_its_own():
    kept = KeptModel(tf.eye(2), tf.zeros([2, 2]), tf.constant(1.0), tf.constant([-1.0, 0.0]))
    slopes = [tf.constant(value) for value in (1.0, -1.0)]
    counts = [tf.constant(value, tf.int64) for value in (1000, 2000)]
    others = [tf.constant(False), tf.constant(500)]
    assert not needs_exact_fit(kept, tf.constant([0.0, -1.0]), *slopes, *counts, *others)
    assert needs_exact_fit(kept, tf.constant([0.0, 0.0]), *slopes, *counts, *others)
