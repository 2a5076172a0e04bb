"""One layer's averages and preconditioners against dense float64 oracles, through all five methods."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDDense
from keras_kpsvd.curvature.approximations import METHODS
from keras_kpsvd.curvature.state import CurvatureOptions, LayerCurvature
from tests import reference

D_IN, D_OUT, DECAY = 4, 3, 0.75


def _layer(method, rule="sqrt", indefinite="absolute"):
    layer = KPSVDDense(D_OUT, dtype="float64")
    layer.build((None, D_IN - 1))
    made = []

    def add_variable(shape, dtype, name, initializer):
        initial = np.eye(*shape) if initializer == "identity" else np.zeros(shape)
        made.append(keras.Variable(initial.astype(dtype), name=name))
        return made[-1]

    return LayerCurvature(layer, CurvatureOptions(method, rule, DECAY, indefinite), add_variable)


def _samples(seed=0, scale=1.0, shared=1, rows=12):
    """Dependent activations and gradients, so that no one-term sum is exact."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, shared, D_IN))
    gradients = np.tanh(activations @ rng.normal(size=(D_IN, D_OUT))) * activations[..., :1] * scale
    return tf.constant(activations), tf.constant(gradients)


def _refresh(block, samples):
    values, good = block.refresh(samples)
    for variable, value in zip(block.refresh_targets, values, strict=True):
        variable.assign(value)
    return bool(good)


def _invert(block, damping=0.01):
    values, good = block.invert(tf.constant(damping, tf.float64))
    for variable, value in zip(block.preconditioner, values, strict=True):
        variable.assign(value)
    return bool(good)


def _factors(block):
    return [(a.numpy(), g.numpy()) for a, g in block.factors]


def _distance(one, other):
    one, other = (pair if isinstance(pair, np.ndarray) else reference.kronecker_sum(pair) for pair in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_refresh_is_the_method_itself(method):
    block = _layer(method)
    samples = _samples()
    assert _refresh(block, samples)
    assert _distance(_factors(block), reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)) < 1e-8
    np.testing.assert_allclose(np.trace(_factors(block)[0][0]), np.sum(samples[0].numpy() ** 2) / 12)


@pytest.mark.parametrize(("method", "shared"), [*((name, 1) for name in METHODS), ("kpsvd", 3), ("kfac_corrected", 3)])
def test_equal_batches_leave_every_factor_unchanged(method, shared):
    """Sign and scale are fixed: not only the sum stays, each factor does."""
    block = _layer(method)
    _refresh(block, _samples(shared=shared))
    first = _factors(block)
    for _ in range(5):
        _refresh(block, _samples(shared=shared))
    assert block.count.numpy() == 6
    for (a, g), (first_a, first_g) in zip(_factors(block), first, strict=True):
        # A second term's free sign and scale belong to the pair.
        sign = np.sign(np.sum(a * first_a))
        np.testing.assert_allclose(sign * a, first_a, rtol=1e-5, atol=1e-6 * np.abs(first_a).max())
        np.testing.assert_allclose(sign * g, first_g, rtol=1e-5, atol=1e-6 * np.abs(first_g).max())


@pytest.mark.parametrize("method", ["kfac", "kpsvd"])
def test_averages_of_different_batches_are_bias_corrected(method):
    """Weights 1, ρ, ρ², …, normalised: of KFAC's factors one by one; of KPSVD the nearest product to the average."""
    block = _layer(method)
    pairs, expected = [], None
    for seed in range(4):
        samples = _samples(seed)
        _refresh(block, samples)
        pairs.append(reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)[0])
        weight = (1 - DECAY) / (1 - DECAY ** (seed + 1))
        if method == "kfac":
            weights = DECAY ** np.arange(seed, -1, -1)
            weights /= weights.sum()
            expected = [tuple(sum(w * pair[side] for w, pair in zip(weights, pairs, strict=True)) for side in (0, 1))]
            for one, other in zip(_factors(block)[0], expected[0], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6)
        else:
            average = weight * np.kron(*pairs[-1])
            if expected is not None:
                average = average + (1 - weight) * reference.kronecker_sum(expected)
            expected = reference.best_terms(average, D_IN, D_OUT, 1)
            assert _distance(_factors(block), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_gradients_scaled_by_c_scale_the_curvature_by_its_square(method):
    plain, scaled = _layer(method), _layer(method)
    for seed in range(3):
        _refresh(plain, _samples(seed))
        _refresh(scaled, _samples(seed, scale=1e3))
    expected = 1e6 * reference.kronecker_sum(_factors(plain))
    assert _distance(_factors(scaled), expected) < 1e-8


@pytest.mark.parametrize(
    ("method", "rule", "indefinite"),
    [
        ("kfac", "sqrt", "absolute"),
        ("kpsvd", "factor", "absolute"),
        ("deflation", "factor", "reflect"),
        ("lanczos", "sqrt", "absolute"),
        ("kfac_corrected", "sqrt", "reflect"),
    ],
)
def test_preconditioning_is_the_dense_solve(method, rule, indefinite):
    gradient = np.random.default_rng(9).normal(size=(D_IN, D_OUT))
    block = _layer(method, rule, indefinite)
    for seed in range(2):
        _refresh(block, _samples(seed))
    assert _invert(block)
    expected = reference.rule_solve(_factors(block), gradient, 0.01, rule, indefinite)
    actual = block.precondition(tf.constant(gradient)).numpy()
    assert np.linalg.norm(actual - expected) < 1e-6 * np.linalg.norm(expected)


def test_without_a_refresh_the_preconditioner_is_the_identity():
    for method in METHODS:
        block = _layer(method)
        assert _invert(block)
        gradient = np.arange(D_IN * D_OUT, dtype=float).reshape(D_IN, D_OUT)
        np.testing.assert_allclose(block.precondition(tf.constant(gradient)), gradient, rtol=1e-12)


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "kfac_corrected"])
@pytest.mark.parametrize("side", [0, 1])
def test_samples_that_are_not_finite_leave_the_averages_bit_for_bit(method, side):
    block = _layer(method)
    _refresh(block, _samples())
    before = _factors(block)
    samples = [part.numpy() for part in _samples(1)]
    samples[side][2, 0, 1] = np.nan
    assert not _refresh(block, tuple(map(tf.constant, samples)))
    assert block.count.numpy() == 1
    for pair, old in zip(_factors(block), before, strict=True):
        for one, other in zip(pair, old, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_dead_batches_fade_and_never_become_nan(method):
    """All-zero gradients: the average shrinks as it should, and the preconditioner stays finite."""
    block = _layer(method)
    dead = _samples(scale=0.0)
    assert _refresh(block, dead) and _invert(block)
    assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    _refresh(block, _samples())
    alive = np.linalg.norm(reference.kronecker_sum(_factors(block)))
    for _ in range(3):
        assert _refresh(block, dead) and _invert(block)
        assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    assert 0 < np.linalg.norm(reference.kronecker_sum(_factors(block))) < alive
