"""`keras.layers.EinsumDense` that reports its inputs and pre-activations to the curvature recorder.

The letters of the equation say what each axis is. An axis of input and output alone is the batch or a position that
shares the weights; one of input and kernel is summed over, one of kernel and output is made by it; one of all three has
weights of its own at each index, as the groups of a grouped convolution have. So the samples of an index are
`ā [batch, shared, d_in]` and `g [batch, shared, d_out]`, and `D_n = Σ_t ā_{n,t} g_{n,t}ᵀ` is the exact per-example
gradient of its weights.
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kpsvd.layers.recording import RecordingLayer, at_least_float32, with_ones

_EQUATION = re.compile(r"(\.\.\.)?([a-zA-Z]+)(\.\.\.)?,([a-zA-Z]+)->(\.\.\.)?([a-zA-Z]+)(\.\.\.)?")


@dataclass(frozen=True)
class EinsumAxes:
    """What the axes of an einsum equation are, a letter each.

    Attributes:
        inputs: of the inputs, in their order, the ellipsis spelled out.
        kernel: of the kernel.
        outputs: of the outputs, likewise.
        blocks: of all three, in the kernel's order, as the next two.
        contracted: of inputs and kernel.
        produced: of kernel and outputs.
        shared: of inputs and outputs, the batch (the first of both) apart, in the order of the inputs.
    """

    inputs: str
    kernel: str
    outputs: str
    blocks: str
    contracted: str
    produced: str
    shared: str

    @classmethod
    def of(cls, equation: str, rank: int) -> EinsumAxes | None:
        """The axes of `equation` for inputs of that rank; None where the samples can't be had from it.

        That is where the first axes of input and output are not one and the same, or the kernel has that axis too (the
        batch is mixed, or its examples have weights of their own), an axis of the inputs is summed up before the kernel
        sees it, a letter stands twice in one operand, or the kernel only scales elements (no axis contracted or
        produced).
        """
        parsed = _EQUATION.fullmatch(equation)
        if parsed is None:
            return None
        left, inputs, right, kernel, left_output, outputs, right_output = parsed.groups(default="")
        if (left, right) != (left_output, right_output) or (left and right):
            return None
        free = [letter for letter in string.ascii_letters if letter not in equation]
        elided = rank - len(inputs)
        if not 0 <= elided <= len(free) or (elided and not (left or right)):
            return None
        spelled = "".join(free[:elided])
        inputs, outputs = (spelled + inputs, spelled + outputs) if left else (inputs + spelled, outputs + spelled)
        if any(len(set(letters)) < len(letters) for letters in (inputs, kernel, outputs)):
            return None
        if inputs[0] != outputs[0] or inputs[0] in kernel or set(inputs) - set(kernel) - set(outputs):
            return None
        axes = cls(
            inputs,
            kernel,
            outputs,
            blocks="".join(letter for letter in kernel if letter in inputs and letter in outputs),
            contracted="".join(letter for letter in kernel if letter not in outputs),
            produced="".join(letter for letter in kernel if letter not in inputs),
            shared="".join(letter for letter in inputs[1:] if letter not in kernel),
        )
        return axes if axes.contracted or axes.produced else None


@keras.saving.register_keras_serializable(package="keras_kpsvd", name="KPSVDEinsumDense")
class KPSVDEinsumDense(RecordingLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` whose weights `keras_kpsvd.KPSVD` trains by natural gradient.

    The arguments, the weights and the outputs are those of `keras.layers.EinsumDense`; with any other optimizer it is
    that layer. So the projections of `keras.layers.MultiHeadAttention`, "abc,cde->abde" and "abcd,cde->abe", have
    curvature. `d_in` runs over the axes that the equation contracts, `d_out` over those that it produces, both in the
    order in which they stand in the kernel, the last fastest. Axes of input and output other than the first share the
    weights and become the axis `shared` of the samples; so does what `...` stands for, the first axis apart. Axes of
    input, kernel and output ("bnd,ndh->bnh": weights of each head) have a Fisher block at each index.

    The bias is part of the matrix where `bias_axes` are all axes that the kernel gives the output, in any order. Any
    other bias trains by plain momentum, beside a kernel that has curvature. So does a bias of an axis other than the
    last ("abc,cd->adb") where the last or the second has or may have the same size, since Keras then adds it there.

    Equations without such samples compute as `EinsumDense` does and train by plain momentum: where the first axis of
    the output is not the first of the input, or the kernel has that axis too ("ab,ac->bc", "ab,ab->a"); where an axis
    of the input is summed up on its own ("abc,cd->ad"); where an operand has an axis twice ("abb,bc->ac"); where the
    kernel only scales elements, with nothing contracted or produced ("abc,c->abc"). So does a layer with LoRA or a
    quantized kernel.

    `jit_compile=True` is refused by Keras for models that hold one; see `KPSVDDense`.

    Args:
        *args: as `keras.layers.EinsumDense`.
        **kwargs: as `keras.layers.EinsumDense`.
    """

    _axes: EinsumAxes | None = None
    _bias_is_row = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.supports_jit = False

    def build(self, input_shape):
        super().build(input_shape)
        self._axes = EinsumAxes.of(self.equation, len(input_shape))
        if self._recordable:
            self._bias_is_row = self._bias_is_of_outputs(input_shape)
            self.claim()

    @property
    def _recordable(self) -> bool:
        return self._axes is not None and not self.lora_enabled and self.quantization_mode is None

    def call(self, inputs, training=None):
        if not self._recordable:
            return super().call(inputs, training=training)
        return self._activate(inputs, self.linear_map(inputs, self.kernel, self.bias), training)

    def linear_map(self, inputs: Any, kernel: Any, bias: Any = None) -> Any:
        """The einsum of `inputs` and `kernel`, and `bias` added, whichever axes it has."""
        outputs = ops.einsum(self.equation, inputs, kernel)
        return outputs if bias is None else ops.add(outputs, bias)

    def _bias_is_of_outputs(self, input_shape: tuple[int | None, ...]) -> bool:
        """Whether there is a bias at each index of what the kernel gives the output, and nowhere else.

        `keras.ops.add` (3.12 to 3.15) takes an operand with one axis larger than one for a bias of the last axis where
        it has that size, else of the second, whatever the axis is. Where it could be mistaken so, the bias is left out.
        """
        axes = self._axes
        if self.bias is None or set(self.bias_axes) != set(axes.blocks + axes.produced):
            return False
        large = [letter for letter in self._bias_order if self._sizes(letter) != [1]]
        if len(large) != 1 or large[0] == axes.outputs[-1]:
            return True
        known = dict(zip(axes.inputs + axes.kernel, (*input_shape, *self._kernel.shape), strict=True))
        others = {axes.outputs[1], axes.outputs[-1]} - set(large)
        return all(known[letter] not in (None, *self._sizes(large[0])) for letter in others)

    @property
    def curvature_variables(self) -> list[keras.Variable]:
        """The kernel, then the bias if it is part of the matrix."""
        return [self._kernel, self.bias] if self._bias_is_row else [self._kernel]

    def _sizes(self, letters: str) -> list[int]:
        """Of axes of the kernel."""
        return [self._kernel.shape[self._axes.kernel.index(letter)] for letter in letters]

    @property
    def _matrix_shape(self) -> tuple[int, int, int]:
        """`(blocks, d_in, d_out)`, the row of the bias not counted."""
        axes = self._axes
        return tuple(math.prod(self._sizes(letters)) for letters in (axes.blocks, axes.contracted, axes.produced))

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """One for each index of the axes of all three operands, one row more where the bias is part of the matrix."""
        blocks, d_in, d_out = self._matrix_shape
        return [(d_in + self._bias_is_row, d_out)] * blocks

    def samples(self, inputs: tf.Tensor, gradient: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Inputs, a column of ones last where the bias is part of the matrix, and gradients, block by block."""
        activations = self._by_block(at_least_float32(inputs), self._axes.inputs, self._axes.contracted)
        gradients = self._by_block(at_least_float32(gradient), self._axes.outputs, self._axes.produced)
        if self._bias_is_row:
            activations = with_ones(activations)
        return list(zip(tf.unstack(activations), tf.unstack(gradients), strict=True))

    def _by_block(self, values: tf.Tensor, letters: str, features: str) -> tf.Tensor:
        """Values with axes `letters` as `[blocks, batch, shared, features]`."""
        axes = self._axes
        moved = _transpose(values, letters, axes.blocks + axes.inputs[0] + axes.shared + features)
        first = len(axes.blocks)
        positions = slice(first + 1, first + 1 + len(axes.shared))
        shared = moved.shape[positions].num_elements()
        if shared is None:
            shared = tf.reduce_prod(tf.shape(moved)[positions])
        blocks, size = (math.prod(self._sizes(letters)) for letters in (axes.blocks, features))
        return tf.reshape(moved, [blocks, tf.shape(moved)[first], shared, size])

    def to_matrices(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """The kernel as `[d_in, d_out]` for each block, the bias, where it is part of the matrix, as the last row."""
        axes = self._axes
        matrices = _transpose(values[0], axes.kernel, axes.blocks + axes.contracted + axes.produced)
        matrices = tf.reshape(matrices, self._matrix_shape)
        if self._bias_is_row:
            order = self._bias_order
            bias = _transpose(tf.reshape(values[1], self._sizes(order)), order, axes.blocks + axes.produced)
            blocks, _, d_out = self._matrix_shape
            matrices = tf.concat([matrices, tf.reshape(bias, [blocks, 1, d_out])], axis=1)
        return tf.unstack(matrices)

    def from_matrices(self, matrices: list[tf.Tensor]) -> list[tf.Tensor]:
        """The inverse of `to_matrices`."""
        axes, stacked = self._axes, tf.stack(matrices)
        order = axes.blocks + axes.contracted + axes.produced
        _, d_in, _ = self._matrix_shape
        kernel = _transpose(tf.reshape(stacked[:, :d_in], self._sizes(order)), order, axes.kernel)
        if not self._bias_is_row:
            return [kernel]
        order = axes.blocks + axes.produced
        bias = _transpose(tf.reshape(stacked[:, d_in], self._sizes(order)), order, self._bias_order)
        return [kernel, tf.reshape(bias, self.bias.shape)]

    @property
    def _bias_order(self) -> str:
        """Its axes as Keras stores them: in the order of the outputs, axes of size one between left out."""
        return "".join(letter for letter in self._axes.outputs if letter in self.bias_axes)


def _transpose(values: tf.Tensor, letters: str, order: str) -> tf.Tensor:
    """Values with axes `letters`, the axes in another order."""
    if letters == order:
        return values
    return tf.transpose(values, [letters.index(letter) for letter in order])
