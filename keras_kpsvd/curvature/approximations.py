"""The five Kronecker approximations of one layer's Fisher block (Koroko et al. 2023, §3), from samples.

Samples are `activations [batch, shared, d_in]` and `gradients [batch, shared, d_out]`; the block is
`F = E_n[vec(D_n) vec(D_n)ᵀ]` with `D_n = Σ_t ā_{n,t} g_{n,t}ᵀ`, flattened row by row as Keras stores kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_kpsvd.curvature.reduction import kfac_factors
from keras_kpsvd.linalg import KroneckerSum, RearrangedFisher, leading_triples

METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")
TWO_TERM_METHODS = ("deflation", "lanczos", "kfac_corrected")
KFAC_METHODS = ("kfac", "kfac_corrected")

Pair = tuple[tf.Tensor, tf.Tensor]


def check_method(method: str, argument: str = "method") -> None:
    """Raises a ValueError that names `argument` if `method` is none of the five."""
    if method not in METHODS:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, METHODS))}. Received: {argument}={method!r}"
        )


def approximate_terms(
    activations: tf.Tensor, gradients: tf.Tensor, method: str, *, symmetric: bool, **iteration: Any
) -> tuple[Pair, ...]:
    """The Kronecker terms of one approximation, as tensors.

    Args:
        activations: `[batch, shared, d_in]`.
        gradients: `[batch, shared, d_out]`.
        method: one of `METHODS`.
        symmetric: restrict the second term to symmetric factors, as training does; with several positions the best
            second term can be a product of two skew-symmetric ones.
        **iteration: `route`, `tolerance`, `max_steps` of `linalg.leading_triples`.

    Returns:
        One or two pairs `(A, G)`. For SVD methods the pair of a triple `(σ, u, v)` is `(√σ u, √σ v)`.
    """
    base = kfac_factors(activations, gradients) if method in KFAC_METHODS else None
    operator = None if method == "kfac" else RearrangedFisher(activations, gradients)
    return operator_terms(operator, base, method, symmetric=symmetric, **iteration)[0]


def operator_terms(
    operator: RearrangedFisher | None, base: Pair | None, method: str, *, symmetric: bool, **iteration: Any
) -> tuple[tuple[Pair, ...], tf.Tensor]:
    """`approximate_terms` of an operator.

    Args:
        operator: the rearranged block; not needed for "kfac".
        base: KFAC's factors, for `KFAC_METHODS`.
        method: one of `METHODS`.
        symmetric: as `approximate_terms`.
        **iteration: as `approximate_terms`, and `start`: right factors to start from, `[d_out, d_out]` or one for each
            triple that is searched.

    Returns:
        The terms, and the residuals of the triples among them (`SingularTriples.residuals`; of "kfac" there are none).
    """
    if method == "kfac":
        return (base,), tf.zeros([0, 2])
    if method == "kfac_corrected":
        triples = leading_triples(operator.deflate_kfac(*base), 1, symmetric=symmetric, **iteration)
        return (base, *_pairs(triples)), triples.residuals
    triples = leading_triples(operator, 1 if method == "kpsvd" else 2, symmetric=symmetric, **iteration)
    return _pairs(triples), triples.residuals


def _pairs(triples: Any) -> tuple[Pair, ...]:
    root = tf.sqrt(tf.maximum(triples.values, 0))
    return tuple((root[k] * triples.left[k], root[k] * triples.right[k]) for k in range(triples.left.shape[0]))


def approximate_fisher(activations: Any, gradients: Any, method: str = "kpsvd") -> KroneckerSum:
    """A Kronecker approximation `Σ_k A_k ⊗ G_k` of one layer's Fisher block, converged to the dense optimum.

    Args:
        activations: `ā`, `[batch, d_in]` or `[batch, shared, d_in]`, the bias column already appended if wanted. NumPy
            arrays or tensors, float32 or float64; anything else is taken as float32.
        gradients: `g`, `[batch, d_out]` or `[batch, shared, d_out]`, per example, no `1/batch` in them.
        method: "kfac" (`E[āāᵀ] ⊗ E[ggᵀ]`), "kpsvd" (the best one-term sum), "deflation" and "lanczos" (the best
            two-term sum, one term after the other or both at once), "kfac_corrected" (KFAC's term and the best one for
            what it leaves).

    Returns:
        `KroneckerSum`, largest term first for the SVD methods, KFAC's first for "kfac_corrected".

    Raises:
        ValueError: an unknown method, or shapes that do not match.
    """
    check_method(method)
    activations, gradients = _as_samples(activations, gradients)
    return KroneckerSum(approximate_terms(activations, gradients, method, symmetric=False))


def exact_fisher(activations: Any, gradients: Any) -> tf.Tensor:
    """The dense Fisher block `F = E_n[vec(D_n) vec(D_n)ᵀ]`, for layers small enough to hold it.

    Args:
        activations: as `approximate_fisher`.
        gradients: as `approximate_fisher`.

    Returns:
        `[d_in·d_out, d_in·d_out]`, row-major as Keras flattens kernels, in the dtype of the samples.

    Raises:
        ValueError: shapes that do not match.
    """
    activations, gradients = _as_samples(activations, gradients)
    per_example = tf.matmul(activations, gradients, transpose_a=True)
    flat = tf.reshape(per_example, [-1, activations.shape[-1] * gradients.shape[-1]])
    return tf.matmul(flat, flat, transpose_a=True) / tf.cast(tf.shape(flat)[0], flat.dtype)


def _as_samples(activations: Any, gradients: Any) -> Pair:
    """Both as tensors `[batch, shared, features]` of one floating dtype."""
    converted = []
    for value in (activations, gradients):
        tensor = tf.convert_to_tensor(value)
        if tensor.dtype not in (tf.float32, tf.float64):
            tensor = tf.cast(tensor, tf.float32)
        converted.append(tensor)
    a, g = converted
    shapes = f"activations of shape {tuple(a.shape)} and gradients of shape {tuple(g.shape)}"
    if a.shape.rank not in (2, 3) or g.shape.rank != a.shape.rank:
        raise ValueError(
            "`activations` and `gradients` must both be [batch, features] or both [batch, shared, features]. "
            f"Received: {shapes}"
        )
    if not a.shape[:-1].is_compatible_with(g.shape[:-1]):
        raise ValueError(f"`activations` and `gradients` must agree in all axes but the last. Received: {shapes}")
    if 0 in np.array(a.shape.as_list() + g.shape.as_list(), dtype=object):
        raise ValueError(f"`activations` and `gradients` must not be empty. Received: {shapes}")
    if a.dtype != g.dtype:
        a, g = tf.cast(a, tf.float64), tf.cast(g, tf.float64)
    if a.shape.rank == 2:
        a, g = a[:, None, :], g[:, None, :]
    return a, g
