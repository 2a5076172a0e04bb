"""The five approximations against the dense SVD of the rearranged Fisher block, in float64 NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import approximate_fisher, exact_fisher
from keras_kpsvd.curvature.approximations import METHODS, approximate_terms
from tests import reference
from tests.linalg import cases

OPTIMAL = ("kpsvd", "deflation", "lanczos", "kfac_corrected")

# (batch, shared, d_in, d_out)
SHAPES = [
    (1, 1, 4, 3),
    (2, 1, 5, 1),
    (64, 1, 6, 5),
    (512, 1, 5, 4),
    (16, 1, 1, 4),
    (16, 2, 1, 4),
    (1, 3, 4, 3),
    (33, 3, 5, 4),
    (512, 2, 4, 1),
]


def _samples(family, shape, dtype, seed=0):
    activations, gradients = family(np.random.default_rng(seed), *shape)
    return activations.astype(dtype), gradients.astype(dtype)


def _excess(activations, gradients, approximation, method):
    """`(‖F − F̂‖ − optimum)/‖F‖`, the optimum from the dense SVD, for "kfac_corrected" over its second term alone.

    Where `F` is zero and KFAC's term is not, what is left of that term is measured against the term.
    """
    fisher = reference.fisher(activations, gradients)
    d_in, d_out = activations.shape[-1], gradients.shape[-1]
    error = np.linalg.norm(fisher - reference.kronecker_sum(approximation.terms))
    left, free = fisher, len(approximation.terms)
    if method == "kfac_corrected":
        left, free = fisher - np.kron(*reference.kfac_factors(activations, gradients)), 1
    size = np.linalg.norm(fisher) or np.linalg.norm(left) or 1.0
    return (error - reference.optimum_error(left, d_in, d_out, free)) / size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", cases.FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_method_is_at_the_dense_optimum(family, shape, dtype):
    activations, gradients = _samples(family, shape, dtype)
    for method in OPTIMAL:
        approximation = approximate_fisher(activations, gradients, method)
        assert len(approximation.terms) == (1 if method == "kpsvd" else 2)
        assert _excess(activations, gradients, approximation, method) <= cases.EXCESS[dtype], method


@pytest.mark.parametrize("method", OPTIMAL)
def test_a_skew_second_term_is_found_where_it_is_the_best(method):
    activations, gradients = _samples(cases.rotations, (40, 2, 3, 3), "float64")
    approximation = approximate_fisher(activations, gradients, method)
    assert _excess(activations, gradients, approximation, method) <= 1e-8
    if method in ("deflation", "lanczos"):
        p, q = (factor.numpy() for factor in approximation.terms[1])
        np.testing.assert_allclose(p, -p.T, atol=1e-12)
        np.testing.assert_allclose(q, -q.T, atol=1e-12)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_samples_only_scales_the_result(method, shared):
    activations, gradients = _samples(cases.dependent, (24, shared, 5, 4), "float32")
    expected = reference.kronecker_sum(approximate_fisher(activations, gradients, method).terms)
    for left, right in ((1e-4, 1e-4), (1e4, 1e4)):
        scaled = approximate_fisher(activations * np.float32(left), gradients * np.float32(right), method)
        dense = reference.kronecker_sum(scaled.terms) / (left * right) ** 2
        assert np.linalg.norm(dense - expected) <= 1e-4 * np.linalg.norm(expected), (left, right)


@pytest.mark.parametrize("scale", [(1e-4, 1e-4), (1e4, 1e-4), (1e4, 1e4)])
@pytest.mark.parametrize("shared", [1, 3])
def test_the_optimum_is_reached_at_every_scale(shared, scale):
    activations, gradients = _samples(cases.heavy_tailed, (32, shared, 5, 4), "float32")
    activations, gradients = activations * np.float32(scale[0]), gradients * np.float32(scale[1])
    for method in OPTIMAL:
        approximation = approximate_fisher(activations, gradients, method)
        assert _excess(activations, gradients, approximation, method) <= cases.EXCESS["float32"], method


@pytest.mark.parametrize("shared", [1, 3])
def test_kfac_sums_activations_and_averages_gradients_over_positions(shared):
    activations, gradients = _samples(cases.dependent, (17, shared, 5, 4), "float64")
    ((a, g),) = approximate_fisher(activations, gradients, "kfac").terms
    left, right = reference.kfac_factors(activations, gradients)
    np.testing.assert_allclose(a, left, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(g, right, rtol=1e-12, atol=1e-14)


def test_kfac_is_exact_where_activations_and_gradients_take_every_pair_of_values():
    """Independence in the sample itself: each activation with each gradient once."""
    rng = np.random.default_rng(0)
    activations = np.repeat(rng.standard_normal((6, 4)), 5, axis=0)
    gradients = np.tile(rng.standard_normal((5, 3)), (6, 1))
    fisher = reference.fisher(activations, gradients)
    for method in METHODS:
        dense = reference.kronecker_sum(approximate_fisher(activations, gradients, method).terms)
        np.testing.assert_allclose(dense, fisher, atol=1e-10 * np.linalg.norm(fisher))


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("method", ["deflation", "lanczos"])
def test_terms_of_svd_methods_come_largest_first_and_are_the_dense_triples(method, shared):
    activations, gradients = _samples(cases.dependent, (40, shared, 5, 4), "float64")
    terms = approximate_fisher(activations, gradients, method).terms
    expected = reference.best_terms(reference.fisher(activations, gradients), 5, 4, 2)
    for (a, g), (left, right) in zip(terms, expected, strict=True):
        np.testing.assert_allclose(np.kron(a, g), np.kron(left, right), atol=1e-7)
    assert np.linalg.norm(np.kron(*terms[0])) > np.linalg.norm(np.kron(*terms[1])) > 0


@pytest.mark.parametrize("route", ["power", "lanczos"])
def test_deflation_subtracts_its_first_term_before_it_looks_for_the_second(route):
    activations, gradients = (tf.constant(part) for part in _samples(cases.dependent, (30, 1, 5, 4), "float64"))
    first, second = approximate_terms(activations, gradients, "deflation", symmetric=False, route=route)
    left = reference.fisher(activations, gradients) - np.kron(*first)
    ((p, q),) = reference.best_terms(left, 5, 4, 1)
    np.testing.assert_allclose(np.kron(*second), np.kron(p, q), atol=1e-6)
    ((a, g),) = approximate_fisher(activations, gradients, "kpsvd").terms
    np.testing.assert_allclose(np.kron(*first), np.kron(a, g), atol=1e-6)


@pytest.mark.parametrize("shared", [1, 3])
def test_corrected_keeps_the_term_of_kfac_first(shared):
    activations, gradients = _samples(cases.dependent, (20, shared, 5, 4), "float32")
    (base, _) = approximate_fisher(activations, gradients, "kfac_corrected").terms
    (kfac,) = approximate_fisher(activations, gradients, "kfac").terms
    np.testing.assert_array_equal(base[0], kfac[0])
    np.testing.assert_array_equal(base[1], kfac[1])


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("family", cases.FAMILIES, ids=lambda family: family.__name__)
def test_factors_of_kpsvd_are_symmetric_and_positive_semi_definite(family, shared):
    activations, gradients = _samples(family, (30, shared, 5, 4), "float64")
    for factor in approximate_fisher(activations, gradients, "kpsvd").terms[0]:
        factor = factor.numpy()
        np.testing.assert_array_equal(factor, factor.T)
        values = np.linalg.eigvalsh(factor)
        assert values[-1] > 0
        assert values[0] >= -1e-10 * values[-1]


@pytest.mark.parametrize("method", ["deflation", "kfac_corrected"])
def test_symmetric_second_terms_are_the_best_among_symmetric_ones(method):
    """With several positions the best second term may be skew; training asks for the best symmetric one."""
    activations, gradients = _samples(cases.rotations, (40, 2, 2, 2), "float64")
    fisher = reference.fisher(activations, gradients)
    terms = approximate_terms(tf.constant(activations), tf.constant(gradients), method, symmetric=True)
    for a, g in terms:
        np.testing.assert_allclose(a, np.transpose(a), atol=1e-14)
        np.testing.assert_allclose(g, np.transpose(g), atol=1e-14)
    # Restricting both sides to symmetric matrices is projecting R(F) from both sides.
    swap = np.eye(4).reshape(2, 2, 2, 2).transpose(0, 1, 3, 2).reshape(4, 4)
    project = 0.5 * (np.eye(4) + swap)
    left, free = fisher, 2
    if method == "kfac_corrected":
        left, free = fisher - np.kron(*reference.kfac_factors(activations, gradients)), 1
    rearranged = reference.rearrange(left, 2, 2)
    left_over = rearranged - project @ rearranged @ project
    values = np.linalg.svd(project @ rearranged @ project, compute_uv=False)
    optimum = np.sqrt(np.sum(values[free:] ** 2) + np.sum(left_over**2))
    error = np.linalg.norm(fisher - reference.kronecker_sum(terms))
    assert error - optimum <= 1e-8 * np.linalg.norm(fisher)


@pytest.mark.parametrize("method", METHODS)
def test_arrays_and_tensors_with_and_without_positions_agree(method):
    activations, gradients = _samples(cases.dependent, (20, 1, 4, 3), "float64")
    expected = reference.kronecker_sum(approximate_fisher(activations, gradients, method).terms)
    flat = activations[:, 0], gradients[:, 0]
    for given in (flat, tuple(map(tf.constant, flat)), tuple(map(tf.constant, (activations, gradients)))):
        approximation = approximate_fisher(*given, method)
        assert approximation.terms[0][0].dtype == tf.float64
        np.testing.assert_allclose(reference.kronecker_sum(approximation.terms), expected, atol=1e-10)
    single = approximate_fisher(*(part.astype("float32") for part in flat), method)
    assert single.terms[0][0].dtype == tf.float32
    np.testing.assert_allclose(reference.kronecker_sum(single.terms), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shared", [None, 1, 3])
def test_exact_fisher_is_the_mean_outer_product_of_the_weight_gradients(shared, dtype):
    activations, gradients = _samples(cases.dependent, (9, shared or 1, 4, 3), dtype)
    if shared is None:
        activations, gradients = activations[:, 0], gradients[:, 0]
    expected = np.zeros((12, 12))
    for a, g in zip(activations.astype("float64"), gradients.astype("float64"), strict=True):
        row = sum(np.outer(one, other) for one, other in zip(np.atleast_2d(a), np.atleast_2d(g), strict=True))
        expected += np.outer(row, row) / len(activations)
    fisher = exact_fisher(activations, gradients)
    assert fisher.dtype == dtype
    np.testing.assert_allclose(fisher, expected, rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-6)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`method` must be one of 'kfac'.*'newton'"):
        approximate_fisher(np.ones((2, 3)), np.ones((2, 3)), "newton")


@pytest.mark.parametrize("function", [approximate_fisher, exact_fisher])
@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 3), (4, 2)), ((5, 2, 3), (5, 4, 2)), ((5, 3), (5, 1, 2)), ((3,), (2,)), ((0, 3), (0, 2))],
)
def test_shapes_that_do_not_match_are_refused_with_both_shapes(function, left, right):
    with pytest.raises(ValueError) as error:
        function(np.ones(left), np.ones(right))
    assert str(left) in str(error.value)
    assert str(right) in str(error.value)
