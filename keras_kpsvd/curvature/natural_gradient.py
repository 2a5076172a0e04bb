"""One step of natural gradient: what is due is refreshed and inverted, then a step is computed without being taken."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_kpsvd.curvature.conjugate import conjugate_direction
from keras_kpsvd.curvature.corrected import FACTORED, factored_part
from keras_kpsvd.curvature.damping import (
    LOWEST,
    LOWEST_CORRECTED,
    Dampings,
    bounded_damping,
    control_after,
    holds_on_other_batches,
)
from keras_kpsvd.curvature.extrapolation import KEPT_SHAPES, KeptModel, needs_exact_fit, next_step
from keras_kpsvd.curvature.failures import Failures
from keras_kpsvd.curvature.intervals import next_due
from keras_kpsvd.curvature.observation import Observer, StepValues, block_names
from keras_kpsvd.curvature.placement import spread
from keras_kpsvd.curvature.reduction import refresh_rows
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.curvature.state import LayerCurvature, assign_last, invert_layers, refresh_layers
from keras_kpsvd.curvature.step_control import (
    Direction,
    StepCoefficients,
    gram_matrices,
    inner_by_layer,
    last_step,
    quadratic_model,
    relative_change,
    scaled,
    share_of_batch,
    weight_sizes,
)
from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import sum_in_order


@dataclass(frozen=True)
class StepOptions:
    """The arguments of `KPSVD` that a step depends on, under their own names.

    Attributes:
        adaptive: whether rate and momentum are found in each step.
    """

    adaptive: bool
    momentum: float
    nesterov: bool
    damping: float | str
    kl_clip: float | None
    method: str
    eigenvalues: str
    curvature_interval: int | str
    inverse_interval: int | str
    conjugate_steps: int
    fit_interval: int
    fisher: str
    fisher_batch_size: int | None
    gradient_accumulation_steps: int | None
    seed: int


class Proposal(NamedTuple):
    """A step that was computed and not yet taken.

    Attributes:
        directions: the preconditioned gradients, in float32 at least.
        step: what to do with them; None where SGD's own update takes them.
        control: variables and the values to assign to them once the step is taken.
        finite: whether each layer's part of the step is, in the order of `directions`; and whether all of it is.
    """

    directions: Direction
    step: StepCoefficients | None
    control: list[tuple[keras.Variable, tf.Tensor]]
    finite: list[tf.Tensor]
    sound: tf.Tensor


class NaturalGradient:
    """The state of the steps of one optimizer, and their computation.

    Args:
        options: of the optimizer.
        blocks: its layers.
        add_variable: its `add_variable`.
    """

    def __init__(
        self, options: StepOptions, blocks: Sequence[LayerCurvature], add_variable: Callable[..., keras.Variable]
    ):
        self.options = options
        self._moves = options.damping == "adaptive"
        self._corrects = options.eigenvalues == "corrected"
        self.updates, self._next_refresh, self._next_inverse, self._next_fit = (
            add_variable(shape=(), dtype="int64", name=name)
            for name in ("updates", "next_refresh", "next_inverse", "next_fit")
        )
        start = 0.0 if self._moves else options.damping
        self._damping = add_variable(
            shape=(), dtype="float32", name="damping", initializer=keras.initializers.Constant(start)
        )
        self._initial = add_variable(shape=(), dtype="float32", name="initial_curvature")
        self._slope = add_variable(shape=(2,), dtype="float32", name="slope")
        self._slope_averages = add_variable(shape=(2,), dtype="float32", name="slope_averages")
        self._kept = [
            add_variable(shape=shape, dtype="float32", name=f"model_{name}")
            for name, shape in zip(KEPT_SHAPES._fields, KEPT_SHAPES, strict=True)
        ]
        if self._corrects:
            self._factored = add_variable(shape=(), dtype="float32", name="factored_part")
        self._usual = add_variable(shape=(), dtype="float32", name="usual_batch")
        self._place = {block: place for place, block in enumerate(blocks)}
        self._names = block_names(blocks)
        self.failures = Failures([block.layer.name for block in blocks], add_variable)

    @property
    def follows(self) -> bool:
        """Whether the last step has to be known."""
        return self.options.adaptive or self._moves

    def dampings(self, blocks: Sequence[LayerCurvature]) -> tuple[tf.Tensor, Dampings, tf.Tensor]:
        """`bounded_damping`, by layers; a given number whatever a file brought."""
        initial = tf.convert_to_tensor(self._initial.value)
        if not self._moves:
            damping = tf.constant(self.options.damping, tf.float32)
            return damping, {block.layer: damping for block in blocks}, initial
        sizes = [block.moments_and_size() for block in blocks]
        damping, of_layers, initial = bounded_damping(
            self._damping.value, initial, sizes, LOWEST_CORRECTED if self._corrects else LOWEST
        )
        return damping, {block.layer: one for block, one in zip(blocks, of_layers, strict=True)}, initial

    def _part_of(self, factored: tf.Tensor) -> tf.Tensor | float:
        """What is left of an adaptive λ where factors are damped that far; a given number stays what it is."""
        return 1 - (1 - FACTORED) * factored if self._corrects and self._moves else 1.0

    def _last_factored_part(self) -> tf.Tensor:
        """How far the last inversion damped factors too."""
        return tf.convert_to_tensor(self._factored.value) if self._corrects else tf.constant(1.0)

    def _factored_part(self, joint: JointPass | None, blocks: Sequence[LayerCurvature], whole: Dampings) -> tf.Tensor:
        """How far an inversion is to damp factors too; see `curvature.corrected`."""
        if not self._corrects or joint is None:
            return self._last_factored_part()
        # Recorded is the last part of what is accumulated.
        numbers = joint.numbers(self._usual.value) * (self.options.gradient_accumulation_steps or 1)
        directions = sum_in_order([block.directions_left_free(whole[block.layer]) for block in blocks])
        return factored_part(tf.concat([block.kurtoses() for block in blocks], 0), directions, numbers)

    def propose(
        self,
        joint: JointPass | None,
        blocks: list[LayerCurvature],
        gradients: Direction,
        previous: Direction | None,
        learning_rate: tf.Tensor,
        iterations: tf.Tensor,
        observer: Observer | None = None,
    ) -> Proposal:
        """Refreshes and inverts what is due, then computes a step.

        Args:
            joint: what was recorded, None where nothing was.
            blocks: the layers that get a step.
            gradients: theirs.
            previous: their part of the last step; None where it is not kept.
            learning_rate: the given one; of no meaning with the adaptive rate.
            iterations: the optimizer's count, which draws are seeded with.
            observer: sees refreshes; None adds nothing to the step.
        """
        options = self.options
        seed = tf.stack([tf.constant(options.seed, tf.int64), tf.cast(iterations, tf.int64)])
        seed = tf.cast(seed % (2**31 - 1), tf.int32)
        places = spread({block.layer: block.cost for block in blocks}, [] if joint is None else joint.devices)
        ready = True
        if self._corrects:  # Without a refresh nothing is new but λ.
            ready = self.updates.value >= self._next_refresh.value if joint is not None else False
        observed = self._refresh(joint, blocks, seed, places, observer)
        damping, whole, initial = self.dampings(blocks)
        rebuilt, factored = self._invert(joint, blocks, whole, places, ready)
        part = self._part_of(factored)
        dampings = {layer: part * one for layer, one in whole.items()}
        if observed is not None:
            observed = observer.preconditioners_are_made(observed, self._names_of(blocks), rebuilt)

        def precondition(values: Direction) -> Direction:
            return {block.layer: block.precondition(values[block.layer]) for block in blocks}

        last = None if previous is None else last_step(previous, gradients)
        known = None
        if options.adaptive and options.conjugate_steps > 1 and joint is not None:

            def improved(steps: int) -> tuple[list[list[tf.Tensor]], tf.Tensor, list[list[tf.Tensor]]]:
                fit = (dampings, steps, options.momentum, seed)
                found = conjugate_direction(joint, gradients, precondition, last, *fit)
                return [found.direction[layer] for layer in gradients], found.overlaps, found.changes

            found, overlaps, known = tf.cond(
                holds_on_other_batches(self._slope_averages.value),
                lambda: improved(options.conjugate_steps),
                lambda: improved(1),
            )
            directions = dict(zip(gradients, found, strict=True))
        else:
            directions = precondition(gradients)
            overlaps = None if last is None else inner_by_layer(directions, last.step)
        parts = inner_by_layer(directions, gradients)
        descent = tf.reduce_sum(parts)
        rate, momentum = tf.cast(learning_rate, tf.float32), tf.constant(options.momentum)
        overlap = tf.constant(0.0) if last is None else last.slope
        scale = trusted = tf.constant(1.0)
        control = []
        if (options.adaptive or self._corrects) and joint is not None:
            share, usual = share_of_batch(joint.rows, self._usual.value)
            control.append((self._usual, usual))
        if options.adaptive and joint is not None:
            slopes = tf.stack([descent, overlap])
            grams = gram_matrices(inner_by_layer(directions, directions), overlaps, last.squares)
            step, trusted, kept, fit = self._fit(
                joint, [directions, previous], grams, known, dampings, slopes, share, rebuilt, seed
            )
            (rate, momentum), scale = step, trusted
            control += [*zip(self._kept, kept, strict=True), (self._next_fit, fit)]
        elif not options.adaptive and options.kl_clip is not None:
            scale = tf.sqrt(tf.math.divide_no_nan(options.kl_clip, rate * rate * descent))
            scale = tf.where(descent > 0, tf.minimum(1.0, scale), 1.0)
            rate *= scale
            if options.nesterov:  # Keras's own update takes the rate: the scale goes into the gradient.
                directions = scaled(directions, scale)
        if self.follows:
            slope = momentum * overlap - rate * descent
            if options.adaptive and joint is None:  # No model was fitted: the next gradient says nothing of one.
                slope = tf.zeros([])
            values = control_after(self._slope.value, damping, self._slope_averages.value, overlap, slope, trusted)
            control += [(self._slope, values[0]), (self._slope_averages, values[2])]
            if self._moves:
                control += [(self._damping, values[1]), (self._initial, initial)]
        if observed is not None:
            values = StepValues(self.updates.value, part * damping, rate, momentum, scale)
            observer.step_is_computed(observed, values)
        finite = [tf.math.is_finite(part) for part in tf.unstack(parts, len(blocks))]
        sound = tf.reduce_all(tf.math.is_finite(tf.stack([descent, rate, momentum])))
        step = None if options.nesterov else StepCoefficients(rate, momentum)
        return Proposal(directions, step, control, finite, sound)

    def _fit(
        self,
        joint: JointPass,
        directions: list[Direction],
        grams: tf.Tensor,
        known: list[list[tf.Tensor]] | None,
        dampings: Dampings,
        slopes: tf.Tensor,
        share: tf.Tensor,
        rebuilt: tf.Tensor,
        seed: tf.Tensor,
    ) -> tuple[StepCoefficients, tf.Tensor, KeptModel, tf.Tensor]:
        """Of `next_step`, and the update at which the next exact fit is due."""
        kept = KeptModel(*(tf.convert_to_tensor(variable) for variable in self._kept))
        updates = tf.convert_to_tensor(self.updates.value)
        counts = (updates, self._next_fit.value, rebuilt, joint.rows)
        due = True
        if self.options.fit_interval > 1:
            due = needs_exact_fit(kept, self._slope.value, slopes[0], slopes[1], *counts)
        change = functools.partial(relative_change, grams=grams, sizes=weight_sizes(directions[0]))
        exact = functools.partial(quadratic_model, joint, directions, grams, dampings, seed, known)
        step, trusted, kept = next_step(exact, due, kept, slopes, self.options.momentum, share, change)
        return step, trusted, kept, tf.where(due, updates + self.options.fit_interval, self._next_fit.value)

    def _refresh(
        self,
        joint: JointPass | None,
        blocks: list[LayerCurvature],
        seed: tf.Tensor,
        places: dict[RecordingLayer, str | None],
        observer: Observer | None,
    ) -> tf.Tensor | None:
        """Draws samples and folds them into the factors, on updates where that is due; others compute nothing.

        Returns:
            What `observer` observes the rest of the step by; None without one.
        """
        if joint is None:
            return None

        def nothing() -> tf.Tensor:
            return tf.constant(False) if observer is None else tf.constant(0)

        def refresh() -> tf.Tensor:
            drawn = 1

            def rows(shapes: list[tuple[int, int]], positions: int | None, repeats: int) -> int | None:
                nonlocal drawn
                drawn = repeats
                wanted = self.options.fisher_batch_size
                return refresh_rows(self.options.method, shapes, positions, wanted, repeats, self._corrects)

            observed = None if observer is None else observer.refresh_begins()
            with tf.control_dependencies([] if observed is None else [observed]):
                calls = joint.calls(self.options.fisher, seed, rows, places)
            present = [block for block in blocks if block.layer in calls]
            turn = self.updates.value >= self._next_inverse.value
            weighing = joint.weighing_part() if self._corrects else 1.0
            good = refresh_layers(present, calls, places, turn, drawn, weighing)
            self._next_refresh.assign(next_due(self.updates.value, self.options.curvature_interval))
            self.failures.of_refresh([self._place[block] for block in present], good)
            if observed is None:
                return tf.constant(True)
            return observer.factors_are_averaged(observed, self._names_of(present), calls, good, places, drawn)

        observed = tf.cond(self.updates.value >= self._next_refresh.value, refresh, nothing)
        return None if observer is None else observed

    def _names_of(self, blocks: list[LayerCurvature]) -> dict[LayerCurvature, list[str]]:
        return {block: self._names[block] for block in blocks}

    def _invert(
        self,
        joint: JointPass | None,
        blocks: list[LayerCurvature],
        whole: Dampings,
        places: dict[RecordingLayer, str | None],
        ready: tf.Tensor | bool,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Makes the preconditioners anew, where that is due and once there is curvature.

        Returns:
            Whether it was, and how far they damp factors too.
        """

        def invert() -> tuple[tf.Tensor, tf.Tensor]:
            factored = self._factored_part(joint, blocks, whole)
            part = self._part_of(factored)
            good = invert_layers(blocks, {layer: part * one for layer, one in whole.items()}, places, factored)
            if self._corrects:
                self._factored.assign(factored)
            self._next_inverse.assign(next_due(self.updates.value, self.options.inverse_interval))
            self.failures.of_inversion([self._place[block] for block in blocks], good)
            return tf.constant(True), factored

        def keep() -> tuple[tf.Tensor, tf.Tensor]:
            return tf.constant(False), self._last_factored_part()

        due = (self.updates.value >= self._next_inverse.value) & (self._next_refresh.value > 0) & ready
        return tf.cond(due, invert, keep)

    def taken(self, proposal: Proposal) -> None:
        """Keeps what the next step needs, once a step was taken."""
        assign_last(*([pair[side] for pair in proposal.control] for side in (0, 1)))
        self.updates.assign_add(1)
        self.failures.no_step_skipped()
