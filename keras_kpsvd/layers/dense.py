"""`keras.layers.Dense` that reports its inputs and pre-activations to the curvature recorder."""

from __future__ import annotations

import keras
import tensorflow as tf
from keras import ops

from keras_kpsvd.layers.recording import RecordingLayer


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVDDense(RecordingLayer, keras.layers.Dense):
    """`keras.layers.Dense` whose weights `keras_kpsvd.KPSVD` trains by natural gradient.

    The arguments, the weights and the outputs are those of `keras.layers.Dense`; with any other optimizer it is that
    layer. Inputs `[batch, ..., d]`: axes between the first and the last share the weights (time steps, say) and become
    the axis `shared` of the samples. `jit_compile=True` is refused by Keras for models that hold one, since XLA has no
    fast decompositions on the CPU and the optimizer compiles its own kernels.

    Between models of the two layers weights move by `set_weights`; Keras's weight files hold the names of classes.

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
        preactivation = ops.matmul(inputs, self.kernel)
        if self.bias is not None:
            preactivation = ops.add(preactivation, self.bias)
        return self._activate(inputs, preactivation, training)

    @property
    def curvature_variables(self) -> list[keras.Variable]:
        """The kernel `[d, units]`, then the bias `[units]` if there is one."""
        return [self._kernel] if self.bias is None else [self._kernel, self.bias]

    @property
    def curvature_shape(self) -> tuple[int, int]:
        """`(d + 1, units)` with a bias, `(d, units)` without."""
        inputs, units = self._kernel.shape
        return inputs + (self.bias is not None), units

    def sample_activations(self, inputs: tf.Tensor) -> tf.Tensor:
        """Inputs `[batch, ..., d]` as `[batch, shared, d_in]`, a column of ones last where there is a bias."""
        activations = _as_sequence(inputs)
        if self.bias is None:
            return activations
        return tf.concat([activations, tf.ones_like(activations[..., :1])], axis=-1)

    def sample_gradients(self, gradient: tf.Tensor) -> tf.Tensor:
        """A gradient by the pre-activation `[batch, ..., units]` as `[batch, shared, units]`."""
        return _as_sequence(gradient)

    def to_matrix(self, values: list[tf.Tensor]) -> tf.Tensor:
        """`[kernel]` or `[kernel, bias]` as one matrix, the bias as its last row."""
        return values[0] if self.bias is None else tf.concat([values[0], values[1][None, :]], axis=0)

    def from_matrix(self, matrix: tf.Tensor) -> list[tf.Tensor]:
        """The inverse of `to_matrix`."""
        return [matrix] if self.bias is None else [matrix[:-1], matrix[-1]]


def _as_sequence(values: tf.Tensor) -> tf.Tensor:
    """`[batch, ..., features]` as `[batch, shared, features]` in float32, or float64 where it came so."""
    if values.dtype != tf.float64:
        values = tf.cast(values, tf.float32)
    if values.shape.rank == 2:
        return values[:, None, :]
    if values.shape.rank == 3:
        return values
    shape = tf.shape(values)
    shared = tf.reduce_prod(shape[1:-1])
    static = values.shape[1:-1].num_elements()
    flat = tf.reshape(values, [shape[0], shared if static is None else static, values.shape[-1]])
    return flat
