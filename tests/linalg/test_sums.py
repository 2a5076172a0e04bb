"""Sums that round alike, whichever of their terms' memory is free."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.linalg import mean_by, sum_in_order


@pytest.mark.parametrize("fresh", itertools.product([False, True], repeat=3))
@pytest.mark.parametrize("size", [1, 1000])
def test_terms_are_added_in_the_order_given(fresh, size):
    """`(2²⁵ − 2²⁵) + 1`; in float32 both other orders give 0. `tf.add_n` starts with the first term that is fresh."""

    def doubled(zero, term):
        return tf.cond(zero == 0, lambda: term * 2.0, lambda: term)

    @tf.function(autograph=False)
    def total(zero, *terms):
        return sum_in_order(doubled(zero, one) if new else one for one, new in zip(terms, fresh, strict=True))

    terms = [np.full(size, value, "float32") for value in (2.0**25, -(2.0**25), 1.0)]
    parts = [tf.constant(term / 2.0 if new else term) for term, new in zip(terms, fresh, strict=True)]
    np.testing.assert_array_equal(total(tf.constant(0), *parts), np.ones(size))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_means_count_values_by_their_weights_at_every_scale(scale):
    rng = np.random.default_rng(0)
    weights, values = rng.random((2, 7)) * scale
    found = mean_by(tf.constant(weights, tf.float32), tf.constant(values, tf.float32))
    np.testing.assert_allclose(found, np.average(values, weights=weights), rtol=1e-6)
    assert mean_by(tf.zeros(3), tf.fill([3], np.float32(scale))) == 0
