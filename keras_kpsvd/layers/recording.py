"""Recording of one forward pass: what every instrumented layer received and what it made of it.

An instrumented layer hands its inputs and its pre-activation to each `Recorder` attached to it. The recorder keeps
them, with a gradient tape of its own on which the pre-activations are watched, until an optimizer takes the finished
pass. Nothing is stored in variables, and nothing is recorded where no gradient can follow: outside training, while a
model is built symbolically, or where no outer tape records.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.eager.record import could_possibly_record

from keras_kpsvd.layers.passes import ForwardPass, Record, current_replica, encloses


class Recorder:
    """Collects forward passes of the layers it is attached to.

    One pass is kept at a time. The next training-mode pass closes one that no optimizer took, so an abandoned pass
    leaves neither a tape nor tensors behind. Each thread, and each replica of a `tf.distribute` strategy, has its own.

    Args:
        keep_loss: the loss itself is needed on the tape (for gradients at the actual targets), so that the tape stays
            open until the loss is known. Otherwise it closes as soon as the model's outputs are.
        persistent: the tape can be differentiated more than once.
        always: record even where no outer tape records.
    """

    def __init__(self, *, keep_loss: bool = False, persistent: bool = False, always: bool = False):
        self.keep_loss = keep_loss
        self.persistent = persistent
        self.always = always
        self._local = threading.local()
        self._of_replicas: dict[int, ForwardPass] = {}

    def __del__(self):
        # An open tape would stay on its thread for good.
        with contextlib.suppress(Exception):
            self.discard()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, training-mode calls are not recorded."""
        before, self._local.paused = getattr(self._local, "paused", False), True
        try:
            yield
        finally:
            self._local.paused = before

    @property
    def _current(self) -> ForwardPass | None:
        replica = current_replica()
        if replica is None:
            return getattr(self._local, "forward_pass", None)
        return self._of_replicas.get(replica)

    @_current.setter
    def _current(self, forward_pass: ForwardPass | None) -> None:
        replica = current_replica()
        if replica is None:
            self._local.forward_pass = forward_pass
        else:
            self._of_replicas[replica] = forward_pass

    def record(self, layer: RecordingLayer, inputs: tf.Tensor, preactivation: tf.Tensor) -> None:
        """Called by `layer` in each training-mode call, before its activation."""
        if getattr(self._local, "paused", False):
            return
        context = layer._get_call_context()
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        current = self._current
        if current is not None and not self._continues(current, layer, context, graph):
            self.discard()
            current = None
        if current is None:
            if not (self.always or could_possibly_record()):
                return
            current = self._open(context, graph)
        if current.graph is not graph:
            # Called inside a loop or branch: its tensors mean nothing outside, the layer trains by plain gradient.
            return
        current.tape.watch(preactivation)
        current.records.append(Record(layer, inputs, preactivation))

    def record_output(self, preactivation: tf.Tensor, output: tf.Tensor) -> None:
        """Called by the layer after its activation."""
        current = self._current
        if current is not None and current.records and current.records[-1].preactivation is preactivation:
            current.last_output = output

    @staticmethod
    def _continues(current: ForwardPass, layer: RecordingLayer, context: Any, graph: tf.Graph | None) -> bool:
        """Whether a call belongs to the pass under way: layers called by hand, one by one, share a pass too."""
        if not current.recording or not encloses(current.graph, graph):
            return False
        return current.context is context or all(record.layer is not layer for record in current.records)

    def _open(self, context: Any, graph: tf.Graph | None) -> ForwardPass:
        model = context.entry_layer if isinstance(context.entry_layer, keras.Model) else None
        tape = tf.GradientTape(persistent=self.persistent, watch_accessed_variables=False)
        opened = ForwardPass(context, graph, model, tape)
        opened.open(keep_loss=self.keep_loss)
        self._current = opened
        return opened

    def close(self, loss: tf.Tensor | None = None) -> None:
        """Ends the pass under way, if any, at the point where the (unscaled) loss is known."""
        current = self._current
        if current is not None and current.recording:
            current.loss = loss
            current.close()

    def take(self) -> ForwardPass | None:
        """Ends the pass under way and hands it over; None where nothing usable was recorded."""
        self.close()
        current = self._current
        self._current = None
        if current is None or not current.records:
            return None
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        return current if encloses(current.graph, graph) else None

    def discard(self) -> None:
        """Forgets the pass under way."""
        if self._current is not None:
            self._current.close()
            self._current = None


# Every block is traced by itself, and with many the first step would take minutes: such layers train without curvature.
MAX_BLOCKS = 32


