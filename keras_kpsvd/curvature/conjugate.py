"""The preconditioned gradient improved by conjugate gradients on the exact Fisher matrix.

The Kronecker model knows nothing of how layers act together, nor of single rare examples: on CURVES the eigenvalues of
`F̂_λ⁻¹F`, 1 if it were right, reach a hundred, so that a step along `Δ = F̂_λ⁻¹∇` alone has to be a hundredth of the one
that most directions want. A few steps of preconditioned conjugate gradients on `(F + λI) x = ∇` with the exact products
of `step_control` (Golub & Van Loan, algorithm 11.5.1; Hessian-free optimisation, Martens 2010, with the Kronecker
approximation as its preconditioner) take the largest of them out of the way.
The first step alone is `Δ` itself, scaled.

The directions `p_i` they go along are conjugate, so that the minimiser over all of them and the last step `δ₀` is known
too: `−Σ α_i p_i + μ (δ₀ − Σ c_i p_i)`, `c_i = p_iᵀMδ₀ / p_iᵀMp_i`, which is `−x + μδ₀` for `x = Σ (α_i + μ c_i) p_i`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.curvature.damping import Dampings
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.curvature.step_control import (
    Direction,
    LastStep,
    by_layer,
    changes_of_outputs,
    inner,
    inner_by_layer,
    of_layers,
    scaled,
)
from keras_kpsvd.layers import ForwardPass, at_least_float32
from keras_kpsvd.linalg import sum_in_order


class Conjugate(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        direction: `x`.
        overlaps: `xᵀδ₀` of each layer, `[layers]` float32.
        changes: of the outputs of every head, along `x` and along `δ₀`.
    """

    direction: Direction
    overlaps: tf.Tensor
    changes: list[list[tf.Tensor]]


def conjugate_direction(
    joint: JointPass,
    gradients: Direction,
    precondition: Callable[[Direction], Direction],
    last: LastStep,
    dampings: Dampings,
    steps: int,
    largest_momentum: float,
    seed: tf.Tensor,
) -> Conjugate:
    """The `x` of the step `−x + μδ₀` that minimises the quadratic model over a Krylov space and the last step.

    Passes over whole directions are what a step of small batches pays for: none is made twice. `p_iᵀ∇` is `r_iᵀz_i`
    since residuals are orthogonal to the directions before them, `xᵀδ₀` the sum of those of the directions.

    Args:
        joint: closed passes with persistent tapes.
        gradients: `∇`.
        precondition: a symmetric positive definite linear map of directions, `F̂_λ⁻¹`.
        last: `δ₀`, zeros for none.
        dampings: λ of each layer.
        steps: 1 or more. Each takes one product `Jp`, each but the last one a product with `Jᵀ` and one with `F̂_λ⁻¹`.
        largest_momentum: the cap of `μ`, which is not negative.
        seed: `[2]` integers; as `likelihoods.fisher_inner`.

    Returns:
        Zeros where there is no curvature at all, not even damping. Where `x` would not be a descent direction `μ` is
        taken to be 0.
    """
    residual = {layer: [at_least_float32(value) for value in values] for layer, values in gradients.items()}
    weights = of_layers(dampings, residual)
    along = precondition(residual)
    slope = inner(residual, along)
    before = changes_of_outputs(joint, last.step)
    whole, remaining_slope = tf.reduce_sum(weights * last.squares), last.slope
    for head, tangent in zip(joint.heads(), before, strict=True):
        whole += likelihoods.fisher_inner(head, [tangent], seed)[0, 0]
    remaining = whole
    directions, tangents, lengths, shares, descents, overlaps = [], [], [], [], [], []
    for number in range(steps):
        directions.append(along)
        tangents.append(changes_of_outputs(joint, along))
        products = [
            likelihoods.fisher_inner(head, [tangent, other], seed)[0]
            for head, tangent, other in zip(joint.heads(), tangents[-1], before, strict=True)
        ]
        curvature, mixed = tf.unstack(sum_in_order(products))
        overlaps.append(inner_by_layer(along, last.step))
        curvature += tf.reduce_sum(weights * inner_by_layer(along, along))
        mixed += tf.reduce_sum(weights * overlaps[-1])
        lengths.append(tf.math.divide_no_nan(slope, curvature))
        shares.append(tf.math.divide_no_nan(mixed, curvature))
        # What is left of `δ₀` once it is made conjugate to this direction as well.
        remaining -= shares[-1] * mixed
        descents.append(slope)
        remaining_slope -= shares[-1] * slope
        if number + 1 == steps:
            break
        image = fisher_product(joint, list(residual), tangents[-1], seed, lengths[-1])
        image = _plus(image, by_layer(along, lengths[-1] * weights))
        residual = {layer: [r - i for r, i in zip(residual[layer], image[layer], strict=True)] for layer in residual}
        preconditioned = precondition(residual)
        former, slope = slope, inner(residual, preconditioned)
        along = _plus(preconditioned, scaled(along, tf.math.divide_no_nan(slope, former)))
    momentum = tf.clip_by_value(tf.math.divide_no_nan(-remaining_slope, remaining), 0.0, largest_momentum)
    lengths, shares, descents = tf.stack(lengths), tf.stack(shares), tf.stack(descents)
    # Of a `δ₀` that lies in the Krylov space already, rounding is all that remains.
    usable = remaining > 1e-6 * whole
    usable &= tf.tensordot(lengths + momentum * shares, descents, 1) > 0
    factors = tf.where(usable, lengths + momentum * shares, lengths)
    overlap = tf.tensordot(factors, tf.stack(overlaps), 1)
    factors = tf.unstack(factors, steps)
    solution = scaled(directions[0], factors[0])
    for factor, direction in zip(factors[1:], directions[1:], strict=True):
        solution = _plus(solution, scaled(direction, factor))
    changes = [
        tf.add_n([tf.cast(factor, one.dtype) * one for factor, one in zip(factors, of_head, strict=True)])
        for of_head in zip(*tangents, strict=True)
    ]
    return Conjugate(solution, overlap, [changes, before])


