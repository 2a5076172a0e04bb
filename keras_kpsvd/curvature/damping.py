"""How much to damp: λ in units of the curvature that is there, by how right the quadratic model is.

A λ that fits one loss, one scale of inputs or one depth is meaningless for another. It is therefore `λ_l = r u_l` for
layer `l`, with a number `r` that is the same for all and moves, and units of the Kronecker model `F̂_l` of a layer with
`n_l` weights:

    u_l = min(u, 100 tr F̂_l / n_l),   u = Σ_l tr F̂_l / Σ_l n_l.

`u` is the mean curvature of all weights. Measured so, training is the same for a loss multiplied by any number. The
second bound is for layers that the signal hardly reaches: at the start of 30 ReLU layers the mean curvature differs by
a factor of 1e9 between the last layer and the first, and a λ for the one would hold the other still for ever. With
each layer's own unit for all (1 in place of 100) CURVES is thrown off instead; see benchmarks/README.md.

`r` follows how the slope along a step changes (in the spirit of Levenberg–Marquardt, Martens & Grosse 2015, §6.5). The
model says that `∇ᵀδ` vanishes at the step's end. `ρ = 1 − E[∇_{t+1}ᵀδ_t] / |E[∇_tᵀδ_t]|` with the next batch's gradient
`∇_{t+1}` is 1 where that is so, less where steps overshoot: because the curvature was underestimated or, since the two
batches are independent, because the step fitted the noise of its own batch. (The paper's own ratio is measured on the
step's batch, cannot see noise, and takes one more forward pass.)
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_kpsvd.layers import RecordingLayer

# λ of each layer, float32 scalars.
Dampings = dict[RecordingLayer, tf.Tensor]

# Where r starts and between what it stays.
INITIAL_DAMPING = 10.0
DAMPING_RANGE = (0.3, 1e7)

# A layer's unit is at most so many times its own curvature, and at least the second part of all layers' together.
REACH, LEAST_UNIT = 100.0, 1e-10

# Slopes are averaged over some five steps. r moves by a fifth a step at most: the paper's slower (19/20)^T1 every T1
# steps spends the first hundred steps on the way down. Chosen on CURVES and MNIST with seed 0; see README.md.
SLOPE_DECAY = 0.8
DAMPING_FACTOR = 0.8
RAISE_BELOW, LOWER_ABOVE = 0.0, 0.75

# Conjugate gradients go on where the ratio of slopes is at least so much.
KEEP_ABOVE = 0.5


def damping_units(layers: Sequence[tuple[tf.Tensor, int]]) -> list[tf.Tensor]:
    """`u_l` of each layer.

    Args:
        layers: `(tr F̂_l, n_l)` of each, the first a float32 scalar, zero where it is not known.

    Returns:
        As many positive float32 scalars; 1 where no layer has any curvature.
    """
    traces, sizes = zip(*layers, strict=True)
    traces, sizes = tf.stack(traces), tf.constant(sizes, tf.float32)
    whole = tf.reduce_sum(traces / tf.reduce_sum(sizes))
    units = tf.clip_by_value(REACH * traces / sizes, LEAST_UNIT * whole, whole)
    return tf.unstack(tf.where(whole > 0, units, tf.ones_like(units)), len(layers))


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
    """The next `r` from the slopes along the last step at its start and, on a new batch, at its end.

    Args:
        damping: `r`, scalar.
        averages: `[2]`, the running averages of the two slopes.
        slope_before: `∇_tᵀδ_t`, not positive; zero where there was no step yet.
        slope_after: `∇_{t+1}ᵀδ_t`, less what was expected of a step that was cut short.

    Returns:
        `(next r, next averages)`, both float32.
    """
    averages = SLOPE_DECAY * averages + (1 - SLOPE_DECAY) * tf.stack([slope_before, slope_after])
    ratio = 1 + tf.math.divide_no_nan(averages[1], averages[0])
    factor = tf.where(
        ratio > LOWER_ABOVE, DAMPING_FACTOR, tf.where(ratio < RAISE_BELOW, 1 / DAMPING_FACTOR, tf.ones_like(ratio))
    )
    factor = tf.where(averages[0] < 0, factor, tf.ones_like(factor))
    return tf.clip_by_value(damping * factor, *DAMPING_RANGE), averages


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
        damping: `r`.
        averages: as `follow_damping`.
        slope_after: the slope found along the last step, `∇ᵀδ₀`.
        slope: of the new step at its start, `∇ᵀδ`.
        trusted: its `s`.

    Returns:
        The next `(last, r, averages)`.
    """
    expected, fall = tf.unstack(last)
    damping, averages = follow_damping(damping, averages, fall, slope_after - expected)
    return tf.stack([(1 - trusted) * slope, trusted * slope]), damping, averages
