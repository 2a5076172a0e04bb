"""Computations that may fail where they run, as decompositions do, without ending the step."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.eager.record import stop_recording


def guarded(kernel: Any, arguments: list, fallback: list[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
    """`kernel(*arguments)`, or `fallback` and False where that raises.

    TensorFlow cannot catch an error inside a graph. There the kernel is called from Python, in between, which costs a
    tenth of a millisecond and no copy.

    Args:
        kernel: a `tf.function` that returns a list of tensors and a boolean scalar.
        arguments: nests of tensors.
        fallback: what it returns at worst; tensors of the dtypes and shapes of its results.
    """
    if tf.executing_eagerly():
        try:
            return kernel(*arguments)
        except tf.errors.OpError:
            return list(fallback), tf.constant(False)
    flat = tf.nest.flatten(arguments)
    used = [index for index, value in enumerate(flat) if value is not None]
    specs = [None if value is None else tf.TensorSpec(value.shape, value.dtype) for value in flat]
    concrete = kernel.get_concrete_function(*tf.nest.pack_sequence_as(arguments, specs))

    def call(*values: tf.Tensor) -> list[tf.Tensor]:
        inputs, worst = values[: len(used)], values[len(used) :]
        filled = list(flat_of_none)
        for index, value in zip(used, inputs, strict=True):
            filled[index] = value
        try:
            with stop_recording():
                results, good = concrete(*tf.nest.pack_sequence_as(structure, filled))
        except tf.errors.OpError:
            results, good = worst, tf.constant(False)
        return [*results, good]

    flat_of_none = [None] * len(flat)
    structure = tf.nest.map_structure(lambda _: None, arguments)
    inputs = [flat[index] for index in used]
    *results, good = tf.py_function(call, [*inputs, *fallback], [*(one.dtype for one in fallback), tf.bool])
    for result, one in zip(results, fallback, strict=True):
        result.set_shape(one.shape)
    good.set_shape([])
    return results, good
