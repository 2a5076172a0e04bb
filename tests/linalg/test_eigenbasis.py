"""Diagonals in Kronecker eigenbases against dense float64 matrices, with and without tails."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from keras_kpsvd.linalg import (
    apply_diagonal,
    damped_diagonal,
    diagonal_of_samples,
    diagonal_of_weight_gradients,
    directions_left_free,
    factor_eigenbasis,
    length_kurtosis,
    multiplicities,
    split_damping,
    transported,
)
from tests import reference

SIZES = [(5, 5, 4, 4), (6, 3, 4, 4), (5, 5, 6, 2), (7, 3, 6, 2), (4, 1, 3, 1), (1, 1, 1, 1)]  # d_in, k_A, d_out, k_G


def _basis(rng, d, k):
    return np.linalg.qr(rng.normal(size=(d, d)))[0][:, :k]


def _bases(rng, sizes):
    d_in, k_in, d_out, k_out = sizes
    return _basis(rng, d_in, k_in), _basis(rng, d_out, k_out)


def _form(bases):
    """How many rows and columns `S` has."""
    return tuple(basis.shape[1] + (basis.shape[0] > basis.shape[1]) for basis in bases)


def _psd(rng, d, values=None):
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return basis * (rng.uniform(0.1, 2.0, size=d) if values is None else values) @ basis.T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_factor_is_decomposed_whole(dtype):
    matrix = _psd(np.random.default_rng(0), 6)
    values, basis = factor_eigenbasis(tf.constant(matrix, dtype), tf.zeros([6, 6], dtype))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=tolerance)
    np.testing.assert_allclose(basis * values @ tf.transpose(basis), matrix, atol=tolerance)
    np.testing.assert_allclose(tf.transpose(basis) @ basis, np.eye(6), atol=tolerance)


def test_of_a_large_factor_the_leading_pairs_are_kept_and_the_mean_of_the_rest():
    rng = np.random.default_rng(1)
    spectrum = np.concatenate([np.full(9, 0.02), [1.0, 3.0, 9.0]])
    matrix = _psd(rng, 12, spectrum)
    values, basis = factor_eigenbasis(tf.constant(matrix), tf.zeros([12, 3], tf.float64))
    np.testing.assert_allclose(values, [1.0, 3.0, 9.0, 0.02], rtol=1e-6)
    np.testing.assert_allclose(matrix @ basis, basis * values[:3], atol=1e-5)
    again, turned = factor_eigenbasis(tf.constant(matrix), basis)
    np.testing.assert_allclose(again, values, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(basis * turned, 0)), 1, rtol=1e-8)


@pytest.mark.parametrize("start", [4, 2])
def test_rounding_below_zero_counts_as_zero_and_what_is_not_finite_is_nan(start):
    matrix = tf.constant(_psd(np.random.default_rng(2), 4, [-1e-3, 0.0, 1.0, 2.0]))
    values, _ = factor_eigenbasis(matrix, tf.zeros([4, start], tf.float64))
    assert np.min(values) >= 0 and np.max(values) == pytest.approx(2.0, rel=1e-3)
    broken = tf.tensor_scatter_nd_update(matrix, [[1, 1]], tf.constant([np.nan], tf.float64))
    for part in factor_eigenbasis(broken, tf.zeros([4, start], tf.float64)):
        assert np.all(np.isnan(part))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("positions", [1, 3])
def test_the_diagonal_of_samples_is_that_of_their_dense_fisher_block(sizes, positions):
    rng = np.random.default_rng(3)
    bases = _bases(rng, sizes)
    activations = rng.normal(size=(7, positions, sizes[0]))
    gradients = rng.normal(size=(7, positions, sizes[2])) * activations[..., :1]
    expected = reference.diagonal_in_bases(reference.fisher(activations, gradients), *bases)
    samples = [tf.constant(values) for values in (activations, gradients, *bases)]
    np.testing.assert_allclose(diagonal_of_samples(*samples), expected, rtol=1e-9, atol=1e-12)
    products = reference.weight_gradients(activations, gradients).transpose(1, 0, 2)
    found = diagonal_of_weight_gradients(tf.constant(products), *samples[2:])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_no_samples_have_no_curvature():
    bases = [tf.constant(basis) for basis in _bases(np.random.default_rng(4), SIZES[3])]
    for positions in (1, 2):
        nothing = [tf.zeros([0, positions, size], tf.float64) for size in (7, 6)]
        np.testing.assert_array_equal(diagonal_of_samples(*nothing, *bases), np.zeros([4, 3]))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_diagonal_is_applied_as_the_dense_matrix_is(sizes):
    rng = np.random.default_rng(5)
    bases = _bases(rng, sizes)
    values = rng.uniform(0.1, 2.0, size=_form(bases))
    matrix = rng.normal(size=(sizes[0], sizes[2]))
    dense = reference.matrix_of_diagonal(values, *bases)
    found = apply_diagonal(*(tf.constant(one) for one in (*bases, values, matrix)))
    np.testing.assert_allclose(found, (dense @ matrix.reshape(-1)).reshape(matrix.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_diagonal_is_carried_over_to_that_of_the_same_matrix_in_other_bases(sizes):
    rng = np.random.default_rng(6)
    old, new = _bases(rng, sizes), _bases(rng, sizes)
    values = rng.uniform(0.1, 2.0, size=_form(old))
    expected = reference.diagonal_in_bases(reference.matrix_of_diagonal(values, *old), *new)
    found = transported(tf.constant(values), tuple(map(tf.constant, old)), tuple(map(tf.constant, new))).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    counts = [multiplicities(tf.constant(basis)).numpy() for basis in new]
    np.testing.assert_allclose(counts[0] @ found @ counts[1], counts[0] @ values @ counts[1], rtol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_directions_left_free_are_the_trace_of_the_damped_block_times_the_block(sizes):
    rng = np.random.default_rng(7)
    bases = _bases(rng, sizes)
    values = rng.uniform(0.0, 2.0, size=_form(bases))
    dense = reference.matrix_of_diagonal(values, *bases)
    expected = np.trace(np.linalg.solve(dense + 0.3 * np.eye(len(dense)), dense))
    found = directions_left_free(tf.constant(values), tf.constant(0.3, tf.float64), *map(tf.constant, bases))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@given(examples=st.integers(1, 40), repeats=st.integers(1, 3), exponent=st.floats(-18, 18), seed=st.integers(0, 2**16))
def test_the_kurtosis_of_lengths_is_that_of_their_moments_at_any_scale(examples, repeats, exponent, seed):
    """Their squares would leave float32's range."""
    squares = (10**exponent * np.random.default_rng(seed).exponential(size=(repeats, examples)) ** 3).astype("float32")
    together = squares.astype(np.float64).sum(0)
    expected = np.mean(together**2) / np.mean(together) ** 2
    found = length_kurtosis(tf.constant(squares.reshape(-1)), repeats)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("squares", "expected"), [([2.0] * 7, 1), ([0.0] * 6 + [3.0], 7), ([0.0] * 7, 0), ([], 0)])
