"""How far to step, and how much to damp.

The step `δ = −αΔ + μδ₀`, of the preconditioned gradient `Δ` and the previous step `δ₀`, minimises the quadratic model
`M(δ) = ∇ᵀδ + ½ δᵀ(F + λI)δ` (Martens & Grosse 2015, §6.4 and §7, eq. 12) with exact products of the whole model's
Fisher, not of its Kronecker approximation, which overestimates a good step up to a hundredfold once λ is small.

`δᵀFδ = E_n[(J_nδ)ᵀ F_z (J_nδ)]`, with `F_z` the Fisher of the predictive distribution at the outputs. `J_nδ` needs no
second forward pass: the gradients `g_l(u)` of the recorder's tape are linear in the cotangent `u`, so that `Jδ = ∇_u
Σ_l ⟨g_l(u), ā_l δ_l⟩`. In a graph the values of `g_l` are never computed, and a direction costs two products a
layer: two directions more than a forward and backward pass, so that most steps extrapolate (`curvature.extrapolation`).

λ follows how the slope along a step changes (in the spirit of Levenberg–Marquardt, §6.5 of the same paper). The model
says that `∇ᵀδ` vanishes at the step's end. `ρ = 1 − E[∇_{t+1}ᵀδ_t] / |E[∇_tᵀδ_t]|` with the next batch's gradient
`∇_{t+1}` is 1 where that is so, less where steps overshoot: because the curvature was underestimated or, since the two
batches are independent, because the step fitted the noise of its own batch. (The paper's own ratio is measured on the
step's batch, cannot see noise, and takes one more forward pass.)

The model is trusted as far as it can be: cross-entropies are quadratic over a few logits only, and where the predictive
distribution is saturated `F_z` vanishes and bounds nothing, so that a batch of examples that are all but certain would
be left at any distance. A step is cut where it moves the logits by more than `MAX_LOGIT_CHANGE`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.layers import ForwardPass, RecordingLayer, at_least_float32

# Slopes are averaged over some five steps. λ moves by a fifth a step at most: the paper's slower (19/20)^T1 every T1
# steps spends the first hundred steps on the way down. Chosen on CURVES and MNIST with seed 0; see README.md.
SLOPE_DECAY = 0.8
DAMPING_FACTOR = 0.8
DAMPING_RANGE = (1e-4, 1e3)

# Conjugate gradients go on where the ratio of slopes is at least so much.
KEEP_ABOVE = 0.5

# Of the running average of the batch size: some twenty steps.
ROWS_DECAY = 0.95

RAISE_BELOW, LOWER_ABOVE = 0.0, 0.75

# Root mean square, over examples, and over the outputs of a "bernoulli" (the classes of a "categorical" are summed).
# Small batches of a classifier diverge without it; 1 and 2 did alike on scikit-learn's digits.
MAX_LOGIT_CHANGE = 2.0

# A direction in weight space: for each layer a value for each of its `curvature_variables`.
Direction = dict[RecordingLayer, list[tf.Tensor]]


class StepCoefficients(NamedTuple):
    """`δ = −rate · Δ + momentum · δ₀`; float32 scalars."""

    rate: tf.Tensor
    momentum: tf.Tensor


def linearised_outputs(forward_pass: ForwardPass, heads: list[likelihoods.Head], changes: Direction) -> list[tf.Tensor]:
    """`J δ`, the change of every output of the model for a small change `δ` of the weights of its instrumented layers.

    Args:
        forward_pass: a closed pass with a persistent tape.
        heads: its outputs.
        changes: `{layer: values}`, a change for each of its `curvature_variables`.

    Returns:
        For each head a tensor of the shape of its outputs.
    """
    records = [record for record in forward_pass.records if record.layer in changes]
    outputs = [head.outputs for head in heads]
    cotangents = [tf.zeros_like(output) for output in outputs]
    with tf.GradientTape(watch_accessed_variables=False) as linear:
        linear.watch(cotangents)
        gradients = forward_pass.tape.gradient(
            outputs, [record.preactivation for record in records], output_gradients=cotangents
        )
        # Where a preactivation is gathered from they come in slices, of which no gradient can be taken.
        gradients = [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
    reached = [(record, gradient) for record, gradient in zip(records, gradients, strict=True) if gradient is not None]
    moved = []
    for record, gradient in reached:
        inputs = at_least_float32(record.inputs)
        values = [tf.cast(value, inputs.dtype) for value in changes[record.layer]]
        moved.append(tf.cast(record.layer.linear_map(inputs, *values), gradient.dtype))
    tangents = [None] * len(outputs)
    if reached:
        tangents = linear.gradient([gradient for _, gradient in reached], cotangents, output_gradients=moved)
    return [
        tf.zeros_like(output) if tangent is None else tangent for tangent, output in zip(tangents, outputs, strict=True)
    ]


def changes_of_outputs(joint: JointPass, direction: Direction) -> list[tf.Tensor]:
    """`linearised_outputs` of all rows."""
    return joint.outputs_by(lambda one, heads: linearised_outputs(one, heads, direction))


class QuadraticModel(NamedTuple):
    """What a few directions do, to second order.

    Attributes:
        curvature: `V_iᵀ (F + λI) V_j`, `[k, k]`, float32, symmetric.
        logit_changes: `likelihoods.logit_change` of each output that has one, `[k, k]` each.
    """

    curvature: tf.Tensor
    logit_changes: list[tf.Tensor]


def quadratic_model(
    joint: JointPass,
    directions: list[Direction],
    damping: tf.Tensor,
    seed: tf.Tensor,
    known: list[list[tf.Tensor]] | None = None,
) -> QuadraticModel:
    """The quadratic model of the loss on a few directions in weight space.

    Args:
        joint: closed passes with persistent tapes.
        directions: `k` of them, each `{layer: values for its curvature variables}`.
        damping: λ, scalar.
        seed: `[2]` integers; used only for callable likelihoods, whose Fisher at the outputs is estimated from draws.
        known: the changes of the outputs along each direction, where they are at hand.
    """
    tangents = [changes_of_outputs(joint, one) for one in directions] if known is None else known
    of_heads = [(head, [tangent[index] for tangent in tangents]) for index, head in enumerate(joint.heads())]
    products = [likelihoods.fisher_inner(head, of_head, seed) for head, of_head in of_heads]
    changes = [likelihoods.logit_change(head, of_head) for head, of_head in of_heads]
    places = range(len(directions))
    pairs = {(at, to): inner(directions[at], directions[to]) for at in places for to in places if at <= to}
    lengths = tf.stack([tf.stack([pairs[min(at, to), max(at, to)] for to in places]) for at in places])
    curvature = tf.add_n(products) + tf.cast(damping, tf.float32) * lengths
    return QuadraticModel(curvature, [change for change in changes if change is not None])


def inner(one: Direction, other: Direction) -> tf.Tensor:
    """The Euclidean inner product of two directions, float32 scalar."""
    # Left out, axes would be a constant of its own for each sum.
    axes = functools.cache(lambda rank: tf.constant([*range(rank)]))
    products = [
        tf.cast(tf.reduce_sum(value * tf.cast(of_other, value.dtype), axes(value.shape.rank)), tf.float32)
        for layer, values in one.items()
        for value, of_other in zip(values, other[layer], strict=True)
    ]
    return tf.add_n(products)


def scaled(direction: Direction, factor: tf.Tensor) -> Direction:
    """A direction times a scalar."""
    return {layer: [value * tf.cast(factor, value.dtype) for value in values] for layer, values in direction.items()}


def fit_step(quadratic: tf.Tensor, slopes: tf.Tensor, largest_momentum: float) -> StepCoefficients:
    """Minimises `½ cᵀ M c + slopesᵀ c` over `c = (−rate, momentum)`, rate not negative, momentum in `[0,
    largest_momentum]`.

    Args:
        quadratic: `M [2, 2]`, on the directions `Δ` and `δ₀`.
        slopes: `(∇ᵀΔ, ∇ᵀδ₀)`; the first is positive for a positive definite preconditioner.
        largest_momentum: the cap of `momentum`.

    Returns:
        The minimiser. Where `Δ` has no curvature at all, not even damping, the rate is 0.
    """
    # In units of each direction's own length √M_ii: products of small curvatures would underflow.
    lengths = tf.sqrt(tf.maximum(tf.linalg.diag_part(quadratic), 0.0))
    cosine = tf.math.divide_no_nan(tf.math.divide_no_nan(quadratic[0, 1], lengths[0]), lengths[1])
    slopes = tf.math.divide_no_nan(slopes, lengths)
    cap = largest_momentum * lengths[1]
    determinant = 1 - cosine * cosine
    # Of two nearly parallel directions one is enough.
    momentum = tf.where(determinant > 1e-6, (cosine * slopes[0] - slopes[1]) / determinant, 0.0)
    momentum = tf.clip_by_value(momentum, 0.0, cap)
    rate = slopes[0] + cosine * momentum
    # Where the best rate is negative the minimiser has none.
    momentum = tf.where(rate < 0, tf.clip_by_value(-slopes[1], 0.0, cap), momentum)
    rate = tf.maximum(rate, 0.0)
    return StepCoefficients(*tf.unstack(tf.math.divide_no_nan(tf.stack([rate, momentum]), lengths)))


def trusted_part(step: StepCoefficients, logit_changes: list[tf.Tensor]) -> tf.Tensor:
    """The part of a step, in (0, 1], after which no output has moved by more than `MAX_LOGIT_CHANGE`.

    Args:
        step: as fitted.
        logit_changes: of `QuadraticModel`, on the directions `Δ` and `δ₀`.

    Returns:
        float32 scalar; NaN where a change is.
    """
    coefficients = tf.stack([-step.rate, step.momentum])[:, None]
    squares = [tf.matmul(coefficients, tf.matmul(change, coefficients), transpose_a=True) for change in logit_changes]
    if not squares:
        return tf.constant(1.0)
    length = tf.sqrt(tf.maximum(tf.reduce_max(tf.stack(squares)), 0.0))
    return MAX_LOGIT_CHANGE / tf.maximum(length, MAX_LOGIT_CHANGE)


def share_of_batch(examples: tf.Tensor, usual: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """How much of its step a batch may take, and the number of examples that is usual by now.

    A step goes all the way to the minimum that its own batch shows. A last batch of a few examples would undo what
    others have found: it takes the part of its step that its examples are of the usual number.

    Args:
        examples: of this batch, scalar.
        usual: the running average of that, float32; 0 before the first batch.

    Returns:
        `(share in (0, 1], next usual)`, float32.
    """
    examples = tf.cast(examples, tf.float32)
    usual = tf.where(usual > 0, usual, examples)
    share = tf.where(examples < usual, tf.math.divide_no_nan(examples, usual), 1.0)
    return share, ROWS_DECAY * usual + (1 - ROWS_DECAY) * examples


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
        damping: λ.
        averages: as `follow_damping`.
        slope_after: the slope found along the last step, `∇ᵀδ₀`.
        slope: of the new step at its start, `∇ᵀδ`.
        trusted: its `s`.

    Returns:
        The next `(last, λ, averages)`.
    """
    expected, fall = tf.unstack(last)
    damping, averages = follow_damping(damping, averages, fall, slope_after - expected)
    return tf.stack([(1 - trusted) * slope, trusted * slope]), damping, averages
