"""`KPSVD` beside other optimizers in one model."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD, KPSVDDense
from tests import reference
from tests.contract.oracle import EVERY_STEP, PLAIN, assert_steps, moved, solved
from tests.networks import matrices, problem, tanh_network

pytestmark = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="MultiOptimizer came with a later Keras"
)


def _both(inner, others, **arguments):
    """`inner` for the hidden layer, `others` for the output layer."""
    chosen = keras.optimizers.OptimizerMap(others, {"dense0/.*": inner, "network/dense0/.*": inner})
    return keras.optimizers.MultiOptimizer(chosen, **arguments)


@pytest.mark.parametrize(("eager", "scale"), [(False, None), (True, None), (False, 1000.0)])
def test_each_optimizer_steps_with_its_own_variables(eager, scale):
    model = tanh_network()
    optimizer = _both(KPSVD(**PLAIN, **EVERY_STEP), keras.optimizers.SGD(0.5), loss_scale_factor=scale)
    model.compile(optimizer, "mse", run_eagerly=eager)
    optimizer.build(model.trainable_variables)
    start = weights = matrices(model)
    for number in range(3):
        x, y = problem(seed=number)
        gradients = reference.squared_error_gradients(weights, x, y)
        hidden = solved(reference.squared_error_samples(weights, x)[:1], gradients[:1])
        weights = [*moved(weights[:1], hidden), weights[1] - 0.5 * gradients[1]]
        model.train_on_batch(x, y)
    assert_steps(matrices(model), weights, start, 1e-5)


def test_two_of_the_kind_with_other_settings_each_see_the_same_pass():
    """Both record, each takes its own; dampings and rates are their own."""
    model = tanh_network()
    optimizer = _both(
        KPSVD(**PLAIN, **EVERY_STEP),
        KPSVD(**{**PLAIN, "learning_rate": 0.125, "damping": 0.5}, **EVERY_STEP),
    )
    model.compile(optimizer, "mse")
    start = weights = matrices(model)
    for number in range(3):
        x, y = problem(seed=number)
        gradients = reference.squared_error_gradients(weights, x, y)
        samples = reference.squared_error_samples(weights, x)
        hidden = solved(samples[:1], gradients[:1])
        out = solved(samples[1:], gradients[1:], damping=0.5)
        weights = [*moved(weights[:1], hidden), *moved(weights[1:], out, 0.125)]
        model.train_on_batch(x, y)
    assert_steps(matrices(model), weights, start, 1e-5)


def test_the_adaptive_step_of_one_layer_is_fitted_with_the_others_held():
    """An output layer alone under `KPSVD`: Newton's step to the least squares fit of the hidden values."""
    x, y = problem(rows=20)
    model = tanh_network()
    optimizer = _both(keras.optimizers.SGD(0.5), KPSVD(method="kfac", fisher="exact", damping=1e-12))
    model.compile(optimizer, "mse")
    start = matrices(model)
    gradients = reference.squared_error_gradients(start, x, y)
    best = np.linalg.lstsq(reference.forward(start, x)[0][1], y, rcond=None)[0]
    model.train_on_batch(x, y)
    assert_steps(matrices(model), [start[0] - 0.5 * gradients[0], best], start, 1e-4)


def test_a_kernel_without_its_bias_trains_by_sgd_and_the_layer_is_named():
    x, y = problem(dtype="float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), KPSVDDense(2, name="torn")])
    chosen = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.5), {".*kernel": KPSVD(learning_rate=0.25)})
    model.compile(keras.optimizers.MultiOptimizer(chosen), "mse")
    start = matrices(model)
    (gradient,) = reference.squared_error_gradients(start, x, y)
    with pytest.warns(UserWarning, match="torn"):
        model.train_on_batch(x, y)
    expected = np.concatenate([start[0][:-1] - 0.25 * gradient[:-1], start[0][-1:] - 0.5 * gradient[-1:]])
    assert_steps(matrices(model), [expected], start, 1e-5)
