"""Leading singular triples of a rearranged Fisher block, by three routes.

`leading_triples` chooses among the Gram route (`gram.py`; one position per example), power iteration, and
Golub–Kahan–Lanczos bidiagonalisation with full reorthogonalisation and thick restarts. Every route returns
`SingularTriples` with residuals of both sides, a status and a step count; none stops silently.

References:
    [1] G. H. Golub, C. F. Van Loan, Matrix Computations, 4th ed., sections 8.2 and 10.4.
    [2] J. Baglama, L. Reichel, Augmented implicitly restarted Lanczos bidiagonalization methods, SIAM J. Sci. Comput.
        27 (2005), for the thick restart.
    [3] L. Giraud et al., The loss of orthogonality in the Gram–Schmidt orthogonalization process, 2005: twice is
        enough.
"""

from typing import Literal

import tensorflow as tf

from .gram import gram_triples
from .lanczos import golub_kahan_lanczos
from .rearrangement import RearrangedFisher
from .scaling import as_scalar, divide_no_nan, safe_norm
from .triples import (
    CONVERGED,
    NOT_CONVERGED,
    NOT_FINITE,
    Parity,
    SingularTriples,
    default_tolerance,
    epsilon,
    fix_signs,
    largest_triples,
    project,
)

Route = Literal["auto", "gram", "power", "lanczos"]


def power_iteration(
    operator: RearrangedFisher,
    start: tf.Tensor,
    *,
    tolerance: float | tf.Tensor,
    max_steps: int,
    parity: Parity = "symmetric",
    reference: float | tf.Tensor = 0.0,
) -> SingularTriples:
    """The leading singular triple by power iteration on `RᵀR`.

    Args:
        operator: Anything with `matvec`, `rmatvec`, `d_in`, `d_out` and `dtype`; entries of order one in float32.
        start: `V`, `[d_out, d_out]`, not zero after projection on `parity`.
        tolerance: Stop when `‖R v − σ u‖ ≤ tolerance · max(σ, reference)`. `‖Rᵀu − σ v‖` is zero up to rounding after
            each step, by the step's own definition, and says nothing of convergence.
        max_steps: Cap on steps, each one product with `R` and one with `Rᵀ`.
        parity: Symmetric or skew factors, or "any" for no restriction.
        reference: Largest singular value the caller already holds, for terms after the first.

    Returns:
        `SingularTriples` with k = 1. The value is the Rayleigh quotient of the vectors returned, so it never exceeds
        `σ₁`.

    Not guaranteed: that the triple is the leading one when `start` is orthogonal to it; convergence within the cap when
    the two leading values are close (the value is good all the same, see `default_tolerance`).
    """
    dtype = operator.dtype
    tolerance, reference = as_scalar(tolerance, dtype), as_scalar(reference, dtype)

    def unit(matrix):
        return divide_no_nan(matrix, safe_norm(matrix))

    def unfinished(step, sigma, left, right, image, residual):
        return residual > tolerance * tf.maximum(sigma, reference)

    def advance(step, sigma, left, right, image, residual):
        left = unit(image)
        moved = project(operator.rmatvec(left), parity)
        sigma = safe_norm(moved)
        right = divide_no_nan(moved, sigma)
        image = project(operator.matvec(right), parity)
        return step + 1, sigma, left, right, image, safe_norm(image - sigma * left)

    right = unit(project(tf.cast(start, dtype), parity))
    image = project(operator.matvec(right), parity)
    state = (
        tf.constant(0),
        tf.zeros([], dtype),
        tf.zeros_like(image),
        right,
        image,
        tf.constant(float("inf"), dtype),
    )
    step, sigma, left, right, _, residual = tf.while_loop(unfinished, advance, state, maximum_iterations=max_steps)
    left = tf.where(sigma > 0, left, tf.zeros_like(left))
    signed_left, signed_right = fix_signs(left[tf.newaxis], right[tf.newaxis])
    converged = residual <= tolerance * tf.maximum(sigma, reference)
    status = tf.where(converged, CONVERGED, tf.where(tf.math.is_finite(residual), NOT_CONVERGED, NOT_FINITE))
    status = tf.where(step > 0, status, NOT_CONVERGED)
    relative = divide_no_nan(residual, tf.maximum(sigma, reference))
    residuals = tf.stack([relative, tf.zeros_like(relative)])[tf.newaxis]
    return SingularTriples(sigma[tf.newaxis], signed_left, signed_right, residuals, status, step)


