"""`keras.layers.Conv1D` and `Conv2D` that report their inputs and pre-activations to the curvature recorder.

A convolution shares its weights among output positions: position `t` of example `n` sees the patch `a_{n,t}` of the
input, and `D_n = Σ_t a_{n,t} g_{n,t}ᵀ` is the exact per-example gradient (Grosse & Martens 2016, §3). Patches here have
the kernel's own row order (height, width, channel). With groups, each group of channels has a block of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kpsvd.layers.recording import (
    MAX_BLOCKS,
    RecordingLayer,
    at_least_float32,
    merge_positions,
    with_bias_row,
    with_ones,
    without_bias_row,
)


class _RecordingConvolution(RecordingLayer):
    """What the convolutions share; mixed into a class of `keras.layers`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.supports_jit = False

    def build(self, input_shape):
        super().build(input_shape)
        if self._recordable:
            self.claim()

    @property
    def _recordable(self) -> bool:
        return not self.lora_enabled and self.groups <= MAX_BLOCKS

    @property
    def expands(self) -> bool:
        """Patches of more than one position are larger than the inputs that they are cut from."""
        return math.prod(self.kernel_size) > 1

    def call(self, inputs, training=None):
        if self.data_format == "channels_first" and self.groups == 1:
            self._check_channels_first(inputs)
        if not self._recordable:
            return super().call(inputs)
        return self._activate(inputs, self.linear_map(inputs, self.kernel, self.bias), training)

    def _check_channels_first(self, inputs: Any) -> None:
        """Raises here what TensorFlow would only say in the middle of a step; Keras compiles groups, which compute."""
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if not _computes_channels_first(dtype):
            raise ValueError(
                f"Layer {self.name!r} has `data_format`='channels_first', which TensorFlow does not compute in {dtype} "
                "on this device. Expected: data_format='channels_last' (its weights have the same shapes), or a GPU. "
                f"Received: data_format={self.data_format!r}"
            )

    def linear_map(self, inputs: Any, kernel: Any, bias: Any = None) -> Any:
        """The convolution with `kernel`, and `bias` added to each position."""
        outputs = self.convolution_op(inputs, kernel)
        if bias is None:
            return outputs
        last = self.data_format == "channels_last"
        shape = (1,) * (self.rank + 1) + (self.filters,) if last else (1, self.filters) + (1,) * self.rank
        return ops.add(outputs, ops.reshape(bias, shape))

    @property
    def curvature_variables(self) -> list[keras.Variable]:
        """The kernel `[*kernel_size, channels / groups, filters]`, then the bias `[filters]` if there is one."""
        return [self._kernel] if self.bias is None else [self._kernel, self.bias]

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """One for each group: `(∏ kernel_size · channels / groups, filters / groups)`, one row more with a bias."""
        rows = math.prod(self._kernel.shape[:-1]) + (self.bias is not None)
        return [(rows, self.filters // self.groups)] * self.groups

    def samples(self, inputs: tf.Tensor, gradient: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Patches of the inputs and the gradients at each output position, row by row, group by group."""
        inputs, gradient = at_least_float32(inputs), at_least_float32(gradient)
        if self.data_format == "channels_first":
            order = [0, *range(2, self.rank + 2), 1]
            inputs, gradient = tf.transpose(inputs, order), tf.transpose(gradient, order)
        gradients = tf.split(merge_positions(gradient), self.groups, axis=-1)
        patches = extract_patches(
            groups_to_batch(inputs, self.groups), self.kernel_size, self.strides, self.dilation_rate, self.padding
        )
        activations = merge_positions(patches)
        if self.bias is not None:
            activations = with_ones(activations)
        return list(zip(tf.split(activations, self.groups, axis=0), gradients, strict=True))

    def to_matrices(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """The kernel as `[∏ kernel_size · channels / groups, filters]`, the bias as its last row, split into groups."""
        matrix = tf.reshape(values[0], [-1, self.filters])
        if self.bias is not None:
            matrix = with_bias_row(matrix, values[1])
        return tf.split(matrix, self.groups, axis=1)

    def from_matrices(self, matrices: list[tf.Tensor]) -> list[tf.Tensor]:
        """The inverse of `to_matrices`."""
        matrix = tf.concat(matrices, axis=1)
        if self.bias is None:
            return [tf.reshape(matrix, self._kernel.shape)]
        kernel, bias = without_bias_row(matrix)
        return [tf.reshape(kernel, self._kernel.shape), bias]


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVDConv2D(_RecordingConvolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose weights `keras_kpsvd.KPSVD` trains by natural gradient.

    The arguments, the weights and the outputs are those of `keras.layers.Conv2D`; with any other optimizer it is that
    layer. All its options are supported: strides, padding, dilation, groups, data formats, with or without a bias. The
    Fisher block is that of the shared weights, `D_n` summed over positions.

    TensorFlow has no `data_format="channels_first"` in every dtype on every device (in float64 not on a CPU): calling
    the layer then raises a ValueError that says so.

    `jit_compile=True` is refused by Keras for models that hold one; see `KPSVDDense`. A layer with LoRA, or with more
    than 32 groups, computes as `Conv2D` does and trains by plain momentum.

    Args:
        *args: as `keras.layers.Conv2D`.
        **kwargs: as `keras.layers.Conv2D`.
    """


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVDConv1D(_RecordingConvolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D` whose weights `keras_kpsvd.KPSVD` trains by natural gradient; see `KPSVDConv2D`.

    `padding="causal"` included.

    Args:
        *args: as `keras.layers.Conv1D`.
        **kwargs: as `keras.layers.Conv1D`.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Keras's, which knows "causal" padding in `call` only."""
        padding = self.padding
        if padding == "causal":
            inputs, padding = ops.pad(inputs, self._compute_causal_padding()), "valid"
        return ops.conv(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@functools.cache
def _computes_channels_first(dtype: str) -> bool:
    """Whether TensorFlow computes ungrouped convolutions in that data format where it places them by default.

    A GPU does. On a CPU it hangs on oneDNN, its version, the processor and the dtype, so it is tried. Graphs fail only
    when they run, with the same kernels.
    """
    with tf.init_scope():
        try:
            tf.nn.conv2d(tf.zeros([1, 1, 3, 3], dtype), tf.zeros([3, 3, 1, 1], dtype), 1, "SAME", data_format="NCHW")
        except tf.errors.UnimplementedError:
            return False
    return True


def groups_to_batch(inputs: tf.Tensor, groups: int) -> tf.Tensor:
    """`[batch, *spatial, channels]` as `[groups · batch, *spatial, channels / groups]`, one group after another.

    Patches of all groups are then cut at once: a cut for each group and tap made graphs of thousands of operations.
    """
    if groups == 1:
        return inputs
    shape, rank = tf.shape(inputs), inputs.shape.rank
    split = tf.reshape(inputs, tf.concat([shape[:-1], [groups, inputs.shape[-1] // groups]], axis=0))
    split = tf.transpose(split, [rank - 1, *range(rank - 1), rank])
    merged = tf.reshape(split, tf.concat([[groups * shape[0]], tf.shape(split)[2:]], axis=0))
    return tf.ensure_shape(merged, [None, *inputs.shape[1:-1], inputs.shape[-1] // groups])


def extract_patches(
    inputs: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: str,
) -> tf.Tensor:
    """What each output position of a convolution sees, for any number of spatial axes.

    One strided slice for each tap, side by side: on a CPU in half the time of `tf.image.extract_patches`.

    Args:
        inputs: `[batch, *spatial, channels]`; sizes may be unknown statically.
        kernel_size: of each spatial axis, as the others.
        strides: steps between output positions.
        dilation: steps between the taps of the kernel.
        padding: "valid", "same" or "causal" (all zeros in front), as Keras understands them.

    Returns:
        `[batch, *outputs, ∏ kernel_size · channels]`, in the kernel's own row order: channels run fastest, then the
        taps of the last axis.
    """
    batch, sizes, channels = tf.shape(inputs)[0], inputs.shape[1:-1], inputs.shape[-1]
    dynamic = tf.unstack(tf.shape(inputs)[1:-1])
    paddings, outputs, shape = [[0, 0]], [], []
    for axis, (taps, step, spread) in enumerate(zip(kernel_size, strides, dilation, strict=True)):
        size = dynamic[axis] if sizes[axis] is None else sizes[axis]
        reach = (taps - 1) * spread
        if padding == "valid":
            before, after, count = 0, 0, (size - reach - 1) // step + 1
        elif padding == "causal":
            before, after, count = reach, 0, (size - 1) // step + 1
        else:
            count = (size + step - 1) // step
            total = (count - 1) * step + reach + 1 - size
            total = tf.maximum(total, 0) if sizes[axis] is None else max(total, 0)
            before, after = total // 2, total - total // 2
        paddings.append([before, after])
        outputs.append(count)
        shape.append(None if sizes[axis] is None else count)
    padded = tf.pad(inputs, [*paddings, [0, 0]])
    seen = []
    for taps in itertools.product(*map(range, kernel_size)):
        starts = [tap * spread for tap, spread in zip(taps, dilation, strict=True)]
        ends = [start + (count - 1) * step + 1 for start, count, step in zip(starts, outputs, strides, strict=True)]
        seen.append(tf.strided_slice(padded, [0, *starts, 0], [batch, *ends, channels], [1, *strides, 1]))
    patches = tf.concat(seen, axis=-1)
    return tf.ensure_shape(patches, [None, *shape, math.prod(kernel_size) * channels])