def test_kurtoses_go_from_one_to_the_number_of_examples(squares, expected):
    assert float(length_kurtosis(tf.constant(squares))) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["sqrt", "factor"])
@pytest.mark.parametrize("factored", [0.0, 0.4, 1.0])
def test_damping_goes_from_lambda_alone_to_that_of_the_factors(rule, factored):
    rng = np.random.default_rng(8)
    a, g = _psd(rng, 5), _psd(rng, 4)
    (a_values, a_basis), (g_values, g_basis) = np.linalg.eigh(a), np.linalg.eigh(g)
    damping = 0.05
    means = np.trace(a) / 5, np.trace(g) / 4
    split = split_damping(*(tf.constant(mean, tf.float64) for mean in means), damping, rule)
    arguments = [tf.constant(one) for one in (np.outer(a_values, g_values), a_values, g_values)]
    found = damped_diagonal(*arguments, tf.constant(damping, tf.float64), split, factored)
    # Of eigenvalues that need no correction the two ends are a plain λ and the damped Kronecker product itself.
    plain = np.kron(a, g) + damping * np.eye(20)
    dense = (1 - factored) * plain + factored * reference.damped_sum([(a, g)], damping, rule)
    np.testing.assert_allclose(reference.matrix_of_diagonal(found.numpy(), a_basis, g_basis), dense, atol=1e-12)
