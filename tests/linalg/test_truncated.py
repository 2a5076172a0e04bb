"""Inverses from leading eigenpairs and a constant tail, against dense float64 eigendecompositions."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_kpsvd.linalg as linalg
from keras_kpsvd.linalg import TruncatedInverse, truncated_inverse


def _matrix(rng, values):
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


def _dense_truncation(matrix, k):
    """`U diag(e) Uᵀ + t (I − U Uᵀ)` by a whole eigendecomposition."""
    values, vectors = np.linalg.eigh(matrix)
    kept = np.concatenate([np.full(len(values) - k, values[:-k].mean()), values[-k:]])
    return (vectors * kept) @ vectors.T


def _converged(matrix, damping, k, calls=1):
    inverse = TruncatedInverse(np.zeros((len(matrix), k)), None, None)
    for _ in range(calls):
        inverse = truncated_inverse(tf.constant(matrix), damping, tf.constant(inverse.basis))
    return inverse


def _dense(inverse):
    return inverse.times(np.eye(inverse.basis.shape[0])).numpy()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 40),
    st.integers(1, 20),
    st.floats(1e-6, 1e3),
    st.sampled_from([1e-20, 1.0, 1e20]),
    st.integers(0, 2**31),
)
def test_it_inverts_the_truncated_factor(d, k, damping, scale, seed):
    k = min(k, d - 1)
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.uniform(2, 5, k), rng.uniform(0, 1e-3, d - k)]) * scale
    matrix, damping = _matrix(rng, values), damping * scale
    expected = np.linalg.inv(_dense_truncation(matrix, k) + damping * np.eye(d))
    inverse = _converged(matrix, damping, k)
    np.testing.assert_allclose(_dense(inverse), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    V = rng.standard_normal((3, d))
    np.testing.assert_allclose(
        inverse.times_transposed(V), V @ expected, rtol=1e-5, atol=1e-6 * np.abs(V @ expected).max()
    )
    root = _dense(inverse.root())
    np.testing.assert_allclose(root @ root, _dense(inverse), rtol=1e-9, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_allclose(_dense(inverse.inverse()) @ _dense(inverse), np.eye(d), atol=1e-8)


def test_a_factor_of_low_rank_is_inverted_exactly():
    """As many eigenpairs as its rank are all there is: no whole decomposition is needed."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((10, 60))
    matrix = rows.T @ rows
    expected = np.linalg.inv(matrix + 0.1 * np.eye(60))
    np.testing.assert_allclose(_dense(_converged(matrix, 0.1, 12)), expected, rtol=1e-9, atol=1e-9)


def test_later_calls_go_on_from_the_last_basis():
    """A slowly decaying spectrum converges over calls, one step each."""
    rng = np.random.default_rng(1)
    matrix = _matrix(rng, np.exp(-np.arange(80) / 10.0))
    expected = np.linalg.inv(_dense_truncation(matrix, 20) + 1e-3 * np.eye(80))
    errors = [np.linalg.norm(_dense(_converged(matrix, 1e-3, 20, calls)) - expected) for calls in (1, 20, 100)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-4 * np.linalg.norm(expected)


def test_it_is_positive_definite_long_before_it_converges_and_for_slightly_indefinite_factors():
    rng = np.random.default_rng(2)
    for values in (np.linspace(1, 2, 50), np.concatenate([np.linspace(0, 1, 45), np.full(5, -1e-6)])):
        matrix = _matrix(rng, values)
        inverse = _dense(_converged(matrix, 1e-3, 7))
        eigenvalues = np.linalg.eigvalsh(inverse)
        assert eigenvalues[0] > 0 and eigenvalues[-1] <= 1e3 * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_factors_of_any_scale(scale):
    rng = np.random.default_rng(3)
    matrix = _matrix(rng, np.concatenate([np.linspace(1, 2, 5), np.zeros(25)]))
    inverse = truncated_inverse(tf.constant(matrix * scale, tf.float32), 0.1 * scale, tf.zeros([30, 5]))
    dense = inverse.times(tf.eye(30)).numpy().astype(float) * scale
    np.testing.assert_allclose(dense, np.linalg.inv(matrix + 0.1 * np.eye(30)), atol=1e-4)


def test_zero_and_nan_factors():
    np.testing.assert_allclose(_dense(_converged(np.zeros((9, 9)), 0.5, 3)), 2 * np.eye(9), atol=1e-12)
    assert not np.isfinite(_dense(_converged(np.full((9, 9), np.nan), 0.5, 3))).any()


@pytest.mark.parametrize("truncated", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rule", ["reflect", "absolute"])
def test_one_and_two_terms_with_truncated_factors(truncated, rule):
    """The whole two-term inverse of the truncated sums, by the dense joint eigenbasis."""
    rng = np.random.default_rng(4)
    sizes, k, damping = (30, 26), 6, 0.2
    factors = [_matrix(rng, np.concatenate([np.linspace(2, 4, k), np.full(d - k, 1e-3)])) for d in sizes]
    seconds = []
    for d in sizes:
        rows = rng.standard_normal((4, d))
        seconds.append(rows.T @ (rows * [[1], [-1], [0.5], [-0.7]]) / 4)
    starts = tuple(tf.zeros([d, k], tf.float64) if cut else None for d, cut in zip(sizes, truncated, strict=True))
    stand_ins = [_dense_truncation(f, k) if cut else f for f, cut in zip(factors, truncated, strict=True)]
    V = rng.standard_normal(sizes)
    inverses = linalg.invert_one_term(*factors, damping, damping, starts)
    damped = [np.linalg.inv(one + damping * np.eye(len(one))) for one in stand_ins]
    np.testing.assert_allclose(linalg.apply_one_term(*inverses, V), damped[0] @ V @ damped[1], rtol=1e-8, atol=1e-9)
    parts = linalg.one_term_and_correction(*factors, *seconds, damping, damping, 5, starts)
    expected = linalg.apply_two_term(*linalg.joint_eigenbasis(*stand_ins, *seconds, damping, damping), V, rule)
    np.testing.assert_allclose(linalg.apply_corrected(*parts, V, rule), expected, rtol=1e-6, atol=1e-7)
