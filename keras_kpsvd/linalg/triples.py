"""What every route to the leading singular triples returns, and the rules that make it unique."""

from typing import Literal, NamedTuple

import tensorflow as tf

CONVERGED = 0
"""Every residual is within the tolerance."""
NOT_CONVERGED = 1
"""The cap on steps was reached first; the triples are the best found."""
NOT_FINITE = 2
"""The samples held NaN or infinities; the triples are zero."""

Parity = Literal["symmetric", "skew", "any"]
"""The factors searched for. `R(F)` commutes with transposition, so its singular vectors are symmetric or skew pairs."""


class SingularTriples(NamedTuple):
    """Leading singular triples of a rearranged Fisher block, largest first.

    Attributes:
        values: `σ`, `[k]`, non-negative. Zero where the operator has fewer triples than asked for.
        left: `u`, `[k, d_in, d_in]`, each of unit Frobenius norm (zero where `σ` is zero), exactly symmetric or skew.
        right: `v`, `[k, d_out, d_out]`, likewise. Sign: see `fix_signs`.
        residuals: `[k, 2]`, `‖R v − σ u‖` and `‖Rᵀ u − σ v‖`, relative to the largest `σ`, or to the size at which
            rounding sets in where that is larger (subtracted terms that cancel all of `R(F)`).
        status: int32 scalar, `CONVERGED`, `NOT_CONVERGED` or `NOT_FINITE`.
        steps: int32 scalar, products with `R` and `Rᵀ` taken, in pairs (zero for the Gram route).
    """

    values: tf.Tensor
    left: tf.Tensor
    right: tf.Tensor
    residuals: tf.Tensor
    status: tf.Tensor
    steps: tf.Tensor

    def terms(self) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Kronecker terms `(√σ u, √σ v)`: both factors of a term have the same Frobenius norm."""
        roots = tf.sqrt(self.values)[:, tf.newaxis, tf.newaxis]
        return list(zip(tf.unstack(roots * self.left), tf.unstack(roots * self.right), strict=True))


def project(matrix: tf.Tensor, parity: Parity) -> tf.Tensor:
    """The symmetric or skew part of `[..., d, d]` (both are exact in floating point), or the matrix itself."""
    if parity == "any":
        return matrix
    transposed = tf.linalg.matrix_transpose(matrix)
    return 0.5 * (matrix + transposed) if parity == "symmetric" else 0.5 * (matrix - transposed)


def fix_signs(left: tf.Tensor, right: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Flips pairs of factors so that the sign of a term `A ⊗ G` no longer is a matter of chance.

    The left factor's sign is made that of `term_signs`; the right factor follows, so that `A ⊗ G` is unchanged.

    Args:
        left: `[k, d_in, d_in]`.
        right: `[k, d_out, d_out]`.

    Returns:
        The two, flipped where needed.
    """
    signs = term_signs(left, tf.norm(left, axis=[1, 2]))[:, tf.newaxis, tf.newaxis]
    return signs * left, signs * right


def term_signs(left: tf.Tensor, norms: tf.Tensor) -> tf.Tensor:
    """What each left factor is to be multiplied by: the sign rule of this package.

    The trace is made non-negative. When it is negligible, below `√eps` times the factor's norm, as for any skew factor,
    the entry of largest magnitude is made positive (the first such entry, row by row).

    Args:
        left: `[k, d_in, d_in]`.
        norms: Their Frobenius norms, `[k]`.

    Returns:
        `[k]`, each 1 or −1.
    """
    trace = tf.linalg.trace(left)
    negligible = tf.abs(trace) <= epsilon(left.dtype) ** 0.5 * norms

    def by_largest_entry():
        flat = tf.reshape(left, [tf.shape(left)[0], -1])
        largest = tf.gather(flat, tf.argmax(tf.abs(flat), axis=1), batch_dims=1)
        return tf.where(negligible, largest, trace)

    decisive = tf.cond(tf.reduce_any(negligible), by_largest_entry, lambda: trace)
    return tf.where(decisive < 0, -tf.ones_like(decisive), tf.ones_like(decisive))


def epsilon(dtype: tf.DType) -> float:
    """Distance from one to the next number of a floating dtype."""
    return _EPSILON[dtype]


_EPSILON = {tf.float32: 2.0**-23, tf.float64: 2.0**-52}


def default_tolerance(dtype: tf.DType) -> float:
    """Relative residual asked for by default, `eps^(5/8)`: 1.6e-10 in float64, 4.7e-5 in float32.

    The error of a Rayleigh quotient is of second order in the residual, so singular values are good to rounding.
    """
    return epsilon(dtype) ** 0.625


def zero_triples(count: int, d_in: int, d_out: int, dtype: tf.DType) -> SingularTriples:
    """`count` triples of zeros, for padding an operator of small rank."""
    return SingularTriples(
        tf.zeros([count], dtype),
        tf.zeros([count, d_in, d_in], dtype),
        tf.zeros([count, d_out, d_out], dtype),
        tf.zeros([count, 2], dtype),
        tf.constant(CONVERGED),
        tf.constant(0),
    )


def largest_triples(
    count: int, candidates: list[SingularTriples], references: list[tf.Tensor], *, sort: bool = True
) -> SingularTriples:
    """The `count` largest of several sets of triples of one operator; worst status, sum of steps.

    Args:
        count: How many to keep.
        candidates: The sets.
        references: What each set's residuals are relative to. Those of the result are relative to the largest of these.
        sort: By their values; else they are the first `count` in the order given.
    """
    largest = tf.reduce_max(tf.stack(references))
    residuals = [one.residuals * own for one, own in zip(candidates, references, strict=True)]
    values = tf.concat([one.values for one in candidates], axis=0)
    order = tf.argsort(values, direction="DESCENDING", stable=True)[:count] if sort else tf.range(count)

    def pick(parts):
        return tf.ensure_shape(tf.gather(tf.concat(parts, axis=0), order), [count, *parts[0].shape[1:]])

    return SingularTriples(
        pick([one.values for one in candidates]),
        pick([one.left for one in candidates]),
        pick([one.right for one in candidates]),
        tf.math.divide_no_nan(pick(residuals), largest),
        tf.reduce_max(tf.stack([one.status for one in candidates])),
        tf.add_n([one.steps for one in candidates]),
    )
