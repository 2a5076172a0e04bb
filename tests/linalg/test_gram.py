"""The N-dimensional route: exact, scale-free, quiet where nothing is left."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd.linalg as linalg
from tests import reference
from tests.linalg import cases


def _samples(family, count, d_in, d_out, dtype, seed=0):
    activations, gradients = family(np.random.default_rng(seed), count, 1, d_in, d_out)
    return activations.astype(dtype), gradients.astype(dtype)


def _gram(activations, gradients, k, **options):
    return linalg.gram_triples(tf.constant(activations[:, 0]), tf.constant(gradients[:, 0]), k, **options)


# (2, 48, 3): rows longer than the batch, float64 from `eigh`. (20, 8, 12), (40, 3, 2): QR, and rows as they are.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count,d_in,d_out", [(1, 4, 3), (2, 48, 3), (8, 12, 9), (20, 8, 12), (40, 3, 2), (300, 4, 1)])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_both_terms_reach_the_dense_optimum(family, count, d_in, d_out, dtype):
    activations, gradients = _samples(family, count, d_in, d_out, dtype)
    for k in (1, 2):
        triples = _gram(activations, gradients, k)
        assert cases.excess(activations, gradients, triples.terms()) < cases.EXCESS[dtype]
        assert np.max(triples.residuals) < (1e-4 if dtype == "float32" else 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count,d_in,d_out", [(2, 12, 3), (20, 6, 9), (40, 3, 2)])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_coefficients_of_a_subtracted_term_stand_for_its_matrices(family, count, d_in, d_out, dtype):
    activations, gradients = _samples(family, count, d_in, d_out, dtype)
    base = reference.kfac_factors(activations, gradients)
    left, right = (tf.constant(x, dtype) for x in base)
    weights = tf.fill([count], tf.constant(1 / count, dtype))
    for term in (linalg.SubtractedTerm(left, right, weights, weights), linalg.SubtractedTerm(left, right)):
        triples = _gram(activations, gradients, 1, subtracted=(term,))
        assert cases.excess(activations, gradients, triples.terms(), [base]) < cases.EXCESS[dtype]


@pytest.mark.parametrize("count", [1, 2, 7, 60])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_left_of_one_example_adds_no_error(dtype, count):
    """R(F) has rank one: a second term of noise must be finite and must not raise the error."""
    activations, gradients = _samples(cases.rank_one, count, 9, 8, dtype)
    triples = _gram(activations, gradients, 2)
    assert np.all(np.isfinite(triples.left)) and np.all(np.isfinite(triples.right))
    assert float(triples.values[1]) < 1e-5 * float(triples.values[0])
    full = reference.fisher(activations, gradients)
    error = np.linalg.norm(full - reference.kronecker_sum(triples.terms()))
    assert error < (1e-6 if dtype == "float32" else 1e-13) * np.linalg.norm(full)
    weights = tf.fill([count], tf.constant(1 / count, dtype))
    left, right = (tf.constant(x, dtype) for x in reference.kfac_factors(activations, gradients))
    corrected = _gram(activations, gradients, 1, subtracted=(linalg.SubtractedTerm(left, right, weights, weights),))
    assert float(corrected.values[0]) < 1e-6 * float(triples.values[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count,d_in,d_out", [(8, 5, 2), (8, 4, 1), (5, 12, 2), (30, 3, 3), (40, 20, 2)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_nothing_is_left_where_the_subtracted_term_is_all_there_is(dtype, count, d_in, d_out, known, scale):
    """Gradients that do not depend on the activations, as of an output with squared error and the exact Fisher."""
    rng = np.random.default_rng(count + d_in)
    for _ in range(8):
        activations = np.tile(np.tanh(rng.normal(size=(count, d_in))), (d_out, 1)).astype(dtype)
        gradients = (scale * np.repeat(np.eye(d_out), count, axis=0)).astype(dtype)
        operator = linalg.RearrangedFisher(activations[:, None], gradients[:, None])
        A, G = (tf.constant(one) for one in reference.kfac_factors(activations[:, None], gradients[:, None]))
        A, G = tf.cast(A, dtype), tf.cast(G, dtype)
        rest = operator.deflate_kfac(A, G) if known else operator.deflate(A, G)
        triples = linalg.gram_triples(tf.constant(activations), tf.constant(gradients), 2, subtracted=rest.subtracted)
        terms = [float(v) * np.linalg.norm(p) * np.linalg.norm(q) for v, p, q in zip(*triples[:3], strict=True)]
        assert max(terms) <= (1e-6 if dtype == "float32" else 1e-12) * np.linalg.norm(A) * np.linalg.norm(G)


@pytest.mark.parametrize("c_a,c_g", [(1e-4, 1e4), (1e4, 1e4), (1e-4, 1e-4), (1e12, 1e-13), (1e-14, 1e4)])
def test_scales_of_float32_do_not_matter(c_a, c_g):
    activations, gradients = _samples(cases.heavy_tailed, 24, 10, 6, "float32")
    plain = _gram(activations, gradients, 2)
    scaled = _gram(activations * np.float32(c_a), gradients * np.float32(c_g), 2)
    np.testing.assert_allclose(scaled.values / (c_a * c_a * c_g * c_g), plain.values, rtol=1e-5)
    np.testing.assert_allclose(scaled.left, plain.left, atol=1e-5)
    np.testing.assert_allclose(scaled.right, plain.right, atol=1e-5)


def test_moving_scale_between_an_examples_two_vectors_changes_nothing():
    activations, gradients = _samples(cases.dependent, 24, 10, 6, "float32")
    moved = np.exp(np.random.default_rng(1).normal(0, 12, (24, 1, 1))).astype("float32")
    plain, other = _gram(activations, gradients, 2), _gram(activations * moved, gradients / moved, 2)
    np.testing.assert_allclose(other.values, plain.values, rtol=1e-5)
    np.testing.assert_allclose(other.left, plain.left, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unknown_batch_sizes_take_the_same_branches(dtype):
    signature = [tf.TensorSpec([None, 6], dtype), tf.TensorSpec([None, 3], dtype)]
    function = tf.function(lambda a, g: linalg.gram_triples(a, g, 2), input_signature=signature)
    for count in (1, 2, 5, 21, 64, 512):
        activations, gradients = _samples(cases.dependent, count, 6, 3, dtype, seed=count)
        triples = function(activations[:, 0], gradients[:, 0])
        assert triples.left.shape == [2, 6, 6]
        assert cases.excess(activations, gradients, triples.terms()) < cases.EXCESS[dtype]


def test_second_triple_shares_the_decomposition():
    """Two triples of one call are those of a call for one, and of the deflated operator."""
    activations, gradients = _samples(cases.heavy_tailed, 30, 5, 4, "float64")
    both, one = _gram(activations, gradients, 2), _gram(activations, gradients, 1)
    np.testing.assert_allclose(both.values[0], one.values[0], rtol=1e-12)
    deflated = cases.operator(activations, gradients).deflate(*one.terms()[0])
    rest = linalg.leading_triples(deflated, 1, route="gram")
    np.testing.assert_allclose(both.values[1], rest.values[0], rtol=1e-7)


@pytest.mark.parametrize("count,d_in,d_out", [(5, 8, 5), (12, 9, 8), (64, 8, 6)])
def test_second_values_near_rounding_do_not_raise_the_error_in_float64(count, d_in, d_out):
    """Both sides hardly vary: σ₂ is near 1e-9 σ₁, where a squared problem has only noise."""
    rng = np.random.default_rng(0)
    activations = 2 + 1e-4 * rng.standard_normal((count, 1, d_in))
    gradients = 1 + 1e-4 * rng.standard_normal((count, 1, d_out))
    assert cases.excess(activations, gradients, _gram(activations, gradients, 2).terms()) < 2e-9


@pytest.mark.parametrize("spoil", ["activations", "subtracted"])
def test_what_is_not_finite_never_reaches_a_decomposition(spoil):
    activations, gradients = _samples(cases.dependent, 12, 5, 4, "float32")
    left = np.eye(5, dtype="float32")
    (activations[3, 0] if spoil == "activations" else left[0])[:] = np.nan

    @tf.function
    def function(a, g, left):
        term = linalg.SubtractedTerm(left, tf.eye(4))
        return linalg.gram_triples(a, g, 2, subtracted=(term,))

    triples = function(activations[:, 0], gradients[:, 0], left)
    assert triples.status == linalg.NOT_FINITE
    np.testing.assert_array_equal(triples.values, [0, 0])
    np.testing.assert_array_equal(triples.left, np.zeros([2, 5, 5]))
