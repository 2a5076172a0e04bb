"""How a damping λ is split between the two factors of a Kronecker term."""

from typing import Literal, get_args

import tensorflow as tf

from .scaling import as_scalar, divide_no_nan

DampingRule = Literal["sqrt", "factor"]
DAMPING_RULES: tuple[str, ...] = get_args(DampingRule)


def factor_damping(
    A: tf.Tensor, G: tf.Tensor, damping: float | tf.Tensor, rule: DampingRule = "sqrt"
) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits the damping λ into `(λ_A, λ_G)`, to be added to the diagonals of `A` and `G`.

    Rules:
        "sqrt": `λ_A = π √λ`, `λ_G = √λ / π`, `π² = (tr A / d_in) / (tr G / d_out)` (Martens & Grosse 2015, section
            6.3), so that `A_λ ⊗ G_λ` is about `A ⊗ G + λ I`, whatever the free scale `c A ⊗ G/c`. π = 1 when a trace is
            not positive: a dead layer.
        "factor": λ on each. Depends on how the scale is shared between the factors.

    Args:
        A: `[d_in, d_in]`.
        G: `[d_out, d_out]`.
        damping: λ, non-negative number or scalar tensor.
        rule: "sqrt" or "factor".

    Returns:
        Two scalars in the dtype of `A`.

    Raises:
        ValueError: On an unknown rule.
    """
    mean_a, mean_g = (tf.reduce_mean(tf.linalg.diag_part(factor)) for factor in (A, G))
    return split_damping(mean_a, mean_g, damping, rule)


def split_damping(
    mean_a: tf.Tensor, mean_g: tf.Tensor, damping: float | tf.Tensor, rule: DampingRule = "sqrt"
) -> tuple[tf.Tensor, tf.Tensor]:
    """`factor_damping` of factors whose mean eigenvalues are known, scalars."""
    if rule not in DAMPING_RULES:
        raise ValueError(f"`damping_rule` must be 'sqrt' or 'factor'. Received: damping_rule={rule!r}")
    damping = as_scalar(damping, mean_a.dtype)
    if rule == "factor":
        return damping, damping
    usable = (mean_a > 0) & (mean_g > 0)
    one = tf.ones_like(mean_a)
    # Roots before the quotient: the quotient of two traces may leave float32's range.
    pi = tf.where(usable, divide_no_nan(tf.sqrt(tf.maximum(mean_a, 0)), tf.sqrt(tf.maximum(mean_g, 0))), one)
    root = tf.sqrt(damping)
    return pi * root, root / pi


def curvature_moments(A: tf.Tensor, G: tf.Tensor) -> tf.Tensor:
    """How much curvature `F = A ⊗ G` has, and how much of it gradients see.

    Args:
        A: `[d_in, d_in]`, symmetric positive semi-definite.
        G: `[d_out, d_out]`, likewise.

    Returns:
        `(tr F, tr F² / tr F)`, `[2]`. The second is the mean of `gᵀFg / gᵀg` over gradients with `E[ggᵀ] = F`, each
        weighted by its `gᵀg`. Zeros where `F` is zero.
    """
    trace, along = tf.ones([], A.dtype), tf.ones([], A.dtype)
    for factor in (A, G):
        own = tf.linalg.trace(factor)
        trace *= own
        along *= own * tf.reduce_sum(tf.square(divide_no_nan(factor, own)))
    return tf.stack([trace, along])
