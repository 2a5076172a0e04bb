"""What one forward pass leaves behind, and how it learns what the model made of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

if TYPE_CHECKING:
    from keras_kpsvd.layers.recording import RecordingLayer


def current_replica() -> int | None:
    """Tells the replicas of a `tf.distribute` strategy apart; None where there are none.

    While a step is traced, passes of several replicas are under way at once, and one replica's step need not be traced
    by the thread that traced its forward pass.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return int(tf.get_static_value(context.replica_id_in_sync_group))


class Record(NamedTuple):
    """One call of one instrumented layer."""

    layer: RecordingLayer
    inputs: tf.Tensor
    preactivation: tf.Tensor


@dataclass(eq=False)
class ForwardPass:
    """What one forward pass left behind.

    Attributes:
        context: Keras's call context of the outermost call, which tells passes apart.
        graph: the graph the pass was traced in, None when it ran eagerly.
        model: the outermost `keras.Model`, None where layers were called by hand.
        tape: the recorder's tape; `tape.gradient` reaches every watched pre-activation.
        records: the calls, in order.
        outputs: what the model returned, as its loss received it; None where no `compute_loss` was called.
        batch: the arguments of `compute_loss` less the outputs: `x`, `y`, `sample_weight`; None likewise.
        loss: the scalar loss, None where it did not pass by. On the tape only when the recorder was asked to keep it.
        last_output: what the last recorded call returned, which ends the model where no `compute_loss` says otherwise.
    """

    context: Any
    graph: tf.Graph | None
    model: keras.Model | None
    tape: tf.GradientTape
    records: list[Record] = field(default_factory=list)
    outputs: Any = None
    batch: dict[str, Any] | None = None
    loss: tf.Tensor | None = None
    last_output: tf.Tensor | None = None
    recording: bool = False
    thread: int = field(default_factory=threading.get_ident)
    unhook: Callable[[], None] | None = None

    def open(self, *, keep_loss: bool) -> None:
        """Starts the tape, and waits for the model's `compute_loss`."""
        if self.model is not None:
            self.unhook = _await_compute_loss(self.model, self, keep_loss)
        self.tape.__enter__()
        self.recording = True

    def close(self) -> None:
        """Stops the tape and takes the hook off the model; idempotent."""
        if self.recording:
            self.recording = False
            # Tapes stand on a stack of the thread's own: that of another is gone, or not ours to touch.
            if self.thread == threading.get_ident():
                self.tape.__exit__(None, None, None)
        if self.unhook is not None:
            self.unhook()
            self.unhook = None

    @property
    def layers(self) -> list[RecordingLayer]:
        """The recorded layers, each once, in the order of their first call."""
        return list(dict.fromkeys(record.layer for record in self.records))


def encloses(outer: tf.Graph | None, graph: tf.Graph | None) -> bool:
    """Whether tensors of `outer` (None: eager) may be used in `graph`."""
    if outer is None:
        return graph is None
    while graph is not None and graph is not outer:
        graph = getattr(graph, "outer_graph", None)
    return graph is outer


# Hooks are put on and taken off by several threads.
_HOOKING = threading.RLock()


class _Waiting(NamedTuple):
    forward_pass: ForwardPass
    keep_loss: bool
    thread: int
    replica: int | None


class _ComputeLossHook:
    """Stands in for a model's `compute_loss` until every pass that waits for it has been told.

    Stock `train_step` calls `compute_loss` right after the forward pass. It is the one public place where a model's
    outputs and sample weights pass by, whatever layers end the model. The hook is an attribute of the instance. Several
    passes may wait at once: of several recorders, and of several replicas, whose forward passes and losses are traced
    in turns.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.before = model.__dict__.get("compute_loss")
        self.waiting: list[_Waiting] = []

    def forget(self, forward_pass: ForwardPass) -> None:
        """Lets one pass wait no longer; the last one takes the hook off."""
        with _HOOKING:
            self.waiting = [one for one in self.waiting if one.forward_pass is not forward_pass]
            if self.waiting or self.model.__dict__.get("compute_loss") is not self:
                return
            if self.before is None:
                del self.model.__dict__["compute_loss"]
            else:
                self.model.__dict__["compute_loss"] = self.before

    def __call__(self, x=None, y=None, y_pred=None, sample_weight=None, **keywords):
        here = (threading.get_ident(), current_replica())
        told = [one for one in self.waiting if (one.thread, one.replica) == here]
        for one in told:
            recording = one.forward_pass.recording
            self.forget(one.forward_pass)
            if recording:
                one.forward_pass.outputs = y_pred
                one.forward_pass.batch = {"x": x, "y": y, "sample_weight": sample_weight}
                if not one.keep_loss:
                    one.forward_pass.close()
        # The class's own method, not whatever stands in the instance: that may still be this hook.
        call = self.before or type(self.model).compute_loss.__get__(self.model)
        loss = call(x, y, y_pred, sample_weight, **keywords)
        for one in told:
            if one.forward_pass.batch is not None:
                one.forward_pass.loss = loss
                one.forward_pass.close()
        return loss


def _await_compute_loss(model: keras.Model, forward_pass: ForwardPass, keep_loss: bool) -> Callable[[], None]:
    """Lets the next `model.compute_loss` of this thread and replica tell `forward_pass` what it is given.

    Returns:
        What undoes it.
    """
    with _HOOKING:
        hook = model.__dict__.get("compute_loss")
        if not isinstance(hook, _ComputeLossHook):
            hook = _ComputeLossHook(model)
            model.__dict__["compute_loss"] = hook
        hook.waiting.append(_Waiting(forward_pass, keep_loss, threading.get_ident(), current_replica()))
    return lambda: hook.forget(forward_pass)
