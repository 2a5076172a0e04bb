"""Damping and damped inverses: the dense solve where it is definite, positive definite always, no exception."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd.linalg as linalg
from tests import reference
from tests.linalg import cases


def test_the_sqrt_rule_does_not_depend_on_the_free_scale():
    rng = np.random.default_rng(0)
    left, right = (x @ x.T for x in (rng.standard_normal((4, 4)), rng.standard_normal((3, 3))))
    lam_a, lam_g = linalg.factor_damping(tf.constant(left), tf.constant(right), 0.3, "sqrt")
    np.testing.assert_allclose((lam_a, lam_g), reference.factor_damping(left, right, 0.3, "sqrt"))
    np.testing.assert_allclose(lam_a * lam_g, 0.3)
    scaled_a, scaled_g = linalg.factor_damping(tf.constant(7 * left), tf.constant(right / 7), 0.3, "sqrt")
    np.testing.assert_allclose((scaled_a, scaled_g), (7 * lam_a, lam_g / 7))
    np.testing.assert_array_equal(
        linalg.factor_damping(tf.constant(left), tf.constant(right), 0.3, "factor"), [0.3, 0.3]
    )


def test_a_dead_layer_is_damped_evenly():
    for left, right in ((tf.zeros([4, 4]), tf.eye(3)), (tf.eye(4), tf.zeros([3, 3])), (tf.zeros([4, 4]), -tf.eye(3))):
        np.testing.assert_allclose(linalg.factor_damping(left, right, 0.25, "sqrt"), [0.5, 0.5])


def test_an_unknown_damping_rule_raises():
    with pytest.raises(ValueError, match=r"`damping_rule`.*'none'"):
        linalg.factor_damping(tf.eye(2), tf.eye(2), 1.0, "none")


def test_one_term_inverses_are_the_dense_ones():
    rng = np.random.default_rng(1)
    left, right = (x @ x.T for x in (rng.standard_normal((5, 5)), rng.standard_normal((4, 4))))
    left_inverse, right_inverse = linalg.invert_one_term(left, right, 0.1, 0.2)
    np.testing.assert_allclose(left_inverse, np.linalg.inv(left + 0.1 * np.eye(5)), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(right_inverse, np.linalg.inv(right + 0.2 * np.eye(4)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_negative_eigenvalues_are_clipped_before_damping(dtype):
    """λᵢ ≈ −damping gave steps of 3e4 in the published code."""
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    damping = 1e-3
    for negative in (-damping * (1 - 1e-7), -damping, -5 * damping):
        matrix = (basis * [2.0, 1.0, 0.5, negative]) @ basis.T
        inverse, _ = linalg.invert_one_term(tf.constant(matrix, dtype), tf.eye(2, dtype=dtype), damping, damping)
        clipped = (basis / (np.array([2.0, 1.0, 0.5, 0.0]) + damping)) @ basis.T
        np.testing.assert_allclose(inverse, clipped, rtol=1e-2, atol=1e-2)


def test_singular_factors_without_damping_give_finite_inverses():
    for matrix in (np.zeros([3, 3]), np.ones([3, 3])):
        inverse, _ = linalg.invert_one_term(tf.constant(matrix), tf.eye(2, dtype=tf.float64), 0.0, 0.0)
        assert np.all(np.isfinite(inverse))
        assert np.all(np.linalg.eigvalsh(inverse) > 0)


def test_joint_basis_makes_both_terms_diagonal():
    rng = np.random.default_rng(3)
    left, right = (x @ x.T for x in (rng.standard_normal((5, 5)), rng.standard_normal((4, 4))))
    p, q = (x + x.T for x in (rng.standard_normal((5, 5)), rng.standard_normal((4, 4))))
    k1, k2, s1, s2 = (np.asarray(x) for x in linalg.joint_eigenbasis(left, right, p, q, 0.1, 0.2))
    for basis, values, damped, other in ((k1, s1, left + 0.1 * np.eye(5), p), (k2, s2, right + 0.2 * np.eye(4), q)):
        np.testing.assert_allclose(basis.T @ damped @ basis, np.eye(len(values)), atol=1e-9)
        np.testing.assert_allclose(basis.T @ other @ basis, np.diag(values), atol=1e-8)


def test_not_finite_in_gives_nan_out_without_raising():
    @tf.function
    def graph(bad):
        eye = tf.eye(3, dtype=bad.dtype)
        return (
            *linalg.invert_one_term(bad, eye, 0.1, 0.1),
            *linalg.joint_eigenbasis(bad, eye, eye, eye, 0.1, 0.1),
            *linalg.joint_eigenbasis(eye, eye, bad, eye, 0.1, 0.1),
        )

    bad = np.eye(3)
    bad[0, 1] = np.nan
    inverse, other, k1, k2, _, _, k3, k4, _, _ = graph(tf.constant(bad))
    for part in (inverse, k1, k3):
        assert not np.isfinite(part).any()
    for part in (other, k2, k4):
        assert np.isfinite(part).all()


def test_denominators_follow_the_stated_rules():
    x = tf.constant([3.0, -0.5, -1 + 1e-12, -1.0, -4.0], tf.float64)
    np.testing.assert_allclose(linalg.two_term_denominators(x, "absolute"), [4, 1.5, 2, 2, 5])
    np.testing.assert_allclose(linalg.two_term_denominators(x, "reflect"), [4, 0.5, 2.0**-26, 2, 5])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["reflect", "absolute"])
def test_the_preconditioner_is_positive_definite_in_a_thousand_heavy_tailed_draws(rule):
    @tf.function(reduce_retracing=True)
    def inverse(activations, gradients, k_kfac):
        operator = linalg.RearrangedFisher(activations, gradients)
        count = tf.cast(tf.shape(activations)[0], tf.float64)
        left = tf.einsum("nti,ntj->ij", activations, activations) / count
        right = tf.einsum("nti,ntj->ij", gradients, gradients) / count
        (base, second) = linalg.leading_triples(operator, 2).terms()
        if k_kfac:
            base = (left, right)
            (second,) = linalg.leading_triples(operator.deflate(left, right), 1).terms()
        lam = linalg.factor_damping(*base, 1e-3)
        k1, k2, s1, s2 = linalg.joint_eigenbasis(*base, *second, *lam)
        units = tf.reshape(tf.eye(6, dtype=tf.float64), [6, 3, 2])
        columns = [linalg.apply_two_term(k1, k2, s1, s2, unit, rule) for unit in tf.unstack(units)]
        return tf.reshape(tf.stack(columns), [6, 6]), tf.reduce_min(1 + s1[:, None] * s2[None])

    rng = np.random.default_rng(4)
    indefinite = 0
    for draw in range(1000):
        activations, gradients = cases.heavy_tailed(rng, 12, 1, 3, 2)
        matrix, smallest = inverse(activations, gradients, draw % 2 == 0)
        indefinite += float(smallest) < 0
        matrix = matrix.numpy()
        assert np.linalg.norm(matrix - matrix.T) < 1e-6 * np.linalg.norm(matrix)
        # Relative to its diagonal, since the scales of a heavy-tailed draw are spread over many decades.
        scale = np.sqrt(np.diag(matrix))
        assert np.all(scale > 0)
        assert np.linalg.eigvalsh(matrix / np.outer(scale, scale))[0] > 0
    assert indefinite > 100  # otherwise the rule was not put to the test


def test_absolute_values_of_the_two_spectra_apart_would_be_another_matrix():
    """The rule acts on the product: two negative eigenvalues make a positive one, and the solve is exact there."""
    rng = np.random.default_rng(5)
    terms = [(np.eye(4), np.eye(3)), (-np.diag([0.1, 0.5, 2.0, 3.0]), -np.diag([1.0, 0.3, 2.0]))]
    matrix = rng.standard_normal((4, 3))
    basis = linalg.joint_eigenbasis(*terms[0], *terms[1], 0.1, 0.1)
    exact = reference.damped_solve(terms, matrix, 0.1, "factor")
    for rule in ("reflect", "absolute"):
        np.testing.assert_allclose(linalg.apply_two_term(*basis, matrix, rule), exact, rtol=1e-9)
    mixed = [terms[0], (np.diag([0.1, 0.5, -0.4, 0.3]), np.diag([1.0, 0.3, 0.5]))]
    basis = linalg.joint_eigenbasis(*mixed[0], *mixed[1], 0.1, 0.1)
    exact = reference.damped_solve(mixed, matrix, 0.1, "factor")
    np.testing.assert_allclose(linalg.apply_two_term(*basis, matrix, "reflect"), exact, rtol=1e-9)


def _low_rank(rng, d, rank):
    basis = np.linalg.qr(rng.standard_normal((d, rank)))[0]
    return basis * (rng.uniform(0.2, 1, rank) * rng.choice([-1, 1], rank)) @ basis.T


def _second_moment(rng, d):
    rows = rng.standard_normal((3 * d, d))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("rule", ["reflect", "absolute"])
@pytest.mark.parametrize("ranks", [(5, 7), (7, 1)])
def test_the_corrected_inverse_is_the_whole_one_where_the_second_term_has_the_rank(rule, ranks):
    rng = np.random.default_rng(6)
    d_in, d_out = 31, 18
    A, G = _second_moment(rng, d_in), _second_moment(rng, d_out)
    P, Q = _low_rank(rng, d_in, ranks[0]), _low_rank(rng, d_out, ranks[1])
    lam_A, lam_G = 0.3, 0.2
    matrix = rng.standard_normal((d_in, d_out))
    parts = linalg.one_term_and_correction(A, G, P, Q, lam_A, lam_G, rank=7)
    assert parts[2].shape[1] == 7 and parts[3].shape[1] == 7  # neither factor keeps all of its own
    result = linalg.apply_corrected(*parts, matrix, rule)
    dense = np.kron(A + lam_A * np.eye(d_in), G + lam_G * np.eye(d_out)) + np.kron(P, Q)
    whole = linalg.apply_two_term(*linalg.joint_eigenbasis(A, G, P, Q, lam_A, lam_G), matrix, rule)
    np.testing.assert_allclose(result, whole, rtol=1e-8, atol=1e-9)
    if rule == "reflect" and np.linalg.eigvalsh(dense)[0] > 0:
        np.testing.assert_allclose(
            tf.reshape(result, [-1]), np.linalg.solve(dense, matrix.ravel()), rtol=1e-8, atol=1e-9
        )


def test_the_correction_keeps_the_eigenpairs_of_largest_magnitude():
    rng = np.random.default_rng(7)
    d, rank = 40, 6
    A, values = _second_moment(rng, d), np.array([*np.linspace(3, 2, 3), *np.linspace(-3, -2, 3), *np.full(34, 0.01)])
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    damped = A + 0.1 * np.eye(d)
    root = np.linalg.cholesky(damped)
    P = root @ (basis * values) @ basis.T @ root.T
    _, _, K, _, s, _ = linalg.one_term_and_correction(A, A, P, P, 0.1, 0.1, rank)
    np.testing.assert_allclose(np.sort(s), np.sort(values[:rank]), rtol=1e-5)
    expected = np.linalg.inv(root).T @ (basis[:, :rank] * values[:rank]) @ basis[:, :rank].T @ np.linalg.inv(root)
    np.testing.assert_allclose((K * s).numpy() @ K.numpy().T, expected, atol=1e-4 * np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["reflect", "absolute"])
def test_the_corrected_inverse_is_positive_definite_for_indefinite_sums(rule):
    rng = np.random.default_rng(8)
    d_in, d_out, rank = 9, 7, 2
    indefinite = 0
    for _ in range(50):
        A, G = _second_moment(rng, d_in), _second_moment(rng, d_out)
        P, Q = 10 * _low_rank(rng, d_in, d_in), _low_rank(rng, d_out, d_out)
        dense = np.kron(A + 0.01 * np.eye(d_in), G + 0.01 * np.eye(d_out)) + np.kron(P, Q)
        indefinite += np.linalg.eigvalsh(dense)[0] < 0
        parts = linalg.one_term_and_correction(A, G, P, Q, 0.01, 0.01, rank)
        inverse = reference.matrix_of(lambda V: linalg.apply_corrected(*parts, V, rule), d_in, d_out)  # noqa: B023
        assert np.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0] > 0
        np.testing.assert_allclose(inverse, inverse.T, rtol=1e-8, atol=1e-8 * np.linalg.norm(inverse))
    assert indefinite > 25


def test_the_correction_of_zero_and_of_nan_terms():
    A = np.eye(20)
    zero = np.zeros((20, 20))
    parts = linalg.one_term_and_correction(A, A, zero, zero, 1.0, 1.0, 4)
    np.testing.assert_allclose(linalg.apply_corrected(*parts, np.ones((20, 20))), np.full((20, 20), 0.25))
    parts = linalg.one_term_and_correction(A, A, zero * np.nan, zero, 1.0, 1.0, 4)
    assert not np.isfinite(parts[2]).any() and np.isfinite(parts[0]).all()
