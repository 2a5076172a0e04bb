"""Averages over refreshes against averages of the dense matrices."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.curvature.averaging import average_terms, average_weight, rescale_to_trace
from tests import reference

D_IN, D_OUT = 4, 3


def _definite(rng, size):
    root = rng.standard_normal((size, size + 1))
    return root @ root.T


def _symmetric(rng, size):
    root = rng.standard_normal((size, size))
    return root + root.T


def _pairs(seed, terms):
    rng = np.random.default_rng(seed)
    pairs = [(_definite(rng, D_IN), _definite(rng, D_OUT))]
    if terms == 2:
        pairs.append((0.3 * _symmetric(rng, D_IN), 0.3 * _symmetric(rng, D_OUT)))
    return tuple((tf.constant(a), tf.constant(g)) for a, g in pairs)


def _dense(pairs):
    return reference.kronecker_sum(pairs)


def _close(one, other):
    return np.linalg.norm(one - other) <= 1e-9 * np.linalg.norm(other)


@pytest.mark.parametrize("factorwise", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_equal_batches_leave_the_average_unchanged(terms, factorwise):
    pairs = _pairs(0, terms)
    average = pairs
    for count in range(1, 20):
        average = average_terms(average, pairs, average_weight(tf.constant(count), 0.95), factorwise=factorwise)
    assert _close(_dense(average), _dense(pairs))


@pytest.mark.parametrize("trace", [None, 2.0])
@pytest.mark.parametrize("terms", [1, 2])
def test_signs_and_scales_of_the_terms_that_come_do_not_matter(terms, trace):
    old, new = _pairs(0, terms), _pairs(1, terms)
    trace = None if trace is None else tf.constant(trace, tf.float64)
    expected = average_terms(old, new, tf.constant(0.3), factorwise=False, trace=trace)

    def disguise(pairs, scales):
        return tuple((a * scale, g / scale) for (a, g), scale in zip(pairs, scales, strict=False))

    for scales in ((3.0, -1.0), (0.01, -20.0), (1e3, 1e-3)):
        averaged = average_terms(
            disguise(old, scales[::-1] if terms == 1 and min(scales) > 0 else (1.0, scales[1])),
            disguise(new, scales),
            tf.constant(0.3),
            factorwise=False,
            trace=trace,
        )
        for one, other in zip(averaged, expected, strict=True):
            assert _close(np.kron(*one), np.kron(*other))


@pytest.mark.parametrize("weight", [0.05, 0.5, 1.0])
def test_one_term_is_the_best_approximation_of_the_averaged_matrix(weight):
    old, new = _pairs(0, 1), _pairs(1, 1)
    ((a, g),) = average_terms(old, new, tf.constant(weight, tf.float64), factorwise=False)
    matrix = (1 - weight) * _dense(old) + weight * _dense(new)
    error = np.linalg.norm(matrix - np.kron(a, g))
    optimum = reference.optimum_error(matrix, D_IN, D_OUT, 1)
    assert error - optimum <= 1e-9 * np.linalg.norm(matrix)


@pytest.mark.parametrize("factorwise", [False, True])
@pytest.mark.parametrize("weight", [0.05, 0.5, 1.0])
def test_the_second_term_is_the_best_for_what_the_base_leaves_of_the_averaged_matrix(weight, factorwise):
    old, new = _pairs(0, 2), _pairs(1, 2)
    base, second = average_terms(old, new, tf.constant(weight, tf.float64), factorwise=factorwise)
    left = (1 - weight) * _dense(old) + weight * _dense(new) - np.kron(*base)
    error = np.linalg.norm(left - np.kron(*second))
    assert error - reference.optimum_error(left, D_IN, D_OUT, 1) <= 1e-9 * np.linalg.norm(_dense(new))
    expected = [(1 - weight) * before + weight * now for before, now in zip(old[0], new[0], strict=True)]
    if factorwise:
        for factor, other in zip(base, expected, strict=True):
            np.testing.assert_allclose(factor, other, rtol=1e-12, atol=1e-12)


def test_the_base_stays_positive_semi_definite_over_many_batches():
    rng = np.random.default_rng(0)
    average = _pairs(0, 2)
    for count in range(1, 30):
        # Rank-one factors are on the boundary of what is positive semi-definite.
        a, g = rng.standard_normal(D_IN), rng.standard_normal(D_OUT)
        new = (
            (tf.constant(np.outer(a, a)), tf.constant(np.outer(g, g))),
            (tf.constant(_symmetric(rng, D_IN)), tf.constant(_symmetric(rng, D_OUT))),
        )
        average = average_terms(average, new, average_weight(tf.constant(count), 0.5), factorwise=False)
        for factor in average[0]:
            values = np.linalg.eigvalsh(factor)
            assert values[-1] > 0
            assert values[0] >= -1e-12 * values[-1]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1 - 1e-9])
def test_the_weights_make_a_bias_corrected_exponential_average(decay):
    values = np.random.default_rng(0).standard_normal(12)
    average = 0.0
    for count, value in enumerate(values):
        weight = float(average_weight(tf.constant(count, tf.int64), decay))
        average = (1 - weight) * average + weight * value
        powers = decay ** np.arange(count, -1, -1)
        assert average == pytest.approx(np.sum(powers * values[: count + 1]) / np.sum(powers), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("factorwise", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_the_first_average_is_the_first_value(terms, factorwise):
    new = _pairs(1, terms)
    zero = tuple((tf.zeros_like(a), tf.zeros_like(g)) for a, g in new)
    average = average_terms(zero, new, average_weight(tf.constant(0), 0.95), factorwise=factorwise)
    assert _close(_dense(average), _dense(new))


@pytest.mark.parametrize("factorwise", [False, True])
@pytest.mark.parametrize("terms", [1, 2])
def test_zero_terms_average_without_nan(terms, factorwise):
    """A dead layer has nothing but zeros; one that dies fades out."""
    old = _pairs(0, terms)
    zero = tuple((tf.zeros_like(a), tf.zeros_like(g)) for a, g in old)
    trace = tf.constant(0.0, tf.float64)
    nothing = average_terms(zero, zero, tf.constant(0.5), factorwise=factorwise, trace=trace)
    np.testing.assert_array_equal(_dense(nothing), 0)
    fading = average_terms(old, zero, tf.constant(0.5), factorwise=factorwise)
    if not factorwise:
        assert _close(_dense(fading), 0.5 * _dense(old))
    else:
        np.testing.assert_allclose(np.kron(*fading[0]), 0.25 * np.kron(*old[0]), rtol=1e-10)
        assert np.all(np.isfinite(_dense(fading)))


def test_rescaling_sets_the_trace_and_keeps_the_product():
    ((a, g),) = _pairs(0, 1)
    one, other = rescale_to_trace((a, g), tf.constant(7.0, tf.float64))
    assert np.trace(one) == pytest.approx(7.0)
    np.testing.assert_allclose(np.kron(one, other), np.kron(a, g), rtol=1e-12)
    for trace in (0.0, -1.0, np.nan, np.inf):
        one, other = rescale_to_trace((a, g), tf.constant(trace, tf.float64))
        np.testing.assert_array_equal(one, a)
        np.testing.assert_array_equal(other, g)
