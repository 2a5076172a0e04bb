"""Kronecker sums behave as their dense matrix; shortening them is a truncated SVD."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_kpsvd.linalg as linalg
from tests import reference


def _definite(rng, d):
    root = rng.standard_normal((d, d))
    return root @ root.T + 0.1 * np.eye(d)


def _symmetric(rng, d):
    matrix = rng.standard_normal((d, d))
    return matrix + matrix.T


def _skew(rng, d):
    matrix = rng.standard_normal((d, d))
    return matrix - matrix.T


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), d_in=st.integers(1, 5), d_out=st.integers(1, 5), count=st.integers(1, 4))
def test_operations_are_those_of_the_dense_matrix(seed, d_in, d_out, count):
    rng = np.random.default_rng(seed)
    kinds = [_symmetric, _skew, _definite, _symmetric][:count]
    total = linalg.KroneckerSum([(kind(rng, d_in), kind(rng, d_out)) for kind in kinds])
    other = linalg.KroneckerSum([(_symmetric(rng, d_in), _symmetric(rng, d_out)) for _ in range(2)])
    dense, matrix = reference.kronecker_sum(total.terms), rng.standard_normal((d_in, d_out))
    np.testing.assert_allclose(total.to_dense(), dense, atol=1e-12)
    np.testing.assert_allclose(np.ravel(total.matvec(matrix)), dense @ matrix.ravel(), atol=1e-9)
    np.testing.assert_allclose(total.frobenius_norm(), np.linalg.norm(dense), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(total.inner(other), np.sum(dense * reference.kronecker_sum(other.terms)), atol=1e-8)
    np.testing.assert_allclose((total + 0.3 * other).to_dense(), dense + 0.3 * other.to_dense(), atol=1e-10)


@pytest.mark.parametrize("rule", ["sqrt", "factor"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("second", [None, "definite", "indefinite", "skew"])
def test_solve_is_the_dense_solve_where_the_damped_sum_is_definite(second, damping, rule):
    rng = np.random.default_rng(1)
    terms = [(_definite(rng, 5), _definite(rng, 4))]
    if second:
        kind = {"definite": _definite, "indefinite": _symmetric, "skew": _skew}[second]
        terms.append((kind(rng, 5), kind(rng, 4)))
        # Shrink it until the undamped sum is positive definite, hence every damped one.
        while np.linalg.eigvalsh(reference.kronecker_sum(terms))[0] < 1e-3:
            terms[1] = (terms[1][0] / 2, terms[1][1])
    matrix = rng.standard_normal((5, 4))
    own = linalg.KroneckerSum(terms).solve(matrix, damping, damping_rule=rule)
    np.testing.assert_allclose(own, reference.damped_solve(terms, matrix, damping, rule), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [_symmetric, _skew])
def test_solve_stays_positive_definite_where_the_sum_is_not(kind):
    rng = np.random.default_rng(2)
    terms = [(_definite(rng, 4), _definite(rng, 3)), (10 * kind(rng, 4), kind(rng, 3))]
    total = linalg.KroneckerSum(terms)
    assert np.linalg.eigvalsh(reference.damped_sum(terms, 0.1))[0] < 0
    inverse = reference.matrix_of(lambda matrix: total.solve(matrix, 0.1), 4, 3)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9)
    assert np.linalg.eigvalsh(inverse)[0] > 0


def test_solve_misuse_raises_and_names_the_argument():
    rng = np.random.default_rng(3)
    first = (np.eye(3), np.eye(2))
    with pytest.raises(ValueError, match=r"damping_rule.*'pi'"):
        linalg.KroneckerSum([first]).solve(np.zeros([3, 2]), 1.0, damping_rule="pi")
    with pytest.raises(ValueError, match=r"indefinite.*'abs'"):
        linalg.KroneckerSum([first, first]).solve(np.zeros([3, 2]), 1.0, indefinite="abs")
    with pytest.raises(ValueError, match=r"3 terms"):
        linalg.KroneckerSum([first] * 3).solve(np.zeros([3, 2]), 1.0)
    with pytest.raises(ValueError, match=r"symmetric and skew"):
        linalg.KroneckerSum([first, (_symmetric(rng, 3), _skew(rng, 2))]).solve(np.zeros([3, 2]), 1.0)
    with pytest.raises(ValueError, match=r"at least one"):
        linalg.KroneckerSum([])
    with pytest.raises(ValueError, match=r"square"):
        linalg.KroneckerSum([(np.zeros([3, 2]), np.eye(2))])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), d_in=st.integers(1, 5), d_out=st.integers(1, 4), k=st.integers(1, 3))
def test_recompressing_reaches_the_dense_optimum(seed, d_in, d_out, k):
    rng = np.random.default_rng(seed)
    terms = [(_symmetric(rng, d_in), _symmetric(rng, d_out)) for _ in range(4)]
    dense, short = reference.kronecker_sum(terms), linalg.recompress(terms, k)
    error = np.linalg.norm(dense - reference.kronecker_sum(short.terms))
    # The r × r part of `recompress` resolves terms down to √eps of float64, as its docstring says.
    assert error <= reference.optimum_error(dense, d_in, d_out, k) + 3e-8 * np.linalg.norm(dense)
    for left, right in short.terms:
        np.testing.assert_array_equal(left, np.transpose(left))
        np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(right), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("float64", 1e-14)])
def test_averaging_equal_sums_leaves_them_unchanged(dtype, tolerance):
    """Whatever their signs and scales: what is averaged is the matrix."""
    rng = np.random.default_rng(4)
    total = linalg.recompress([(_definite(rng, 6), _definite(rng, 5)), (_symmetric(rng, 6), _symmetric(rng, 5))], 2)
    total = linalg.KroneckerSum([(tf.cast(a, dtype), tf.cast(g, dtype)) for a, g in total.terms])
    flipped = linalg.KroneckerSum([(-3.0 * a, g / -3.0) for a, g in total.terms])
    average = total
    for _ in range(30):
        average = linalg.recompress(0.95 * average + 0.05 * flipped, 2)
    size = float(total.frobenius_norm())
    for (a, g), (other_a, other_g) in zip(average.terms, total.terms, strict=True):
        np.testing.assert_allclose(a, other_a, atol=100 * tolerance * size)
        np.testing.assert_allclose(g, other_g, atol=100 * tolerance * size)


def test_small_terms_keep_their_digits():
    """A Gram matrix of the terms would lose the second below the root of the rounding unit."""
    rng = np.random.default_rng(5)
    big = (_definite(rng, 4), _definite(rng, 3))
    small = (1e-10 * _symmetric(rng, 4), _symmetric(rng, 3))
    short = linalg.recompress([big, small, big], 2)
    dense = reference.kronecker_sum([big, small, big])
    np.testing.assert_allclose(reference.kronecker_sum(short.terms), dense, atol=1e-14 * np.linalg.norm(dense))


def test_zero_and_cancelling_terms_do_no_harm():
    zero = (np.zeros([3, 3]), np.zeros([2, 2]))
    one = (np.eye(3), np.eye(2))
    for terms in ([zero], [zero, zero, zero], [one, (-np.eye(3), np.eye(2))]):
        total = linalg.recompress(terms, 2)
        np.testing.assert_allclose(total.to_dense(), np.zeros([6, 6]), atol=1e-15)
        assert len(total.terms) == 2
    np.testing.assert_allclose(linalg.recompress([zero, one], 1).to_dense(), np.eye(6), atol=1e-14)
    assert not np.isfinite(linalg.recompress([one, (np.eye(3) * np.nan, np.eye(2))], 1).terms[0][0]).any()


def test_float32_range_suffices():
    one = (1e25 * np.eye(3, dtype="float32"), np.float32(1e-5) * np.eye(2, dtype="float32"))
    total = linalg.recompress([one, one], 1)
    np.testing.assert_allclose(total.frobenius_norm() / 2e20, 6**0.5, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(total.terms[0][0]), np.linalg.norm(total.terms[0][1]), rtol=1e-5)
