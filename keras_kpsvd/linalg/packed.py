"""Symmetric matrices in half the memory.

Rectangular full packed format (Gustavson, Waśniewski, Dongarra & Langou 2010, ACM Trans. Math. Softw. 37, 18): of the
lower triangle `[[L₁₁, ·], [M, L₂₂]]`, `L₂₂ᵀ` fits above `L₁₁`, so that slices move all entries and no index does.
"""

from __future__ import annotations

import tensorflow as tf

from .scaling import size_of


def packed_size(rows: int) -> int:
    """The length of the packed form of a matrix of so many rows."""
    return rows * (rows + 1) // 2


def rows_of(length: int | tf.Tensor) -> int | tf.Tensor:
    """The inverse of `packed_size`, of a number or an int32 scalar: `√(d² + d)` is between `d` and `d + 1`."""
    if tf.is_tensor(length):
        return tf.cast(tf.sqrt(2 * tf.cast(length, tf.float64)), tf.int32)
    return int((2 * length) ** 0.5)


def pack(matrix: tf.Tensor) -> tf.Tensor:
    """The lower triangle of a symmetric matrix.

    Args:
        matrix: `[d, d]`, `d` at least 1; what is above its diagonal is not read.

    Returns:
        `[d (d + 1) / 2]`, in no order of meaning.
    """
    _, first, even = _split(size_of(matrix, 0))
    lower = tf.linalg.band_part(matrix[:first, :first], -1, 0)
    upper = tf.transpose(tf.linalg.band_part(matrix[first:, first:], -1, 0))
    triangles = tf.pad(lower, [[even, 0], [0, 0]]) + tf.pad(upper, [[0, 1], [1 - even, 0]])
    return tf.reshape(tf.concat([triangles, matrix[first:, :first]], 0), [-1])


def unpack(packed: tf.Tensor) -> tf.Tensor:
    """The symmetric matrix `[d, d]`, exactly symmetric, of `packed [d (d + 1) / 2]`."""
    rows, first, even = _split(rows_of(size_of(packed, 0)))
    both = tf.reshape(packed, [rows + even, first])
    triangles, below = both[: first + even], both[first + even :]
    lower = tf.linalg.band_part(triangles[even:], -1, 0)
    upper = tf.linalg.band_part(triangles[:-1, 1 - even :], 0, -1)
    whole = [_mirrored(lower), tf.transpose(below)], [below, _mirrored(tf.transpose(upper))]
    return tf.concat([tf.concat(blocks, 1) for blocks in whole], 0)


def _split(rows: int | tf.Tensor) -> tuple:
    """The rows, how many of them are in the first block, and 1 where their number is even, else 0."""
    return rows, (rows + 1) // 2, 1 - rows % 2


def _mirrored(lower: tf.Tensor) -> tf.Tensor:
    return tf.linalg.set_diag(lower + tf.transpose(lower), tf.linalg.diag_part(lower))
