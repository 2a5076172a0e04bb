"""How far to step.

The step `δ = −αΔ + μδ₀`, of the preconditioned gradient `Δ` and the previous step `δ₀`, minimises the quadratic model
`M(δ) = ∇ᵀδ + ½ δᵀ(F + λI)δ` (Martens & Grosse 2015, §6.4 and §7, eq. 12) with exact products of the whole model's
Fisher, not of its Kronecker approximation, which overestimates a good step up to a hundredfold once λ is small.

`δᵀFδ = E_n[(J_nδ)ᵀ F_z (J_nδ)]`, with `F_z` the Fisher of the predictive distribution at the outputs. `J_nδ` needs no
second forward pass: the gradients `g_l(u)` of the recorder's tape are linear in the cotangent `u`, so that `Jδ = ∇_u
Σ_l ⟨g_l(u), ā_l δ_l⟩`. In a graph the values of `g_l` are never computed, and a direction costs two products a
layer: two directions more than a forward and backward pass, so that most steps extrapolate (`curvature.extrapolation`).

The model is trusted as far as it can be: cross-entropies are quadratic over a few logits only, and where the predictive
distribution is saturated `F_z` vanishes and bounds nothing, so that a batch of examples that are all but certain would
be left at any distance. A step is cut where it moves the logits by more than `MAX_LOGIT_CHANGE`.

And it is cut where layers change together by more than `MAX_RELATIVE_CHANGE`: what layers one after another do is
linear in each of them, not in all. A product of matrices changes by up to `Π (1 + ρ_l) − 1` of itself, `ρ_l =
‖δ_l‖/‖W_l‖` (deep relative trust, Bernstein et al. 2020, arXiv:2002.03432), of which the quadratic model knows what is
linear, `Σ ρ_l`, but not the products of two and more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.curvature.damping import Dampings
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.layers import ForwardPass, RecordingLayer, at_least_float32
from keras_kpsvd.linalg import sum_in_order

# Of the running average of the batch size: some twenty steps.
ROWS_DECAY = 0.95

# Root mean square, over examples, and over the outputs of a "bernoulli" (the classes of a "categorical" are summed).
# Small batches of a classifier diverge without it; 1 and 2 did alike on scikit-learn's digits.
MAX_LOGIT_CHANGE = 2.0

# Of `relative_change`. MNIST's first step went wrong where it was 1.7; see benchmarks/README.md.
MAX_RELATIVE_CHANGE = 1.0

# A direction in weight space: for each layer a value for each of its `curvature_variables`.
Direction = dict[RecordingLayer, list[tf.Tensor]]


class StepCoefficients(NamedTuple):
    """`δ = −rate · Δ + momentum · δ₀`; float32 scalars."""

    rate: tf.Tensor
    momentum: tf.Tensor


class LastStep(NamedTuple):
    """`δ₀`, and what is known of it before any curvature is.

    Attributes:
        step: the step itself, zeros before the first.
        squares: `‖δ₀‖²` of each layer, `[layers]` float32.
        slope: `∇ᵀδ₀`, float32 scalar.
    """

    step: Direction
    squares: tf.Tensor
    slope: tf.Tensor


def last_step(step: Direction, gradients: Direction) -> LastStep:
    """Of a step and the gradients of the batch after it."""
    return LastStep(step, inner_by_layer(step, step), inner(gradients, step))


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
    grams: tf.Tensor,
    dampings: Dampings,
    seed: tf.Tensor,
    known: list[list[tf.Tensor]] | None = None,
) -> QuadraticModel:
    """The quadratic model of the loss on a few directions in weight space.

    Args:
        joint: closed passes with persistent tapes.
        directions: `k` of them, each `{layer: values for its curvature variables}`.
        grams: the inner products of their parts in each layer, `[layers, k, k]`.
        dampings: λ of each layer.
        seed: `[2]` integers; used only for callable likelihoods, whose Fisher at the outputs is estimated from draws.
        known: the changes of the outputs along each direction, where they are at hand.
    """
    tangents = [changes_of_outputs(joint, one) for one in directions] if known is None else known
    of_heads = [(head, [tangent[index] for tangent in tangents]) for index, head in enumerate(joint.heads())]
    products = [likelihoods.fisher_inner(head, of_head, seed) for head, of_head in of_heads]
    changes = [likelihoods.logit_change(head, of_head) for head, of_head in of_heads]
    damped = tf.tensordot(of_layers(dampings, directions[0]), grams, 1)
    return QuadraticModel(sum_in_order([*products, damped]), [change for change in changes if change is not None])


def inner_by_layer(one: Direction, other: Direction) -> tf.Tensor:
    """The Euclidean inner product of the parts of two directions in each layer, `[layers]` float32.

    Of a direction with itself: that is read once, and no product is written.
    """
    pairs = [(layer, *pair) for layer in one for pair in zip(one[layer], other[layer], strict=True)]
    if one is other:
        products = [2 * tf.cast(tf.nn.l2_loss(at_least_float32(value)), tf.float32) for _, value, _ in pairs]
    else:
        # Left out, axes would be a constant of its own for each sum.
        axes = functools.cache(lambda rank: tf.constant([*range(rank)]))
        products = [
            tf.cast(tf.reduce_sum(value * tf.cast(of_other, value.dtype), axes(value.shape.rank)), tf.float32)
            for _, value, of_other in pairs
        ]
    places = {layer: place for place, layer in enumerate(one)}
    return tf.math.segment_sum(tf.stack(products), tf.constant([places[layer] for layer, _, _ in pairs]))


def inner(one: Direction, other: Direction) -> tf.Tensor:
    """The Euclidean inner product of two directions, float32 scalar."""
    return tf.reduce_sum(inner_by_layer(one, other))


def gram_matrices(first: tf.Tensor, mixed: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """`[layers, 2, 2]`, of the inner products of two directions in each layer, `[layers]` each."""
    return tf.stack([tf.stack([first, mixed], 1), tf.stack([mixed, second], 1)], 1)


def of_layers(values: Dampings, layers: Iterable[RecordingLayer]) -> tf.Tensor:
    """A number of each layer, `[layers]` float32."""
    return tf.stack([tf.cast(values[layer], tf.float32) for layer in layers])


def scaled(direction: Direction, factor: tf.Tensor) -> Direction:
    """A direction times a scalar."""
    return {layer: [value * tf.cast(factor, value.dtype) for value in values] for layer, values in direction.items()}


def by_layer(direction: Direction, factors: tf.Tensor) -> Direction:
    """A direction, each layer's part times its own of `factors [layers]`."""
    return {
        layer: [value * tf.cast(factor, value.dtype) for value in values]
        for (layer, values), factor in zip(direction.items(), tf.unstack(factors, len(direction)), strict=True)
    }


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