def leading_triples(
    operator: RearrangedFisher,
    k: int = 1,
    *,
    route: Route = "auto",
    symmetric: bool = False,
    start: tf.Tensor | None = None,
    tolerance: float | None = None,
    max_steps: int = 500,
    krylov_dimension: int | None = None,
) -> SingularTriples:
    """The `k` leading singular triples of a rearranged Fisher block, terms already subtracted included.

    `R(F)` commutes with transposition, so its singular vectors are pairs of symmetric or of skew matrices. The first
    pair can be taken symmetric positive semi-definite when nothing is subtracted; with several positions later ones may
    be skew. Without `symmetric` both kinds are searched and merged.

    Args:
        operator: `RearrangedFisher`; subtracted factors symmetric.
        k: How many triples.
        route: "gram" (exact, one position per example only), "power" (k > 1 by successive deflation), "lanczos", or
            "auto": see `cheapest_route`.
        symmetric: Keep to symmetric factors, as the damped inverse of training needs. No difference with one position.
        start: Warm start, `[d_out, d_out]` or one per triple, `[k, d_out, d_out]`, e.g. earlier right factors; scale
            and sign are of no account. By default a fixed pseudo-random matrix with a large trace. Unused by "gram".
        tolerance: Relative residual of both sides, `‖R v − σ u‖, ‖Rᵀu − σ v‖ ≤ tolerance · σ₁`. Default:
            `default_tolerance`.
        max_steps: Cap on pairs of products with `R` and `Rᵀ` (per triple for "power").
        krylov_dimension: For "lanczos"; see there.

    Returns:
        `SingularTriples`, sorted, but those of "power" with one parity stand in the order of their starts: stopped
        early, values may be out of order. Multiplying activations or gradients by a number only scales `values`.

    Raises:
        ValueError: On an unknown route, `k < 1`, or "gram" with other than one position.
    """
    if route not in ("auto", "gram", "power", "lanczos"):
        raise ValueError(f"`route` must be 'auto', 'gram', 'power' or 'lanczos'. Received: route={route!r}")
    if k < 1:
        raise ValueError(f"`k` must be at least 1. Received: k={k}")
    if route == "gram" and operator.positions != 1:
        raise ValueError(
            "`route='gram'` needs samples with one position per example, [batch, 1, features]. "
            f"Received: {operator.positions} positions"
        )
    if route == "auto":
        route = cheapest_route(operator, k)
    if route == "gram":
        activations, gradients = tf.squeeze(operator.activations, 1), tf.squeeze(operator.gradients, 1)
        return gram_triples(activations, gradients, k, subtracted=operator.subtracted)
    tolerance = default_tolerance(operator.dtype) if tolerance is None else tolerance
    finite_operator, finite = operator.finite_or_zero()
    balanced, unit = finite_operator.balanced()
    balanced = balanced.prepared()
    parities = ["symmetric"]
    if not symmetric and operator.positions != 1 and min(operator.d_in, operator.d_out) > 1:
        parities.append("skew")
    # Where the subtracted terms cancel all of R(F), what is left is rounding, and its residuals are as large as itself.
    reference = tf.zeros([], operator.dtype)
    for term in balanced.subtracted:
        reference += 16 * epsilon(operator.dtype) / tolerance * safe_norm(term.left) * safe_norm(term.right)
    found, references = [], []
    for parity in parities:
        starts = _starts(balanced, k, start, parity)
        if route == "power":
            triples = _successive_power(balanced, starts, tolerance, max_steps, parity, reference)
        else:
            triples = golub_kahan_lanczos(
                balanced,
                k,
                # Halves: in a space of one dimension (skew, two outputs) equal weights may cancel.
                tf.add_n([0.5**index * one for index, one in enumerate(tf.unstack(starts))]),
                tolerance=tolerance,
                max_steps=max_steps,
                krylov_dimension=krylov_dimension,
                parity=parity,
                reference=reference,
            )
        reference = tf.maximum(reference, triples.values[0])
        found.append(triples)
        references.append(reference)
    triples = found[0] if len(found) == 1 else largest_triples(k, found, references)
    values = unit * (unit * triples.values)
    return triples._replace(values=values, status=tf.where(finite, triples.status, NOT_FINITE))


