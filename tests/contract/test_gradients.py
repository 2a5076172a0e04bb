"""What Keras does to the gradient before a step, or to the weights after it, it does around the preconditioning."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD, KPSVDDense
from tests import reference
from tests.contract.oracle import (
    EVERY_STEP,
    PLAIN,
    assert_steps,
    gradients_at,
    moved,
    samples_at,
    solved,
    squared_error,
)
from tests.networks import compiled, matrices, problem, tanh_network


def _parts(gradients):
    """Kernels and biases, which Keras clips one by one."""
    return [part for gradient in gradients for part in (gradient[:-1], gradient[-1:])]


def _together(parts):
    return [np.concatenate(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def _clip(gradients, clipnorm=None, global_clipnorm=None, clipvalue=None):
    parts = _parts(gradients)
    norms = [np.linalg.norm(part) for part in parts]
    if clipnorm:
        scales = [min(1, clipnorm / norm) for norm in norms]
    elif global_clipnorm:
        scales = [min(1, global_clipnorm / np.linalg.norm(norms))] * len(parts)
    else:
        return _together([np.clip(part, -clipvalue, clipvalue) for part in parts])
    return _together([scale * part for scale, part in zip(scales, parts, strict=True)])


# Each one leaves some of the gradient's parts alone or, the global one, changes the proportions of none.
CLIPPINGS = [{"clipnorm": 0.2}, {"global_clipnorm": 0.2}, {"clipvalue": 0.1}]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
def test_the_gradient_is_clipped_first_and_preconditioned_then(clipping, eager):
    x, y = problem()
    model = tanh_network()
    model.compile(KPSVD(**PLAIN, **clipping), "mse", run_eagerly=eager)
    model.optimizer.build(model.trainable_variables)
    start = matrices(model)
    gradients = reference.squared_error_gradients(start, x, y)
    clipped = _clip(gradients, **clipping)
    assert any(np.linalg.norm(c - g) > 0.1 * np.linalg.norm(g) for c, g in zip(clipped, gradients, strict=True))
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), moved(start, solved(reference.squared_error_samples(start, x), clipped)), start)


def test_under_accumulation_the_mean_gradient_is_clipped_and_not_its_parts():
    x, y = problem(rows=12)
    y[6:] *= -3
    model = tanh_network()
    model.compile(KPSVD(**PLAIN, global_clipnorm=0.2, gradient_accumulation_steps=2), "mse")
    start = matrices(model)
    whole = _clip(reference.squared_error_gradients(start, x, y), global_clipnorm=0.2)
    halves = [
        _clip(reference.squared_error_gradients(start, x[part], y[part]), global_clipnorm=0.2)
        for part in (slice(6), slice(6, 12))
    ]
    assert np.linalg.norm(whole[0] - np.mean([half[0] for half in halves], 0)) > 0.1 * np.linalg.norm(whole[0])
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    samples = reference.squared_error_samples(start, x[6:])
    assert_steps(matrices(model), moved(start, solved(samples, whole)), start)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_scaled_loss_is_scaled_neither_in_the_gradient_nor_in_the_curvature(fisher):
    """The empirical Fisher matrix is made of the loss itself."""
    x, y = problem()
    model = tanh_network()
    model.compile(KPSVD(**{**PLAIN, "fisher": fisher}, loss_scale_factor=1000.0), "mse")
    start = matrices(model)
    outputs = reference.forward(start, x)[1]
    slopes, roots = squared_error(outputs, y, np.ones(len(x)))
    if fisher == "empirical":  # The curvature of (1/c) Σ −log p: the score of all outputs at the actual targets.
        roots = (len(x) * slopes * np.sqrt(outputs.shape[1]))[:, None, :]
    expected = moved(start, solved(samples_at(start, x, roots), gradients_at(start, x, slopes)))
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), expected, start)


def test_regularizers_enter_the_gradient_and_not_the_curvature():
    x, y = problem(sizes=(4, 2), dtype="float32")
    model = keras.Sequential([keras.Input((4,)), KPSVDDense(2, kernel_regularizer=keras.regularizers.L2(0.5))])
    compiled(model, KPSVD(**PLAIN))
    start = matrices(model)
    (gradient,) = reference.squared_error_gradients(start, x, y)
    gradient[:-1] += 2 * 0.5 * start[0][:-1]
    expected = moved(start, solved(reference.squared_error_samples(start, x), [gradient]))
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), expected, start, 1e-5)


def test_constraints_hold_after_every_preconditioned_step():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="float64"),
            KPSVDDense(2, dtype="float64", kernel_constraint=keras.constraints.NonNeg(), bias_initializer="ones"),
        ]
    )
    compiled(model, KPSVD(**PLAIN, **EVERY_STEP))
    weights, cut = matrices(model), []
    for number in range(3):
        x, y = problem(sizes=(4, 2), seed=number)
        samples = reference.squared_error_samples(weights, x)
        start = weights
        (free,) = moved(weights, solved(samples, reference.squared_error_gradients(weights, x, y)))
        weights = [np.concatenate([np.maximum(free[:-1], 0), free[-1:]])]
        cut.append(np.any(free[:-1] < 0))
        model.train_on_batch(x, y)
        assert_steps(matrices(model), weights, start, 1e-5)
    assert any(cut)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of `clipnorm`, `clipvalue` and `global_clipnorm`"),
        ({"gradient_accumulation_steps": 1}, "`gradient_accumulation_steps`"),
        ({"use_ema": True, "ema_momentum": 1.5}, "`ema_momentum`"),
        ({"use_ema": True, "ema_overwrite_frequency": 0.5}, "`ema_overwrite_frequency`"),
        ({"rate": 1.0}, "rate"),
    ],
)
def test_what_keras_refuses_is_refused_when_the_object_is_made(arguments, named):
    with pytest.raises(ValueError, match=named):
        KPSVD(**arguments)