def trusted_part(step: StepCoefficients, logit_changes: list[tf.Tensor], moved: tf.Tensor | float = 0.0) -> tf.Tensor:
    """The part of a step, in (0, 1], after which no output has moved by more than `MAX_LOGIT_CHANGE`, and the network
    by no more than `MAX_RELATIVE_CHANGE` of itself.

    Args:
        step: as fitted.
        logit_changes: of `QuadraticModel`, on the directions `Δ` and `δ₀`.
        moved: `relative_change` of the step.

    Returns:
        float32 scalar; NaN where a change is.
    """
    coefficients = tf.stack([-step.rate, step.momentum])[:, None]
    squares = [tf.matmul(coefficients, tf.matmul(change, coefficients), transpose_a=True) for change in logit_changes]
    lengths = [tf.sqrt(tf.maximum(tf.reshape(one, []), 0.0)) / MAX_LOGIT_CHANGE for one in squares]
    lengths.append(tf.convert_to_tensor(moved, tf.float32) / MAX_RELATIVE_CHANGE)
    return 1 / tf.maximum(tf.reduce_max(tf.stack(lengths)), 1.0)


def weight_sizes(layers: Iterable[RecordingLayer]) -> tf.Tensor:
    """What changes of weights are measured against: `max(‖W_l‖, √(2 d_in d_out / (d_in + d_out)))`, bias included.

    The second is the length of Glorot's initial weights, for layers that start at zero.

    Returns:
        `[layers]`, float32.
    """
    layers = list(layers)
    weights = {layer: [tf.convert_to_tensor(one.value) for one in layer.curvature_variables] for layer in layers}
    usual = [sum(2 * d_in * d_out / (d_in + d_out) for d_in, d_out in layer.block_shapes) for layer in layers]
    return tf.sqrt(tf.maximum(inner_by_layer(weights, weights), tf.constant(usual, tf.float32)))


def relative_change(step: StepCoefficients, grams: tf.Tensor, sizes: tf.Tensor) -> tf.Tensor:
    """`√(Σ_{l≠k} ρ_l ρ_k)` with `ρ_l = ‖δ_l‖ / ‖W_l‖`: how far layers change together, float32 scalar.

    About `Σ ρ_l` for many layers, and 0 for one: its outputs are linear in its weights.

    Args:
        step: as fitted.
        grams: `gram_matrices` of the directions `Δ` and `δ₀`, `[layers, 2, 2]`.
        sizes: of `weight_sizes`.
    """
    coefficients = tf.stack([-step.rate, step.momentum])
    squares = tf.einsum("i,lij,j->l", coefficients, grams, coefficients)
    parts = tf.sqrt(tf.maximum(squares, 0.0)) / sizes
    return tf.sqrt(tf.maximum(tf.square(tf.reduce_sum(parts)) - tf.reduce_sum(tf.square(parts)), 0.0))


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
