"""Sums that round alike every time, and means."""

from __future__ import annotations

from collections.abc import Iterable

import tensorflow as tf


def sum_in_order(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """The sum of tensors of one shape, to the same last bit whenever it is computed.

    `tf.add_n` of three or more starts with one whose memory it may overwrite. Where terms are used by other operations
    too, which one that is depends on what has run by then, and two runs of one program differ. Chains of `+` are no way
    out: TensorFlow's graph optimizer makes `add_n` of them.

    Args:
        tensors: at least one.

    Returns:
        Their sum, in their dtype.
    """
    return tf.reduce_sum(tf.stack([*tensors]), axis=0)


def mean_by(weights: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`Σ wᵢ vᵢ / Σ wᵢ`, 0 where all weights are; no product of two of them leaves float32's range.

    Args:
        weights: `[n]`, not negative.
        values: `[n]`.

    Returns:
        Scalar.
    """
    return tf.reduce_sum(tf.math.divide_no_nan(weights, tf.reduce_sum(weights)) * values)