class RecordingLayer:
    """Mixin of every instrumented layer: to whom it reports, and how it reduces to the one sample format.

    A layer is a linear map of its inputs (`linear_map`) and an activation. It splits its weights into blocks, each with
    a Fisher block of its own (one for most layers, one for each group of a grouped convolution), and maps its calls to
    `activations [batch, shared, d_in]` and `gradients [batch, shared, d_out]` of each block and its weights to a matrix
    `[d_in, d_out]` of each in the same order, the bias as the last row. Subclasses define the methods that raise here.

    Attributes:
        expands: samples are larger than the layer's inputs (patches), so that they are made a few examples at a time.
    """

    expands = False

    def __repr__(self) -> str:
        # Classes have the `__name__` of their stock twins, which Keras's own would show; see `layers.swapping`.
        return f"<{type(self).__qualname__} name={self.name}, built={self.built}>"

    _recorders: tuple[weakref.ref, ...] = ()

    def attach(self, recorder: Recorder) -> None:
        """Reports every later training-mode call to `recorder` as well, for as long as somebody else keeps it alive."""
        alive = [reference for reference in self._recorders if reference() not in (None, recorder)]
        object.__setattr__(self, "_recorders", (*alive, weakref.ref(recorder)))

    def detach(self, recorder: Recorder) -> None:
        """Undoes `attach`."""
        kept = tuple(reference for reference in self._recorders if reference() not in (None, recorder))
        object.__setattr__(self, "_recorders", kept)

    def _activate(self, inputs: tf.Tensor, preactivation: tf.Tensor, training: Any) -> tf.Tensor:
        """The layer's activation of `preactivation`, reported on the way in training."""
        recorders = [reference() for reference in self._recorders] if self._in_training(training) else []
        recorders = [recorder for recorder in recorders if recorder is not None and tf.is_tensor(preactivation)]
        for recorder in recorders:
            recorder.record(self, inputs, preactivation)
        output = preactivation if self.activation is None else self.activation(preactivation)
        for recorder in recorders:
            recorder.record_output(preactivation, output)
        return output

    def _in_training(self, training: Any) -> bool:
        if training is None:
            # Stock `train_step` cannot tell a model whose `call` has no argument `training`, and calls it without one.
            return not getattr(self._get_call_context().entry_layer, "_call_has_training_arg", True)
        return training is True

    def claim(self) -> None:
        """Writes the layer's name into its kernel, so that an optimizer that sees only variables finds the layer."""
        self.curvature_variables[0]._kpsvd_layer = weakref.ref(self)

    @property
    def curvature_variables(self) -> list[keras.Variable]:
        """The kernel, then the bias if there is one."""
        raise TypeError(f"{type(self).__name__} must define `curvature_variables`.")

    def linear_map(self, inputs: Any, kernel: Any, bias: Any = None) -> Any:
        """The pre-activation for given weights; linear in them, so that it also maps their changes."""
        raise TypeError(f"{type(self).__name__} must define `linear_map`.")

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """`(d_in, d_out)` of each block's matrix, bias row included."""
        raise TypeError(f"{type(self).__name__} must define `block_shapes`.")

    def samples(self, inputs: tf.Tensor, gradient: tf.Tensor) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """One call's inputs and gradient by the pre-activation as samples of each block, float32 or float64."""
        raise TypeError(f"{type(self).__name__} must define `samples`.")

    def to_matrices(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        """Values for `curvature_variables` as a matrix `[d_in, d_out]` for each block."""
        raise TypeError(f"{type(self).__name__} must define `to_matrices`.")

    def from_matrices(self, matrices: list[tf.Tensor]) -> list[tf.Tensor]:
        """The inverse of `to_matrices`."""
        raise TypeError(f"{type(self).__name__} must define `from_matrices`.")


def at_least_float32(values: tf.Tensor) -> tf.Tensor:
    """In float32, or float64 where it came so: half precision is for the model, not for its statistics."""
    return values if values.dtype == tf.float64 else tf.cast(values, tf.float32)


def with_ones(activations: tf.Tensor) -> tf.Tensor:
    """A column of ones behind the last, for the bias."""
    return tf.concat([activations, tf.ones_like(activations[..., :1])], axis=-1)


def with_bias_row(kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """`[d_in, d_out]` and `[d_out]` as one matrix."""
    return tf.concat([kernel, tf.expand_dims(bias, 0)], axis=0)


def without_bias_row(matrix: tf.Tensor) -> list[tf.Tensor]:
    """The inverse of `with_bias_row`."""
    kernel, row = tf.split(matrix, [matrix.shape[0] - 1, 1])  # Far fewer operations to trace than slices.
    return [kernel, tf.reshape(row, [matrix.shape[1]])]


def merge_positions(values: tf.Tensor) -> tf.Tensor:
    """`[batch, ..., features]` as `[batch, shared, features]`."""
    if values.shape.rank == 2:
        return values[:, None, :]
    if values.shape.rank == 3:
        return values
    shape = tf.shape(values)
    static = values.shape[1:-1].num_elements()
    shared = tf.reduce_prod(shape[1:-1]) if static is None else static
    return tf.reshape(values, [shape[0], shared, values.shape[-1]])


def check_kernels_are_not_shared(model: keras.Model) -> None:
    """Raises a ValueError that names two instrumented layers of `model` with one kernel.

    A kernel belongs to one layer, and only that layer's calls would enter its curvature.
    """
    for layer in model._flatten_layers():
        if not isinstance(layer, RecordingLayer) or not layer.built:
            continue
        owner = getattr(layer.curvature_variables[0], "_kpsvd_layer", lambda: None)()
        if owner is not None and owner is not layer:
            raise ValueError(
                f"Layers {owner.name!r} and {layer.name!r} share one kernel. Expected every instrumented layer to have "
                "its own: call one layer twice, whose calls add up in its curvature, or make one of the two a stock "
                f"keras.layers layer. Received: model={model.name!r}"
            )


def layers_of(variables: Iterable[keras.Variable]) -> list[RecordingLayer]:
    """The instrumented layers all of whose curvature variables are among `variables`, in the order of their kernels."""
    given = list(variables)
    identities = {id(variable) for variable in given}
    found = []
    for variable in given:
        layer = getattr(variable, "_kpsvd_layer", lambda: None)()
        if layer is None or layer.curvature_variables[0] is not variable:
            continue
        if all(id(other) in identities for other in layer.curvature_variables):
            found.append(layer)
    return found
