"""Norms and row scalings that neither overflow nor underflow.

A Fisher block is of fourth degree in the samples, its squared norm of eighth: in float32, activations and gradients of
a thousand features near 1e4 already overflow it. Everything here divides by the largest magnitude first.
"""

import numpy as np
import tensorflow as tf


def as_scalar(number: float | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """A number as a tensor of `dtype`; Python numbers keep their digits, which `tf.cast` would round to float32."""
    if tf.is_tensor(number) or isinstance(number, tf.Variable):
        return tf.cast(number, dtype)
    return tf.constant(np.asarray(number, tf.as_dtype(dtype).as_numpy_dtype))


def size_of(tensor: tf.Tensor, axis: int) -> int | tf.Tensor:
    """The length of one axis: a number where it is known when traced, else an int32 scalar tensor."""
    known = tensor.shape[axis]
    return tf.shape(tensor)[axis] if known is None else known


def safe_norm(x: tf.Tensor, axis: int | list[int] | None = None, keepdims: bool = False) -> tf.Tensor:
    """Euclidean (Frobenius) norm, free of overflow and underflow in the squares.

    Args:
        x: Tensor of any shape, real.
        axis: Axes the norm runs over; all of them by default.
        keepdims: Keep the reduced axes with length one.

    Returns:
        `‖x‖₂` over `axis`, in the dtype of `x`. Zero for zero input, NaN for NaN input.
    """
    largest = tf.reduce_max(tf.abs(x), axis=axis, keepdims=True)
    # An empty reduction gives -inf; a zero one must not divide by zero.
    divisor = tf.where(largest > 0, largest, tf.ones_like(largest))
    norm = divisor * tf.sqrt(tf.reduce_sum(tf.square(x / divisor), axis=axis, keepdims=True))
    if keepdims:
        return norm
    return tf.reshape(norm, []) if axis is None else tf.squeeze(norm, axis=axis)


def divide_no_nan(numerator: tf.Tensor, denominator: tf.Tensor) -> tf.Tensor:
    """`numerator / denominator`, zero wherever the denominator is zero (NaN and infinities pass through)."""
    return tf.math.divide_no_nan(numerator, denominator)


def unit_rows(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits vectors along the last axis into directions and lengths.

    Args:
        rows: `[..., d]`.

    Returns:
        `(directions [..., d], lengths [...])` with `rows = lengths[..., None] * directions`. A zero vector keeps a zero
        direction.
    """
    largest = tf.reduce_max(tf.abs(rows), axis=-1, keepdims=True)
    # Two divisions: the first brings the entries to order one, so that the second is by a number of order one.
    scaled = divide_no_nan(rows, largest)
    norm = tf.norm(scaled, axis=-1, keepdims=True)
    return divide_no_nan(scaled, norm), tf.squeeze(largest * norm, axis=-1)


def all_finite(*tensors: tf.Tensor) -> tf.Tensor:
    """Scalar boolean: no NaN and no infinity in any of the tensors."""
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]))