def cheapest_route(operator: RearrangedFisher, k: int) -> Literal["gram", "lanczos"]:
    """The route "auto" takes, by multiplications counted.

    Several positions: Lanczos. One position: Gram costs about `N²(d_in + d_out) + 30 p³` for the decompositions,
    p = min(N, width of the half-vectorised gradients), and `k N (d_in² + d_out²)` for the factors; Lanczos about
    `2 · 20 k · N (d_in² + d_out²)`. With N unknown statically: Gram.
    """
    if operator.positions != 1:
        return "lanczos"
    count = operator.batch_size
    if count is None:
        return "gram"
    d_in, d_out = operator.d_in, operator.d_out
    size = min(count, d_out * (d_out + 1) // 2)
    factors = count * (d_in**2 + d_out**2)
    gram = count**2 * (d_in + d_out) + 30 * size**3 + k * factors
    return "gram" if gram <= 40 * k * factors else "lanczos"


def _successive_power(
    operator: RearrangedFisher,
    starts: tf.Tensor,
    tolerance: float,
    max_steps: int,
    parity: Parity,
    reference: tf.Tensor,
) -> SingularTriples:
    """Power iteration, then on what is left when each triple is subtracted; residuals as for Lanczos."""
    found, references = [], []
    for start in tf.unstack(starts):
        triple = power_iteration(
            operator, start, tolerance=tolerance, max_steps=max_steps, parity=parity, reference=reference
        )
        reference = tf.maximum(reference, triple.values[0])
        found.append(triple)
        references.append(reference)
        ((left, right),) = triple.terms()
        operator = operator.deflate(left, right)
    # In the order of their starts: stopped early, the first may still be the smaller, and is the positive one.
    return largest_triples(len(found), found, references, sort=False)


def _starts(operator: RearrangedFisher, k: int, start: tf.Tensor | None, parity: Parity) -> tf.Tensor:
    """`[k, d_out, d_out]` starts of the wanted parity; a zero one is replaced by the default."""

    def default():
        shape = [k, operator.d_in, operator.d_in]
        noise = project(tf.random.stateless_normal(shape, seed=[2023, 73], dtype=operator.dtype), parity)
        noise = divide_no_nan(noise, safe_norm(noise, axis=[1, 2], keepdims=True))
        if parity == "symmetric":
            # The leading factor is positive semi-definite, so the identity has a large component along it. The noise is
            # the smaller part: with one feature it is ±1 and would cancel the identity.
            noise = 0.5 * noise + tf.eye(operator.d_in, dtype=operator.dtype) / operator.d_in**0.5
        image = project(tf.stack([operator.rmatvec(one) for one in tf.unstack(noise)]), parity)
        return divide_no_nan(image, safe_norm(image, axis=[1, 2], keepdims=True))

    if start is None:
        return default()
    start = tf.cast(start, operator.dtype)
    start = tf.broadcast_to(start, [k, operator.d_out, operator.d_out])
    start = project(tf.where(tf.math.is_finite(start), start, tf.zeros_like(start)), parity)
    norms = safe_norm(start, axis=[1, 2], keepdims=True)
    # Rounding leaves a speck of the other parity; a start made of it alone is no start.
    return tf.cond(
        tf.reduce_all(norms > 0),
        lambda: divide_no_nan(start, norms),
        lambda: tf.where(norms > 0, divide_no_nan(start, norms), default()),
    )
