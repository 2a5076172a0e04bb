"""How much to damp: λ, within bounds of no scale, by how right the quadratic model is.

A λ that fits one loss, one scale of inputs or one depth means nothing for another. It is measured by the curvature that
per-example gradients see along themselves, `q = Σ_l tr F̂_l² / Σ_l tr F̂_l` of the layers' Kronecker models, and by what
that was at the first refresh, `q₀`:

    λ ≥ 0.002 √(q₀ q)    (0.0006 √(q₀ q) with corrected eigenvalues; a tenth may be left, see `curvature.corrected`),

where it starts, so that training is the same for a loss multiplied by any number. In training `q` grows, up to a
million times in deep networks: bounds in units of `q` alone ended up too high there, in units of `q₀` too low for
auto-encoders, in units of mean curvatures too high where curvature is alike in all directions (logistic regression).
And it is for layer `l` with `n_l` weights

    λ_l = λ min(1, 100 m_l / m),   m_l = tr F̂_l / n_l,   m = Σ_l tr F̂_l / Σ_l n_l,

less than for others where the signal hardly reaches the layer: at the start of 30 ReLU layers `m_l` differs by a factor
of 1e9 between the last and the first, and a λ for the one would hold the other still for ever. (`λ_l = λ m_l / m` for
all throws CURVES off; see benchmarks/README.md.)

λ follows how the slope along a step changes (in the spirit of Levenberg–Marquardt, Martens & Grosse 2015, §6.5). The
model says that `∇ᵀδ` vanishes at the step's end. `ρ = 1 − E[∇_{t+1}ᵀδ_t] / |E[∇_tᵀδ_t]|` with the next batch's gradient
`∇_{t+1}` is 1 where that is so, less where steps overshoot: because the curvature was underestimated or, since the two
batches are independent, because the step fitted the noise of its own batch. (The paper's own ratio is measured on the
step's batch, cannot see noise, and takes one more forward pass.)
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import mean_by

# λ of each layer, float32 scalars.
Dampings = dict[RecordingLayer, tf.Tensor]

# λ is at least the first times √(q₀ q), the second where eigenvalues are corrected, and at most the third times q.
LOWEST, LOWEST_CORRECTED, HIGHEST = 2e-3, 6e-4, 1e4

# A layer's λ is at most so many times what its own mean curvature would make it, and at least that part of the others'.
REACH, LEAST_PART = 100.0, 1e-10

# Slopes are averaged over some five steps. λ moves by a fifth a step at most: the paper's slower (19/20)^T1 every T1
# steps spends the first hundred steps on the way down. Chosen on CURVES and MNIST with seed 0; see README.md.
SLOPE_DECAY = 0.8
DAMPING_FACTOR = 0.8
RAISE_BELOW, LOWER_ABOVE = 0.0, 0.75

# Conjugate gradients go on where the ratio of slopes is at least so much.
KEEP_ABOVE = 0.5


def bounded_damping(
    damping: tf.Tensor, initial: tf.Tensor, layers: Sequence[tuple[tf.Tensor, int]], lowest: float = LOWEST
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    """λ within its bounds, and what it is for each layer.

    Args:
        damping: λ as it was left, float32 scalar; 0 before the first step.
        initial: `q₀`, float32 scalar; 0 before the first refresh.
        layers: `((tr F̂_l, tr F̂_l² / tr F̂_l), n_l)` of each, the first a float32 tensor, zeros where it is not known.
        lowest: the lower bound in units of `√(q₀ q)`.

    Returns:
        `(λ, [λ_l], q₀)`, float32 scalars; the first two are positive: where no layer has any curvature `q` and `q₀` are
        taken to be 1 for them.
    """
    moments, sizes = zip(*layers, strict=True)
    traces, along = tf.unstack(tf.stack(moments), axis=1)
    sizes = tf.constant(sizes, tf.float32)
    total = tf.reduce_sum(traces)
    whole = mean_by(traces, along)
    initial = tf.where(initial > 0, initial, whole)
    parts = tf.math.divide_no_nan(traces, total) * (REACH * tf.reduce_sum(sizes) / sizes)
    parts = tf.where(total > 0, tf.clip_by_value(parts, LEAST_PART, 1.0), tf.ones_like(parts))
    now, first = (tf.where(one > 0, one, tf.ones_like(one)) for one in (whole, initial))
    # Not the root of a product, which may leave float32's range.
    damping = tf.clip_by_value(damping, lowest * tf.sqrt(first) * tf.sqrt(now), HIGHEST * now)
    return damping, tf.unstack(damping * parts, len(layers)), initial


def holds_on_other_batches(averages: tf.Tensor) -> tf.Tensor:
    """Whether the quadratic model of one batch is right about most of a step on the next, boolean scalar.

    Conjugate gradients find the minimum of one batch's model. Where half of what they find is that batch's own noise,
    ending them early is what keeps the step to what all batches share.

    Args:
        averages: as `follow_damping`. True before the first step.
    """
    return averages[1] <= (KEEP_ABOVE - 1) * averages[0]


def follow_damping(
    damping: tf.Tensor, averages: tf.Tensor, slope_before: tf.Tensor, slope_after: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The next λ from the slopes along the last step at its start and, on a new batch, at its end.

    Args:
        damping: λ, scalar.
        averages: `[2]`, the running averages of the two slopes.
        slope_before: `∇_tᵀδ_t`, not positive; zero where there was no step yet.
        slope_after: `∇_{t+1}ᵀδ_t`, less what was expected of a step that was cut short.

    Returns:
        `(next λ, next averages)`, both float32.
    """
    averages = SLOPE_DECAY * averages + (1 - SLOPE_DECAY) * tf.stack([slope_before, slope_after])
    ratio = 1 + tf.math.divide_no_nan(averages[1], averages[0])
    factor = tf.where(
        ratio > LOWER_ABOVE, DAMPING_FACTOR, tf.where(ratio < RAISE_BELOW, 1 / DAMPING_FACTOR, tf.ones_like(ratio))
    )
    factor = tf.where(averages[0] < 0, factor, tf.ones_like(factor))
    return damping * factor, averages


def control_after(
    last: tf.Tensor,
    damping: tf.Tensor,
    averages: tf.Tensor,
    slope_after: tf.Tensor,
    slope: tf.Tensor,
    trusted: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The state of the damping once a step is fitted, from the gradient at its start.

    Over the trusted part `s` of the way to the model's minimum the slope falls to `1 − s` of what it was; what the next
    gradient finds beyond that tells how far the model was right, in units of the `s` that it should have fallen by.

    Args:
        last: `[2]`, of the last step: the slope expected at its end, and the fall expected on the way (negative).
            Zeros: there was none, or it was fitted to no model.
        damping: λ.
        averages: as `follow_damping`.
        slope_after: the slope found along the last step, `∇ᵀδ₀`.
        slope: of the new step at its start, `∇ᵀδ`; 0 where it is fitted to no model.
        trusted: its `s`.

    Returns:
        The next `(last, λ, averages)`.
    """
    expected, fall = tf.unstack(last)
    found = tf.where(tf.equal(fall, 0), tf.zeros_like(fall), slope_after - expected)
    damping, averages = follow_damping(damping, averages, fall, found)
    return tf.stack([(1 - trusted) * slope, trusted * slope]), damping, averages
