"""`keras.layers.Dense` that reports its inputs and pre-activations to the curvature recorder."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kpsvd.layers.recording import (
    RecordingLayer,
    at_least_float32,
    merge_positions,
    with_bias_row,
    with_ones,
    without_bias_row,
)


@keras.saving.register_keras_serializable(package="keras_kpsvd", name="KPSVDDense")
class KPSVDDense(RecordingLayer, keras.layers.Dense):
    """`keras.layers.Dense` whose weights `keras_kpsvd.KPSVD` trains by natural gradient.

    The arguments, the weights and the outputs are those of `keras.layers.Dense`; with any other optimizer it is that
    layer. Inputs `[batch, ..., d]`: axes between the first and the last share the weights (time steps, say) and become
    the axis `shared` of the samples. `jit_compile=True` is refused by Keras for models that hold one, since XLA has no
    fast decompositions on the CPU and the optimizer compiles its own kernels.

    Weights files of models with either layer fit each other: Keras names their groups by the class's `__name__`, which
    is "Dense" (so are automatic names of layers and the lines of `summary`); see `layers.swapping`.

    A layer with LoRA or a quantized kernel computes as `Dense` does and trains by plain momentum.

    Args:
        *args: as `keras.layers.Dense`.
        **kwargs: as `keras.layers.Dense`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.supports_jit = False

    def build(self, input_shape):
        super().build(input_shape)
        if self._recordable:
            self.claim()

    @property
    def _recordable(self) -> bool:
        return not self.lora_enabled and self.quantization_mode is None

    def call(self, inputs, training=None):
        if not self._recordable:
            return super().call(inputs, training=training)
        return self._activate(inputs, self.linear_map(inputs, self.kernel, self.bias), training)

    def linear_map(self, inputs: Any, kernel: Any, bias: Any = None) -> Any:
        """`inputs · kernel + bias`."""
        outputs = ops.matmul(inputs, kernel)
        return outputs if bias is None else ops.add(outputs, bias)

    @property
    def curvature_variables(self) -> list[keras.Variable]:
        """The kernel `[d, units]`, then the bias `[units]` if there is one."""
        return [self._kernel] if self.bias is None else [self._kernel, self.bias]

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """One block, `(d + 1, units)` with a bias, `(d, units)` without."""
        inputs, units = self._kernel.shape
        return [(inputs + (self.bias is not None), units)]

    def samples(self, inputs: tf.Tensor, gradient: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Inputs, a column of ones last where there is a bias, and gradients, the axes in between merged."""
        activations, gradients = (merge_positions(at_least_float32(values)) for values in (inputs, gradient))
        return [(activations if self.bias is None else with_ones(activations), gradients)]

    def to_matrices(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """`[kernel]` or `[kernel, bias]` as one matrix, the bias as its last row."""
        return [values[0] if self.bias is None else with_bias_row(*values)]

    def from_matrices(self, matrices: list[tf.Tensor]) -> list[tf.Tensor]:
        """The inverse of `to_matrices`."""
        (matrix,) = matrices
        return [matrix] if self.bias is None else without_bias_row(matrix)
