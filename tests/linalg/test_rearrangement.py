"""The operator is the dense rearrangement, at any number of positions and with terms taken off."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_kpsvd.linalg as linalg
from tests import reference
from tests.linalg import cases


def _dense(activations, gradients, base):
    d_in, d_out = activations.shape[-1], gradients.shape[-1]
    matrix = reference.fisher(activations, gradients)
    return reference.rearrange(matrix - sum((np.kron(a, g) for a, g in base), np.zeros_like(matrix)), d_in, d_out)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 6),
    shared=st.sampled_from([1, 2, 3, 17]),
    d_in=st.integers(1, 7),
    d_out=st.integers(1, 7),
    subtracted=st.integers(0, 2),
)
def test_products_and_norms_are_those_of_the_dense_rearrangement(seed, count, shared, d_in, d_out, subtracted):
    rng = np.random.default_rng(seed)
    activations, gradients = cases.dependent(rng, count, shared, d_in, d_out)
    base = [(rng.standard_normal((d_in, d_in)), rng.standard_normal((d_out, d_out))) for _ in range(subtracted)]
    operator, dense = cases.operator(activations, gradients, base), _dense(activations, gradients, base)
    left, right = rng.standard_normal((d_in, d_in)), rng.standard_normal((d_out, d_out))
    close = {"atol": 1e-12 * (1 + np.linalg.norm(dense)) * np.linalg.norm(left) * np.linalg.norm(right), "rtol": 1e-10}
    for own in (operator, operator.prepared()):
        np.testing.assert_allclose(np.ravel(own.matvec(right)), dense @ right.ravel(), **close)
        np.testing.assert_allclose(np.ravel(own.rmatvec(left)), dense.T @ left.ravel(), **close)
        np.testing.assert_allclose(own.inner(left, right), left.ravel() @ dense @ right.ravel(), **close)
    np.testing.assert_allclose(operator.frobenius_norm(), np.linalg.norm(dense), rtol=1e-7)
    np.testing.assert_allclose(operator.frobenius_norm_squared(), np.linalg.norm(dense) ** 2, rtol=1e-7)
    balanced, unit = operator.balanced()
    np.testing.assert_allclose(unit**2 * np.ravel(balanced.matvec(right)), dense @ right.ravel(), **close)


def test_both_ways_of_multiplying_occur_and_agree():
    rng = np.random.default_rng(0)
    few = cases.operator(*cases.dependent(rng, 4, 2, 9, 8))
    many = cases.operator(*cases.dependent(rng, 4, 40, 3, 5))
    assert not few.forms_weight_gradients and many.forms_weight_gradients
    assert few.prepared().weight_gradients is None and many.prepared().weight_gradients.shape == [3, 4, 5]


def test_deflating_leaves_the_operator_as_it_was_and_subtracts():
    activations, gradients = cases.dependent(np.random.default_rng(1), 8, 1, 4, 3)
    operator = cases.operator(activations, gradients)
    deflated = operator.deflate(tf.eye(4, dtype=tf.float64), tf.eye(3, dtype=tf.float64))
    assert not operator.subtracted
    difference = operator.matvec(np.eye(3)) - deflated.matvec(np.eye(3))
    np.testing.assert_allclose(difference, 3 * np.eye(4), atol=1e-12)


@pytest.mark.parametrize("shared", [1, 3])
def test_deflating_kfac_passes_coefficients_that_stand_for_its_factors(shared):
    activations, gradients = cases.dependent(np.random.default_rng(1), 8, shared, 4, 3)
    base = reference.kfac_factors(activations, gradients)
    operator = cases.operator(activations, gradients).deflate_kfac(*base)
    left, right, x, y = operator.subtracted[0]
    np.testing.assert_array_equal(left, base[0])
    np.testing.assert_array_equal(right, base[1])
    assert (x is None) == (y is None) == (shared > 1)
    if shared == 1:
        np.testing.assert_allclose(np.einsum("n,nti,ntj->ij", x, activations, activations), left, atol=1e-12)
        np.testing.assert_allclose(np.einsum("n,nti,ntj->ij", y, gradients, gradients), right, atol=1e-12)


@pytest.mark.parametrize("shared", [1, 3, 30])
def test_norm_has_float32_range(shared):
    activations, gradients = cases.dependent(np.random.default_rng(2), 6, shared, 5, 4)
    expected = np.linalg.norm(reference.fisher(activations, gradients))
    operator = cases.operator(*(x.astype("float32") * np.float32(1e8) for x in (activations, gradients)))
    np.testing.assert_allclose(float(operator.frobenius_norm()) / 1e32, expected, rtol=1e-5)


def test_norm_of_what_is_left_is_resolved_in_float32():
    activations, gradients = (x.astype("float32") for x in cases.dependent(np.random.default_rng(3), 20, 1, 4, 3))
    full = reference.fisher(activations, gradients)
    base = [tuple(x.astype("float32") for x in pair) for pair in reference.best_terms(full, 4, 3, 5)]
    left_over = np.linalg.norm(full - reference.kronecker_sum(base))
    np.testing.assert_allclose(cases.operator(activations, gradients, base).frobenius_norm(), left_over, rtol=1e-3)


def test_misuse_raises_and_names_the_argument():
    with pytest.raises(ValueError, match=r"`activations` must be of shape"):
        linalg.RearrangedFisher(np.zeros([5, 4]), np.zeros([5, 1, 3]))
    with pytest.raises(ValueError, match=r"batch and shared"):
        linalg.RearrangedFisher(np.zeros([5, 2, 4]), np.zeros([5, 1, 3]))
    with pytest.raises(ValueError, match=r"dtype"):
        linalg.RearrangedFisher(np.zeros([5, 1, 4]), np.zeros([5, 1, 3], "float32"))
    with pytest.raises(ValueError, match=r"float32 or float64"):
        linalg.RearrangedFisher(np.zeros([5, 1, 4], "int32"), np.zeros([5, 1, 3], "int32"))
