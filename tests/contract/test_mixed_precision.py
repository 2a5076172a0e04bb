"""Loss scaling and half precision: what is scaled is unscaled, what overflows is skipped, statistics are float32."""

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
    squared_error_directions,
)
from tests.networks import assert_same, matrices, problem, tanh_network

LossScaleOptimizer = keras.optimizers.LossScaleOptimizer


@pytest.fixture
def policy(request):
    """A global dtype policy for one test."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(("fisher", "eager"), [("exact", False), ("empirical", False), ("exact", True)])
def test_a_wrapped_optimizer_steps_as_it_would_alone_whatever_the_scale(fisher, eager):
    """The scale, no power of two, grows after every second step; the empirical Fisher matrix is made of the loss."""
    model = tanh_network()
    inner = KPSVD(**{**PLAIN, "fisher": fisher}, **EVERY_STEP)
    optimizer = LossScaleOptimizer(inner, initial_scale=1000.0, dynamic_growth_steps=2)
    model.compile(optimizer, "mse", run_eagerly=eager)
    optimizer.build(model.trainable_variables)
    start = weights = matrices(model)
    for number in range(3):
        x, y = problem(seed=number)
        slopes, roots = squared_error(reference.forward(weights, x)[1], y, np.ones(len(x)))
        if fisher == "empirical":
            roots = (len(x) * slopes * np.sqrt(y.shape[1]))[:, None, :]
        weights = moved(weights, solved(samples_at(weights, x, roots), gradients_at(weights, x, slopes)))
        model.train_on_batch(x, y)
    assert_steps(matrices(model), weights, start, 1e-5)
    assert float(optimizer.dynamic_scale) == 2000.0


def test_a_wrapped_optimizer_accumulates_unscaled_gradients():
    """Curvature is that of the last part, in the branch of a branch."""
    x, y = problem(rows=12)
    model = tanh_network()
    inner = KPSVD(**PLAIN, gradient_accumulation_steps=2)
    model.compile(LossScaleOptimizer(inner, initial_scale=1000.0, dynamic_growth_steps=1), "mse")
    start = matrices(model)
    samples = reference.squared_error_samples(start, x[6:])
    expected = moved(start, solved(samples, reference.squared_error_gradients(start, x, y)))
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    assert_steps(matrices(model), expected, start, 1e-5)


@pytest.mark.parametrize("eager", [False, True])
def test_an_overflow_touches_nothing_but_the_scale_and_the_next_step_is_what_it_would_have_been(eager):
    """Momentum, averages, decay, counters and curvature included."""
    arguments = {**PLAIN, "learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.25, "use_ema": True}
    inner = KPSVD(**arguments, **EVERY_STEP)
    model = tanh_network()
    optimizer = LossScaleOptimizer(inner, initial_scale=1024.0)
    model.compile(optimizer, "mse", run_eagerly=eager)
    optimizer.build(model.trainable_variables)
    weights = matrices(model)
    velocity = [0 * w for w in weights]

    def expected_after(x, y):
        step = squared_error_directions(weights, x, y)
        velocities = [0.5 * v - 0.1 * d for v, d in zip(velocity, step, strict=True)]
        return velocities, [(1 - 0.1 * 0.25) * w + v for w, v in zip(weights, velocities, strict=True)]

    for number in range(2):
        x, y = problem(seed=number)
        start = weights
        velocity, weights = expected_after(x, y)
        model.train_on_batch(x, y)
        assert_steps(matrices(model), weights, start, 1e-5)
        before = {v.path: v.numpy() for v in [*model.trainable_variables, *inner.variables]}
        model.train_on_batch(np.where(x == x[0, 0], np.inf, x), y)
        assert_same({v.path: v.numpy() for v in [*model.trainable_variables, *inner.variables]}, before)
        assert float(optimizer.dynamic_scale) == 1024.0 / 2 ** (number + 1)
    assert {"iteration", "updates"} <= {v.name for v in inner.variables}


def _half(values, policy):
    """As the layer's own dtype holds them."""
    return keras.ops.convert_to_numpy(keras.ops.cast(values, policy.removeprefix("mixed_"))).astype("float64")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_statistics_of_half_precision_are_summed_in_float32(policy):
    """Squares of these inputs are beyond float16, and their sums beyond what bfloat16 resolves."""
    x, y = problem(rows=400, sizes=(4, 2), dtype="float32")
    x, y = (300 * (1 + 0.05 * x)).astype("float32"), 1e-3 * y
    optimizer = KPSVD(**PLAIN)
    model = keras.Sequential([keras.Input((4,)), KPSVDDense(2, kernel_initializer="zeros", name="out")])
    model.compile(optimizer, "mse")
    assert isinstance(model.optimizer, LossScaleOptimizer) == (policy == "mixed_float16")
    model.fit(x, y, batch_size=400, shuffle=False, verbose=0)
    (factor, _), *_ = optimizer._blocks[0].blocks[0].factors
    inputs = np.concatenate([_half(x, policy), np.ones((400, 1))], axis=1)
    assert factor.dtype == "float32"
    np.testing.assert_allclose(factor.numpy() / factor.numpy()[-1, -1], inputs.T @ inputs / 400, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_a_step_in_half_precision_is_the_exact_one_to_that_precision(policy):
    """Of weights that half precision holds exactly; float16 under the scale that Keras starts with."""
    x, y = problem(rows=16)
    x = _half(x, policy)
    model = keras.Sequential(
        [keras.Input((4,)), KPSVDDense(3, activation="tanh", name="dense"), KPSVDDense(2, name="out")]
    )
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(_half(0.5 * rng.normal(size=variable.shape), policy))
    model.compile(KPSVD(**PLAIN), "mse")
    start = matrices(model)
    expected = moved(start, squared_error_directions(start, x, y))
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert_steps(matrices(model), expected, start, 4e-3 if policy == "mixed_float16" else 3e-2)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_with_the_defaults_a_real_overflow_of_float16_is_skipped_and_training_goes_on(policy):
    """A target of 6e4 times the scale of 2**15 is beyond float16."""
    x, y = problem(dtype="float32")
    model = keras.Sequential([keras.Input((4,)), KPSVDDense(3, activation="tanh"), KPSVDDense(2)])
    inner = KPSVD(seed=0)
    model.compile(inner, "mse")
    model.train_on_batch(x, y)
    before = {v.path: v.numpy() for v in [*model.trainable_variables, *inner.variables]}
    scale = float(model.optimizer.dynamic_scale)
    model.train_on_batch(x, np.full_like(y, 6e4))
    assert_same({v.path: v.numpy() for v in [*model.trainable_variables, *inner.variables]}, before)
    assert float(model.optimizer.dynamic_scale) == scale / 2
    losses = [float(np.ravel(model.train_on_batch(x, y))[0]) for _ in range(12)]
    assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)
    assert losses[-1] < 0.5 * losses[0]