def fisher_product(
    joint: JointPass, layers: list, tangents: list[tf.Tensor], seed: tf.Tensor, factor: float | tf.Tensor = 1.0
) -> Direction:
    """`F V` from `J V`: `E_n[J_nᵀ F_z J_n V]`, without damping.

    Args:
        joint: closed passes with persistent tapes.
        layers: whose part of `F V` is wanted.
        tangents: `J V` for each head, of all rows.
        seed: as `likelihoods.fisher_inner`.
        factor: of the result, scalar.

    Returns:
        In float32, float64 for layers that compute in it.
    """
    heads = joint.heads()
    cotangents = [_fisher_at_outputs(head, tangent, seed) for head, tangent in zip(heads, tangents, strict=True)]
    # Half precision is where outputs may be: in units of the largest, or small ones would vanish.
    largest = tf.reduce_max(tf.stack([tf.cast(tf.reduce_max(tf.abs(one)), tf.float32) for one in cotangents]))
    units = [tf.math.divide_no_nan(one, tf.cast(largest, one.dtype)) for one in cotangents]

    def pulled_back(one: ForwardPass, heads: list[likelihoods.Head], parts: list[tf.Tensor]) -> list[tf.Tensor]:
        products = weight_products(one, heads, parts, layers)
        return [value for layer in layers for value in products[layer]]

    flat = iter(joint.sums_by(pulled_back, units))
    return scaled({layer: [next(flat) for _ in layer.curvature_variables] for layer in layers}, largest * factor)


def _fisher_at_outputs(head: likelihoods.Head, tangent: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """`κ F_z tangent / batch`, row by row: the gradient of `½ fisher_inner(head, [tangent], seed)` by the tangent."""
    tangent = at_least_float32(tangent)
    probe = tf.zeros_like(tangent)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(probe)
        product = likelihoods.fisher_inner(head, [tangent, probe], seed)[0, 1]
    return tape.gradient(product, probe)


def weight_products(
    forward_pass: ForwardPass, heads: list[likelihoods.Head], cotangents: list[tf.Tensor], layers: list
) -> Direction:
    """`Jᵀ u`, for each layer the sum over examples, positions and calls.

    Args:
        forward_pass: a closed pass with a persistent tape.
        heads: its outputs.
        cotangents: `u` for each.
        layers: the result has an entry for each; zeros where it was not called or no output depends on it.
    """
    records = [record for record in forward_pass.records if record.layer in set(layers)]
    outputs = [head.outputs for head in heads]
    gradients = forward_pass.tape.gradient(
        outputs,
        [record.preactivation for record in records],
        output_gradients=[tf.cast(one, output.dtype) for one, output in zip(cotangents, outputs, strict=True)],
    )
    totals: Direction = {}
    for record, gradient in zip(records, gradients, strict=True):
        if gradient is None:
            continue
        inputs = at_least_float32(record.inputs)
        values = [tf.zeros(variable.shape, inputs.dtype) for variable in record.layer.curvature_variables]
        with tf.GradientTape(watch_accessed_variables=False) as linear:
            linear.watch(values)
            mapped = record.layer.linear_map(inputs, *values)
        products = linear.gradient(
            mapped, values, tf.cast(gradient, mapped.dtype), unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        before = totals.get(record.layer)
        totals[record.layer] = products if before is None else [a + b for a, b in zip(before, products, strict=True)]
    for layer in layers:
        if layer not in totals:
            dtype = tf.float64 if layer.variable_dtype == "float64" else tf.float32
            totals[layer] = [tf.zeros(variable.shape, dtype) for variable in layer.curvature_variables]
    return totals


def _plus(one: Direction, other: Direction) -> Direction:
    return {
        layer: [value + tf.cast(more, value.dtype) for value, more in zip(values, other[layer], strict=True)]
        for layer, values in one.items()
    }
