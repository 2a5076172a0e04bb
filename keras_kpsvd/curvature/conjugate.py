"""The preconditioned gradient improved by conjugate gradients on the exact Fisher matrix.

The Kronecker model knows nothing of how layers act together, nor of single rare examples: on CURVES the eigenvalues of
`F̂_λ⁻¹F`, 1 if it were right, reach a hundred, so that a step along `Δ = F̂_λ⁻¹∇` alone has to be a hundredth of the one
that most directions want. A few steps of preconditioned conjugate gradients on `(F + λI) x = ∇` with the exact products
of `step_control` (Golub & Van Loan, algorithm 11.5.1; Hessian-free optimisation, Martens 2010, with the Kronecker
approximation as its preconditioner) take the largest of them out of the way. The first step alone is `Δ` itself, scaled.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from keras_kpsvd import likelihoods
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.curvature.step_control import Direction, inner, linearised_outputs, scaled
from keras_kpsvd.layers import ForwardPass, at_least_float32


def conjugate_direction(
    joint: JointPass,
    gradients: Direction,
    precondition: Callable[[Direction], Direction],
    damping: tf.Tensor,
    steps: int,
    seed: tf.Tensor,
) -> tuple[Direction, list[tf.Tensor]]:
    """`x ≈ (F + λI)⁻¹ ∇` after some steps of preconditioned conjugate gradients from zero.

    Args:
        joint: closed passes with persistent tapes.
        gradients: `∇`.
        precondition: a positive definite linear map of directions, `F̂_λ⁻¹`.
        damping: λ, scalar.
        steps: 1 or more. Each takes one product `Jp`, each but the last one a product with `Jᵀ` and one with `F̂_λ⁻¹`.
        seed: `[2]` integers; as `likelihoods.fisher_inner`.

    Returns:
        `(x, Jx)`: a descent direction (`∇ᵀx > 0` for `∇ ≠ 0`, the minimiser of the quadratic model on the Krylov space
        up to rounding), and the change of the outputs of every head along it. Zeros where there is no curvature at all.
    """
    residual = {layer: [at_least_float32(value) for value in values] for layer, values in gradients.items()}
    along = precondition(residual)
    slope = inner(residual, along)
    damping = tf.cast(damping, tf.float32)
    solution, changes = None, None
    for number in range(steps):
        tangents = changes_of_outputs(joint, along)
        curvature = damping * inner(along, along)
        for head, tangent in zip(joint.heads(), tangents, strict=True):
            curvature += likelihoods.fisher_inner(head, [tangent], seed)[0, 0]
        length = tf.math.divide_no_nan(slope, curvature)
        moved = scaled(along, length)
        tangents = [tf.cast(length, tangent.dtype) * tangent for tangent in tangents]
        solution = moved if solution is None else _plus(solution, moved)
        changes = tangents if changes is None else [one + other for one, other in zip(changes, tangents, strict=True)]
        if number + 1 == steps:
            break
        image = _plus(fisher_product(joint, list(residual), tangents, seed), scaled(moved, damping))
        residual = _plus(residual, scaled(image, tf.constant(-1.0)))
        preconditioned = precondition(residual)
        before, slope = slope, inner(residual, preconditioned)
        along = _plus(preconditioned, scaled(along, tf.math.divide_no_nan(slope, before)))
    return solution, changes


def changes_of_outputs(joint: JointPass, direction: Direction) -> list[tf.Tensor]:
    """`linearised_outputs` of all rows."""
    return joint.outputs_by(lambda one, heads: linearised_outputs(one, heads, direction))


def fisher_product(joint: JointPass, layers: list, tangents: list[tf.Tensor], seed: tf.Tensor) -> Direction:
    """`F V` from `J V`: `E_n[J_nᵀ F_z J_n V]`, without damping.

    Args:
        joint: closed passes with persistent tapes.
        layers: whose part of `F V` is wanted.
        tangents: `J V` for each head, of all rows.
        seed: as `likelihoods.fisher_inner`.

    Returns:
        In float32, float64 for layers that compute in it.
    """
    heads = joint.heads()
    cotangents = [
        likelihoods.fisher_product(head, tangent, seed) for head, tangent in zip(heads, tangents, strict=True)
    ]
    # Half precision is where outputs may be: in units of the largest, or small ones would vanish.
    largest = tf.reduce_max(tf.stack([tf.cast(tf.reduce_max(tf.abs(one)), tf.float32) for one in cotangents]))
    units = [tf.math.divide_no_nan(one, tf.cast(largest, one.dtype)) for one in cotangents]

    def pulled_back(one: ForwardPass, heads: list[likelihoods.Head], parts: list[tf.Tensor]) -> list[tf.Tensor]:
        products = weight_products(one, heads, parts, layers)
        return [value for layer in layers for value in products[layer]]

    flat = iter(joint.sums_by(pulled_back, units))
    return scaled({layer: [next(flat) for _ in layer.curvature_variables] for layer in layers}, largest)


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
