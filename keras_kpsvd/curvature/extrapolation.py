"""The quadratic model of a step without exact products, from the model of the step before.

Exact products on a whole batch cost more than its forward and backward pass. Between two exact fits

- `ΔᵀMΔ` grows with the descent `∇ᵀΔ`, which is what the Kronecker approximation itself takes it for (`F̂_λ Δ = ∇`): the
  last exact fit says by what factor it errs;
- `δ₀ᵀMδ₀` is known: `δ₀` was made of the last step's two directions, whose model is at hand;
- the cosine of the two directions in the metric of `M` is kept.

The slopes are the new batch's own. A fit is made exact where this may fail: at the start of training, with every new
preconditioner and at least every few steps, for small batches, whose models have little in common, where
the last step overshot or had to be cut short, and where the descent has grown. Without the conditions on overshoot and
growth heavy-tailed regression diverged; without those on cut steps and small batches a digits classifier was thrown far
off at batches of one; without exact fits at the start CURVES stayed on its first plateau; and fitted just before the
preconditioner changed instead of just after, it lost a seventh of its progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_kpsvd.curvature.step_control import QuadraticModel, StepCoefficients, fit_step, trusted_part
from keras_kpsvd.linalg import sum_in_order

# Updates from the start of training in which every fit is exact.
EXACT_UPDATES = 20

# Smaller batches are always fitted exactly: their models have little in common, and cost little. With heavy-tailed
# targets at batches of 64 a fit every ten updates leaves the loss at .47 after 20 epochs, .02 are reached without.
FEWEST_EXAMPLES = 128

# A fit is exact where the slope at the end of the last step was up again to this part of what it had been down, or
# where the descent is so many times the last step's.
OVERSHOOT, GROWTH = 0.5, 2.0


class KeptModel(NamedTuple):
    """The model of the last step, float32. Zeros before the first.

    Attributes:
        curvature: `[2, 2]`, on `Δ` and `δ₀` as `QuadraticModel.curvature`.
        logit_changes: `[2, 2]`, the sum over outputs of `QuadraticModel.logit_changes`.
        descent: `∇ᵀΔ`, scalar.
        coefficients: `[2]`, `(−rate, momentum)` of the step that was taken.
    """

    curvature: tf.Tensor
    logit_changes: tf.Tensor
    descent: tf.Tensor
    coefficients: tf.Tensor


KEPT_SHAPES = KeptModel((2, 2), (2, 2), (), (2,))


def extrapolate(kept: KeptModel, descent: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Curvature and logit changes, `[2, 2]` each, on the new `Δ` and on the last step.

    Args:
        kept: of the last step.
        descent: `∇ᵀΔ` of the new direction.
    """
    growth = tf.math.divide_no_nan(descent, kept.descent)

    def carry(matrix):
        diagonal = tf.maximum(tf.linalg.diag_part(matrix), 0.0)
        roots = tf.sqrt(diagonal)
        cosine = tf.math.divide_no_nan(tf.math.divide_no_nan(matrix[0, 1], roots[0]), roots[1])
        cosine = tf.clip_by_value(cosine, -1.0, 1.0)
        first = diagonal[0] * tf.maximum(growth, 0.0)
        second = tf.maximum(tf.tensordot(kept.coefficients, tf.linalg.matvec(matrix, kept.coefficients), 1), 0.0)
        mixed = cosine * tf.sqrt(first) * tf.sqrt(second)
        return tf.stack([tf.stack([first, mixed]), tf.stack([mixed, second])])

    return carry(kept.curvature), carry(kept.logit_changes)


def needs_exact_fit(
    kept: KeptModel,
    last: tf.Tensor,
    descent: tf.Tensor,
    slope_after: tf.Tensor,
    updates: tf.Tensor,
    next_fit: tf.Tensor,
    rebuilt: tf.Tensor,
    examples: tf.Tensor,
) -> tf.Tensor:
    """Whether the next fit must use exact products, boolean scalar.

    Args:
        kept: of the last step.
        last: of the last step, `[2]`: the slope expected at its end, and the fall expected on the way (negative). Zeros
            where it was fitted to no model, so that `kept` is not of it.
        descent: `∇ᵀΔ`.
        slope_after: the slope found along the last step, `∇ᵀδ₀`.
        updates: made so far.
        next_fit: the update that is due anyway.
        rebuilt: whether the preconditioner is a new one, of which the last exact fit says nothing.
        examples: of the batch.
    """
    expected, fall = tf.unstack(last)
    overshot = slope_after - expected > OVERSHOOT * tf.abs(fall)
    grown = descent > GROWTH * kept.descent
    scheduled = (updates < EXACT_UPDATES) | (updates >= next_fit) | (examples < FEWEST_EXAMPLES)
    return scheduled | rebuilt | overshot | grown | (expected < 0) | (fall >= 0)


def next_step(
    exact: Callable[[], QuadraticModel],
    due: tf.Tensor | bool,
    kept: KeptModel,
    slopes: tf.Tensor,
    largest_momentum: float,
    share: tf.Tensor,
    change: Callable[[StepCoefficients], tf.Tensor],
) -> tuple[StepCoefficients, tf.Tensor, KeptModel]:
    """Fits a step to the exact model where that is due, else to the extrapolated one.

    Args:
        exact: computes the model on `Δ` and `δ₀`; runs only where it is due.
        due: of `needs_exact_fit`; True where every fit is exact.
        kept: of the last step.
        slopes: `(∇ᵀΔ, ∇ᵀδ₀)`.
        largest_momentum: the cap of the momentum.
        share: of the step, in (0, 1], that the batch is to be trusted with at most; see `step_control.share_of_batch`.
        change: `step_control.relative_change` of a step.

    Returns:
        `(step, trusted, kept)`: the step to take, already cut to its trusted part (see `trusted_part`), and what to
        keep once it is taken.
    """

    def computed():
        model = exact()
        changes = model.logit_changes
        return model.curvature, sum_in_order(changes) if changes else tf.zeros([2, 2])

    curvature, changes = computed() if due is True else tf.cond(due, computed, lambda: extrapolate(kept, slopes[0]))
    fitted = fit_step(curvature, slopes, largest_momentum)
    trusted = share * trusted_part(fitted, [changes], change(fitted))
    step = StepCoefficients(trusted * fitted.rate, trusted * fitted.momentum)
    return step, trusted, KeptModel(curvature, changes, slopes[0], tf.stack([-step.rate, step.momentum]))
