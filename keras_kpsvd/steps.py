"""Steps that are taken whole or not at all, on one device or on all replicas at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from keras_kpsvd.arguments import check_not_xla, check_steps_per_execution
from keras_kpsvd.curvature.natural_gradient import NaturalGradient, Proposal
from keras_kpsvd.curvature.observation import Observer
from keras_kpsvd.curvature.replicas import JointPass, joint_pass
from keras_kpsvd.curvature.state import LayerCurvature
from keras_kpsvd.curvature.step_control import Direction, StepCoefficients
from keras_kpsvd.interrupts import uninterrupted
from keras_kpsvd.layers import ForwardPass, Recorder, RecordingLayer, check_kernels_are_not_shared
from keras_kpsvd.reporting import tell_of_nothing_recorded
from keras_kpsvd.tracing import ThrownAwayTrace


class WholeSteps:
    """Mixin of SGD: a step is computed from what was recorded, checked, and only then taken.

    Attributes:
        likelihood: as in `KPSVD`.
        observer: sees what a step computes; set by `callbacks.CurvatureMonitor` and traced into the step.
    """

    likelihood: Any
    observer: Observer | None = None
    _recorder: Recorder
    _natural: NaturalGradient
    _first_trace: ThrownAwayTrace
    _blocks: tuple[LayerCurvature, ...] = ()
    # Of the step that is being taken: what was fitted, and the keys of the variables that it is for.
    _coefficients: StepCoefficients | None = None
    _fitted: frozenset = frozenset()
    _told_of_nothing_recorded = False

    def _skipped(self) -> tf.Tensor:
        return self._natural.failures.skipping()

    def _apply_weight_decay(self, variables: list) -> None:
        """Nothing: weight decay is part of the step, which may be skipped whole; see `_step`."""

    # AutoGraph would convert what a hand-written loop calls, to no avail.
    @tf.autograph.experimental.do_not_convert
    def _backend_update_step(self, grads: list, trainable_variables: list, learning_rate: Any) -> None:
        """Adds up the gradients of the replicas, then takes one step with what was recorded on all of them."""
        if self._blocks:
            check_not_xla()
        forward_pass = self._recorder.take()
        if forward_pass is not None and forward_pass.batch is not None:  # In hand-written loops it has no meaning.
            check_steps_per_execution(self._distribution_strategy, forward_pass.model.steps_per_execution)
        pairs = self._all_reduce_sum_gradients(zip(grads, trainable_variables, strict=True))
        reduced = [gradient for gradient, _ in pairs]
        step = functools.partial(self._step, variables=trainable_variables)
        context = tf.distribute.get_replica_context()
        number = tf.get_static_value(context.replica_id_in_sync_group)
        context.merge_call(step, args=(forward_pass, number, reduced, learning_rate))

    def _step(
        self,
        strategy: tf.distribute.Strategy,
        forward_pass: Any,
        number: Any,
        gradients: list,
        learning_rate: Any,
        variables: list,
    ) -> None:
        """The whole step, in cross-replica context, where arguments stand for one value on each replica."""
        of_replicas = dict(zip(map(self._var_key, variables), gradients, strict=True))
        gradients = [strategy.experimental_local_results(gradient)[0] for gradient in gradients]
        learning_rate = strategy.experimental_local_results(learning_rate)[0]
        passes = strategy.experimental_local_results(forward_pass)
        joint = self._join(strategy, passes, int(strategy.experimental_local_results(number)[0]))
        if joint is None and self._blocks:
            self._tell_of_nothing_recorded()
        finite = [_is_finite(gradient) for gradient in gradients]
        failures = self._natural.failures

        def attempt() -> tf.Tensor:
            proposal = self._propose(joint, gradients, variables, learning_rate)
            names = [layer.name for layer in proposal.directions]

            def skip() -> tf.Tensor:
                return failures.of_step("the preconditioned gradient", names, proposal.finite, "")

            return tf.cond(proposal.sound, lambda: take(proposal), skip)

        def take(proposal: Proposal) -> tf.Tensor:
            if self.weight_decay is not None:
                decay = super(WholeSteps, self)._apply_weight_decay
                strategy.extended.call_for_each_replica(decay, args=(variables,))
            steps = dict(of_replicas)
            for layer, values in proposal.directions.items():
                steps.update(zip(map(self._var_key, layer.curvature_variables), values, strict=True))
            fitted = {self._var_key(v) for layer in proposal.directions for v in layer.curvature_variables}
            pairs = [(steps[self._var_key(one)], getattr(one, "value", one)) for one in variables]
            self._coefficients, self._fitted = proposal.step, fitted
            try:
                self._distributed_tf_update_step(strategy, pairs, learning_rate)
            finally:
                self._coefficients, self._fitted = None, frozenset()
            self._natural.taken(proposal)
            return tf.constant(True)

        def skip() -> tf.Tensor:
            names = [variable.path.rpartition("/")[0] or variable.path for variable in variables]
            return failures.of_step("the gradient", names, finite, ", and curvature,")

        with uninterrupted():  # Of several replicas this is the main thread, and `apply` is not.
            tf.cond(tf.reduce_all(tf.stack(finite)), attempt, skip)

    def _tell_of_nothing_recorded(self) -> None:
        """Warns once, but not of the step that makes the state: no layer reported to anybody before."""
        making = self._first_trace.is_being_made() or (tf.executing_eagerly() and int(self._iterations) == 0)
        if not making and not self._told_of_nothing_recorded:
            self._told_of_nothing_recorded = True
            tell_of_nothing_recorded()

    def _join(
        self, strategy: tf.distribute.Strategy, passes: Sequence[ForwardPass | None], first: int
    ) -> JointPass | None:
        """What was recorded on all replicas; None where nothing was, or no layer here gets curvature."""
        if any(one is None for one in passes) or not self._blocks:
            return None
        for one in passes:
            if one.model is not None:
                check_kernels_are_not_shared(one.model)
        return joint_pass(strategy, passes, self.likelihood, first)

    def _propose(self, joint: JointPass | None, gradients: list, variables: list, learning_rate: Any) -> Proposal:
        """The step of those instrumented layers all of whose variables have a gradient; empty without any."""
        given = dict(zip(map(self._var_key, variables), gradients, strict=True))
        of_blocks: dict[LayerCurvature, list] = {
            block: [given.get(self._var_key(variable)) for variable in block.layer.curvature_variables]
            for block in self._blocks
        }
        blocks = [block for block, values in of_blocks.items() if all(value is not None for value in values)]
        if not blocks or self._first_trace.is_being_made():
            return Proposal({}, None, [], [], tf.constant(True))
        of_layers: Direction = {block.layer: [tf.convert_to_tensor(g) for g in of_blocks[block]] for block in blocks}
        previous = self._last_step(of_layers) if self._natural.follows else None
        iterations = self._iterations.value
        return self._natural.propose(joint, blocks, of_layers, previous, learning_rate, iterations, self.observer)

    def _last_step(self, layers: Iterable[RecordingLayer]) -> Direction:
        # None for variables that Keras overwrites with their gradients (scales of float8).
        velocity = [None if one is None else one.value for one in self.momentums]
        return {
            layer: [velocity[self._get_variable_index(variable)] for variable in layer.curvature_variables]
            for layer in layers
        }

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """SGD's update; for instrumented layers under the adaptive rate the step that was fitted."""
        if self._coefficients is None or self._var_key(variable) not in self._fitted:
            super().update_step(gradient, variable, learning_rate)
            return
        rate, momentum = (tf.cast(value, variable.dtype) for value in self._coefficients)
        if not self.momentums:  # No momentum, and nothing else that needs the last step.
            self.assign_sub(variable, rate * tf.cast(gradient, variable.dtype))
            return
        velocity = self.momentums[self._get_variable_index(variable)]
        step = momentum * tf.cast(velocity.value, variable.dtype) - rate * tf.cast(gradient, variable.dtype)
        self.assign(velocity, step)
        self.assign_add(variable, step)


def _is_finite(gradient: Any) -> tf.Tensor:
    """Whether the sum is: cheaper than every entry, and a gradient whose sum overflows leads to no good step."""
    return tf.math.is_finite(tf.reduce_sum(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient))
