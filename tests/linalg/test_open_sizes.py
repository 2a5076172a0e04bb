"""Traced with feature sizes left open, as training does, the algebra gives what it gives for known ones."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd.linalg as linalg
from tests import reference

TOLERANCE = {"float32": 2e-4, "float64": 1e-9}


def _open(function, arguments):
    """`function` as a graph of tensors whose axes are all open, but for the columns of bases."""

    def spec(tensor):
        square = tensor.shape.rank != 2 or tensor.shape[0] == tensor.shape[1]
        return tf.TensorSpec([None] * tensor.shape.rank if square else [None, tensor.shape[1]], tensor.dtype)

    arguments = [tf.convert_to_tensor(one) for one in arguments]
    return tf.function(function, input_signature=[spec(one) for one in arguments], autograph=False)(*arguments)


def _definite(rng, size, dtype):
    root = rng.standard_normal((size, size + 3))
    return (root @ root.T / size).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
# Either side of every branch on the width of half-vectorised rows: 10, 66 and 171 against batches of 12 and 70.
@pytest.mark.parametrize("sizes", [(4, 4), (4, 18), (11, 4), (18, 11)])
@pytest.mark.parametrize("count", [12, 70])
def test_gram_triples_are_those_of_the_dense_matrix(count, sizes, dtype):
    rng = np.random.default_rng(count + sizes[0])
    activations, gradients = (rng.standard_normal((count, size)).astype(dtype) for size in sizes)
    gradients *= activations[:, :1]

    def triples(a, g):
        open_a, open_g = (tf.ensure_shape(one, [None, None]) for one in (a, g))
        assert open_a.shape[1] is None
        return linalg.gram_triples(open_a, open_g, 2)[:3]

    def spec(one):
        return tf.TensorSpec([None, None], one.dtype)

    values, left, right = tf.function(triples, input_signature=[spec(activations), spec(gradients)])(
        tf.constant(activations), tf.constant(gradients)
    )
    samples = (one[:, None].astype("float64") for one in (activations, gradients))
    rearranged = reference.rearrange(reference.fisher(*samples), *sizes)
    u, singular, v = np.linalg.svd(rearranged)
    np.testing.assert_allclose(values, singular[:2], rtol=TOLERANCE[dtype])
    best = (u[:, :2] * singular[:2]) @ v[:2]
    found = np.einsum("k,kij,klm->ijlm", values, left, right).reshape(best.shape)
    assert np.linalg.norm(found - best) <= 10 * TOLERANCE[dtype] * np.linalg.norm(best)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(1, 3), (5, 2), (9, 9)])
def test_damping_and_whole_inverses_are_the_dense_ones(sizes, dtype):
    rng = np.random.default_rng(sizes[0])
    a, g = (_definite(rng, size, dtype) for size in sizes)

    def invert(a, g):
        lam_a, lam_g = linalg.factor_damping(a, g, 0.3)
        return *linalg.invert_one_term(a, g, lam_a, lam_g), lam_a, lam_g

    a_inverse, g_inverse, lam_a, lam_g = _open(invert, (a, g))
    pi = np.sqrt(np.trace(a) / len(a) / (np.trace(g) / len(g)))
    np.testing.assert_allclose([lam_a, lam_g], [pi * 0.3**0.5, 0.3**0.5 / pi], rtol=1e-5)
    np.testing.assert_allclose(a_inverse, np.linalg.inv(a + float(lam_a) * np.eye(len(a))), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(g_inverse, np.linalg.inv(g + float(lam_g) * np.eye(len(g))), rtol=1e-3, atol=1e-4)


def test_an_indefinite_matrix_of_open_size_is_clipped_as_one_of_known_size():
    matrix = np.diag([2.0, 1.0, -0.5])
    found = _open(lambda m: linalg.damped_cholesky(m, 0.1), (matrix,))
    np.testing.assert_allclose(found, np.sqrt(np.diag([2.1, 1.1, 0.1])), rtol=1e-12)


@pytest.mark.parametrize("sizes", [(12, 7), (40, 25)])
def test_a_truncated_inverse_and_its_correction_are_those_of_known_sizes(sizes):
    rng = np.random.default_rng(1)
    a, g = (_definite(rng, size, "float64") for size in sizes)
    p, q = (one + one.T for one in (rng.standard_normal((size, size)) for size in sizes))
    starts = [np.linalg.qr(rng.standard_normal((size, 3)))[0] for size in sizes]

    def correct(a, g, p, q, start_a, start_g):
        inverses = linalg.one_term_and_correction(a, g, p, q, 0.1, 0.2, 3, (start_a, start_g))
        return [*inverses[0], *inverses[1], *inverses[2:]]

    known = correct(*map(tf.constant, (a, g, p, q, *starts)))
    for found, expected in zip(_open(correct, (a, g, p, q, *starts)), known, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_whole_factors_of_open_size_keep_every_eigenpair_of_the_second_term():
    """However few are asked for: their number is not known when this is traced."""
    rng = np.random.default_rng(3)
    a, g = _definite(rng, 9, "float64"), _definite(rng, 8, "float64")
    p, q = (one + one.T for one in (0.1 * rng.standard_normal((size, size)) for size in (9, 8)))
    v = rng.standard_normal((9, 8))

    def solve(a, g, p, q, v):
        return linalg.apply_corrected(*linalg.one_term_and_correction(a, g, p, q, 1.0, 1.0, 2), v, "reflect")

    dense = np.kron(a + np.eye(9), g + np.eye(8)) + np.kron(p, q)
    assert np.linalg.eigvalsh(dense)[0] > 0
    expected = np.linalg.solve(dense, v.ravel()).reshape(v.shape)
    found = tf.function(solve, input_signature=[tf.TensorSpec([None, None], tf.float64)] * 5)(
        *map(tf.constant, (a, g, p, q, v))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-8)
