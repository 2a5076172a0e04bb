"""Symmetric matrices in half the memory: every entry comes back, wherever it was kept."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd.linalg import pack, packed_size, unpack


def _whole(lower):
    return np.tril(lower) + np.tril(lower, -1).T


def _open(function, *shape):
    """Traced with its sizes left open, as training does."""
    return tf.function(function, input_signature=[tf.TensorSpec(shape, tf.float32)], autograph=False)


PACK, UNPACK = _open(pack, None, None), _open(unpack, None)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), exponent=st.integers(-30, 30), open_sizes=st.booleans(), seed=st.integers(0, 2**16))
def test_the_lower_triangle_is_kept_to_the_last_bit(rows, exponent, open_sizes, seed):
    matrix = (np.random.default_rng(seed).normal(size=(rows, rows)) * 10.0**exponent).astype("float32")
    packed = (PACK if open_sizes else pack)(tf.constant(matrix))
    assert packed.shape == (packed_size(rows),)
    np.testing.assert_array_equal(np.sort(packed), np.sort(matrix[np.tril_indices(rows)]))
    np.testing.assert_array_equal((UNPACK if open_sizes else unpack)(packed), _whole(matrix))


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_nothing_above_the_diagonal_is_read(rows):
    matrix = np.random.default_rng(rows).normal(size=(rows, rows))
    spoilt = np.where(np.triu(np.ones_like(matrix), 1) > 0, np.nan, matrix)
    np.testing.assert_array_equal(unpack(pack(tf.constant(spoilt))), _whole(matrix))


@pytest.mark.parametrize("rows", [2, 5])
def test_what_is_not_finite_comes_back_in_its_place(rows):
    matrix = np.eye(rows)
    matrix[-1, 0], matrix[1, 1] = np.nan, np.inf
    np.testing.assert_array_equal(unpack(pack(tf.constant(matrix))), _whole(matrix))


@pytest.mark.parametrize("rows", [4_095, 4_096])
def test_sizes_of_large_matrices_are_found_again(rows):
    """From the length alone, in a graph from a floating-point root."""
    packed = tf.zeros([packed_size(rows)])
    assert unpack(packed).shape == UNPACK(packed).shape == (rows, rows)
