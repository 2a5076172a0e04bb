"""Convex problems, one layer and the whole batch: the optimum is known, and the defaults must find it."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature.approximations import METHODS
from tests.networks import matrices

pytestmark = pytest.mark.slow

ROWS, INPUTS, OUTPUTS = 60, 4, 3
SETTINGS = {"deadline": None, "derandomize": True}


class _Trained:
    """A compiled model that starts anew for each example: tracing a step takes seconds."""

    def __init__(self, loss, **options):
        keras.utils.set_random_seed(0)
        self.optimizer = KPSVD(seed=0, **options)
        self.model = keras.Sequential([keras.Input((INPUTS,)), KPSVDDense(OUTPUTS)])
        self.model.compile(self.optimizer, loss)
        self.optimizer.build(self.model.trainable_variables)
        self.start = [variable.numpy() for variable in self.optimizer.variables]

    def epochs(self, weights, x, y, steps=60):
        """The weights at the start and after each epoch, of one batch."""
        for variable, value in zip(self.optimizer.variables, self.start, strict=True):
            variable.assign(value)
        self.model.layers[-1].set_weights([weights[:-1], weights[-1]])
        found = matrices(self.model)
        for _ in range(steps):
            self.model.train_on_batch(x.astype("float32"), y.astype("float32"))
            found += matrices(self.model)
        return found


@functools.cache
def _trained(loss, method, **options):
    losses = {"mse": keras.losses.MeanSquaredError(), "bce": keras.losses.BinaryCrossentropy(from_logits=True)}
    return _Trained(losses[loss], method=method, **options)


@st.composite
def _regressions(draw):
    """Correlated inputs of several sizes, and noise, so that the optimum is not zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    spread = 10.0 ** rng.uniform(-draw(st.sampled_from([0.0, 1.0])), 0, INPUTS)
    x = rng.normal(size=(ROWS, INPUTS)) @ (np.eye(INPUTS) + 0.5 * rng.normal(size=(INPUTS, INPUTS))) * spread
    x = 10.0 ** draw(st.integers(-1, 1)) * x + draw(st.sampled_from([0.0, 1.0]))
    z = x @ rng.normal(size=(INPUTS, OUTPUTS)) / np.abs(x).max() + rng.normal(size=(ROWS, OUTPUTS))
    return 0.1 * rng.normal(size=(INPUTS + 1, OUTPUTS)), x.astype("float32").astype("float64"), z


def _with_ones(x):
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def _squared_error(weights, x, y):
    return np.mean((_with_ones(x) @ weights - y) ** 2)


def _cross_entropy(weights, x, y):
    z = _with_ones(x) @ weights
    return np.mean(np.logaddexp(0, z) - y * z)


def _least_squares(x, y):
    return _squared_error(np.linalg.lstsq(_with_ones(x), y, rcond=None)[0], x, y)


def _logistic_optimum(x, y):
    """Newton's method, steps halved until they descend, one output after the other."""
    losses = []
    for target in y.T:
        weights, step = np.zeros(x.shape[1] + 1), np.inf
        while np.abs(step).max() > 1e-9:
            p = 1 / (1 + np.exp(-_with_ones(x) @ weights))
            hessian = (_with_ones(x) * (p * (1 - p))[:, None]).T @ _with_ones(x)
            step = np.linalg.solve(hessian, _with_ones(x).T @ (p - target))
            while _cross_entropy(weights - step, x, target) > _cross_entropy(weights, x, target) + 1e-15:
                step = step / 2
            weights = weights - step
        losses.append(_cross_entropy(weights, x, target))
    return np.mean(losses)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, **SETTINGS)
@given(case=_regressions())
def test_the_loss_of_linear_regression_falls_in_every_epoch_to_the_least_squares_fit(method, case):
    """The quadratic model is the loss itself and `M(0) = 0`: its minimiser on any two directions cannot be above."""
    losses, best = _losses_and_best(_trained("mse", method), *case)
    # Weights are rounded to float32.
    assert (np.diff(losses) <= 1e-6 * losses[:-1]).all()
    # λ has its floor: directions of less than some thousandths of the curvature that gradients see take their time.
    assert losses[-1] - best < 0.1 * (losses[0] - best)


@settings(max_examples=10, **SETTINGS)
@given(case=_regressions())
def test_with_less_damping_linear_regression_ends_nearer_to_the_fit(case):
    losses, best = _losses_and_best(_trained("mse", "kfac", damping=1e-4), *case)
    assert (np.diff(losses) <= 1e-6 * losses[:-1]).all()
    assert losses[-1] - best < 0.02 * (losses[0] - best)


def _losses_and_best(trained, weights, x, y):
    found = trained.epochs(weights, x, y)
    return np.array([_squared_error(one, x, y) for one in found]), _least_squares(x, y)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, **SETTINGS)
@given(case=_regressions())
def test_the_loss_of_logistic_regression_ends_near_the_optimum(method, case):
    weights, x, z = case
    y = (np.random.default_rng(0).random(z.shape) < 1 / (1 + np.exp(-z))).astype(float)
    found = _trained("bce", method).epochs(weights, x, y)
    losses, best = np.array([_cross_entropy(one, x, y) for one in found]), _logistic_optimum(x, y)
    assert losses.argmax() == 0
    assert -1e-9 < losses[-1] - best < 0.1 * (losses[0] - best)
