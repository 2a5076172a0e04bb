"""Layers and variables that are frozen, before and after `compile`, and optimizers that outlive their model's shape."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from tests import reference
from tests.contract.oracle import EVERY_STEP, PLAIN, assert_steps, moved, solved, squared_error_directions
from tests.networks import compiled, matrices, problem, tanh_network


def _fit(model, x, y):
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    return matrices(model)


def test_a_frozen_layer_keeps_every_bit_and_steps_again_once_unfrozen_and_compiled_anew():
    x, y = problem()
    model = tanh_network()
    hidden = model.layers[0]
    hidden.trainable = False
    model.compile(KPSVD(**PLAIN), "mse")
    start = matrices(model)
    frozen = _fit(model, x, y)
    np.testing.assert_array_equal(frozen[0], start[0])
    assert_steps(frozen[1:], moved(start, squared_error_directions(start, x, y))[1:], start[1:])
    hidden.trainable = True
    model.compile(KPSVD(**PLAIN), "mse")
    assert_steps(_fit(model, x, y), moved(frozen, squared_error_directions(frozen, x, y)), frozen)


@pytest.mark.parametrize("eager", [False, True])
def test_a_layer_frozen_after_the_optimizer_was_built_keeps_every_bit_and_the_others_step(eager):
    """As after `load_model`, which builds the optimizer: Keras then applies fewer gradients than it built for."""
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(**PLAIN, **EVERY_STEP), run_eagerly=eager)
    model.layers[0].trainable = False
    start = matrices(model)
    now = _fit(model, x, y)
    np.testing.assert_array_equal(now[0], start[0])
    assert_steps(now[1:], moved(start, squared_error_directions(start, x, y))[1:], start[1:])


@pytest.mark.parametrize("options", [{}, {**PLAIN, "learning_rate": 0.01, "kl_clip": 1e-7}], ids=["adaptive", "given"])
def test_a_kernel_whose_bias_was_frozen_after_the_optimizer_was_built_takes_sgds_step(options):
    """Its block needs both. Neither the fitted rate, nor the scale of the bound, is meant for a raw gradient."""
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(**options))
    model.layers[0].bias.trainable = False
    start = matrices(model)
    gradient = reference.squared_error_gradients(start, x, y)[0]
    now = _fit(model, x, y)
    np.testing.assert_array_equal(now[0][-1], start[0][-1])
    assert_steps([now[0][:-1]], [start[0][:-1] - 0.01 * gradient[:-1]], [start[0][:-1]])


def test_a_bias_frozen_from_the_start_leaves_its_kernel_to_sgd_and_the_layer_is_named():
    x, y = problem()
    model = tanh_network()
    model.layers[0].bias.trainable = False
    model.compile(KPSVD(**PLAIN), "mse")
    start = matrices(model)
    gradients = reference.squared_error_gradients(start, x, y)
    gradients[0][-1] = 0
    out = solved(reference.squared_error_samples(start, x)[1:], gradients[1:])
    with pytest.warns(UserWarning, match="without curvature: network/dense0"):
        now = _fit(model, x, y)
    assert_steps(now, moved(start, [gradients[0], *out]), start)


def test_one_optimizer_for_other_variables_is_refused_in_keras_words_and_nothing_moves():
    x, y = problem()
    model = tanh_network()
    model.layers[0].trainable = False
    model.compile(KPSVD(**PLAIN), "mse", run_eagerly=True)
    _fit(model, x, y)
    before = matrices(model)
    model.layers[0].trainable = True
    model.compile(model.optimizer, "mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"Unknown variable(?s:.*)recreate a new optimizer"):
        _fit(model, x, y)
    for now, wanted in zip(matrices(model), before, strict=True):
        np.testing.assert_array_equal(now, wanted)


def test_recompiling_with_another_loss_changes_the_curvature_to_that_losses():
    """The same optimizer, state and all; the next refresh is of the sum, with ten times the gradient and curvature."""
    x, y = problem()
    model = tanh_network()
    optimizer = KPSVD(**PLAIN, **EVERY_STEP)
    model.compile(optimizer, "mse")
    weights = _fit(model, x, y)
    model.compile(optimizer, keras.losses.MeanSquaredError(reduction="sum"))
    samples = [(a, np.sqrt(10) * g) for a, g in reference.squared_error_samples(weights, x)]
    gradients = [10 * g for g in reference.squared_error_gradients(weights, x, y)]
    assert_steps(_fit(model, x, y), moved(weights, solved(samples, gradients)), weights, 1e-5)


class _Scaled(keras.layers.Layer):
    """A variable that Keras overwrites with its gradient, as 8-bit training does with its scales."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.scale.overwrite_with_gradient = True

    def call(self, inputs):
        @tf.custom_gradient
        def scaled(values, scale):
            return tf.identity(values), lambda upstream: (upstream, tf.reduce_max(tf.abs(values)))

        return scaled(inputs, tf.convert_to_tensor(self.scale))


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "damping": 0.1}], ids=["adaptive", "given"])
def test_variables_that_their_gradients_overwrite_are_overwritten(options):
    x, y = problem(dtype="float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), _Scaled(), KPSVDDense(2, name="out")])
    model.compile(KPSVD(**options), "mse")
    start = matrices(model)
    now = _fit(model, x, y)
    assert float(model.layers[0].scale) == np.abs(x).max()
    assert reference.squared_error_gradients(start, x, y)[0].ravel() @ (now[0] - start[0]).ravel() < 0
