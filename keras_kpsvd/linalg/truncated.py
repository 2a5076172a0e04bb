"""Inverses of large damped factors from their leading eigenpairs.

A factor of `d` rows is taken to be `U diag(e) Uᵀ + t (I − U Uᵀ)`, with its `k` leading eigenpairs and the mean `t` of
the eigenvalues that are left, so that its trace is kept. Then

    (A + λI)⁻¹ = 1/(t + λ) I + U diag(1/(e + λ) − 1/(t + λ)) Uᵀ,

found in `O(k d²)` and applied to `m` columns in `O(k d m)` operations, where a dense inverse takes `O(d³)` and
`O(d² m)`. It is positive definite for every `U` with orthonormal columns: a subspace that has not converged makes the
inverse less sharp, never wrong in sign.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from .decompositions import eigh
from .scaling import all_finite, as_scalar, divide_no_nan, size_of

# Steps of subspace iteration from nothing and from the last basis. Averages move slowly: successive steps add up.
COLD_STEPS, WARM_STEPS = 6, 1


class TruncatedInverse(NamedTuple):
    """`shift · I + basis diag(weights) basisᵀ`, symmetric positive definite.

    Attributes:
        basis: `U [d, k]`, orthonormal columns.
        weights: `1/(e + λ) − shift`, `[k]`.
        shift: `1/(t + λ)`, scalar, positive.
    """

    basis: tf.Tensor
    weights: tf.Tensor
    shift: tf.Tensor

    def times(self, columns: tf.Tensor) -> tf.Tensor:
        """The inverse times `columns [d, m]`."""
        inner = tf.matmul(self.basis, columns, transpose_a=True)
        return self.shift * columns + tf.matmul(self.basis, self.weights[:, tf.newaxis] * inner)

    def times_transposed(self, rows: tf.Tensor) -> tf.Tensor:
        """`rows [m, d]` times the inverse."""
        inner = tf.matmul(rows, self.basis)
        return self.shift * rows + tf.matmul(inner * self.weights, self.basis, transpose_b=True)

    def root(self) -> TruncatedInverse:
        """Its symmetric square root."""
        return self._mapped(tf.sqrt)

    def inverse(self) -> TruncatedInverse:
        """The damped factor itself, `A + λI` as far as `U` and `t` tell."""
        return self._mapped(tf.math.reciprocal)

    def _mapped(self, function) -> TruncatedInverse:
        shift = function(self.shift)
        return TruncatedInverse(self.basis, function(self.shift + self.weights) - shift, shift)


def truncated_inverse(matrix: tf.Tensor, damping: float | tf.Tensor, start: tf.Tensor) -> TruncatedInverse:
    """The inverse of `matrix + damping · I` from the leading eigenpairs and a constant tail.

    Args:
        matrix: `[d, d]`, symmetric positive semi-definite up to rounding; negative Ritz values count as zero.
        damping: λ, non-negative scalar.
        start: `[d, k]`, the basis of the last call, zeros for none; see `leading_eigenpairs`.

    Returns:
        NaN where the input is not finite, infinite where tail and λ are both zero.
    """
    damping = as_scalar(damping, matrix.dtype)
    values, basis = leading_eigenpairs(matrix, start)
    values = tf.maximum(values, 0)
    left = tf.maximum(tf.linalg.trace(matrix) - tf.reduce_sum(values), 0)
    others = tf.maximum(size_of(matrix, -1) - size_of(start, -1), 1)
    tail = left / tf.cast(others, left.dtype)
    shift = 1 / (tail + damping)
    return TruncatedInverse(basis, 1 / (values + damping) - shift, shift)


def leading_eigenpairs(matrix: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Subspace iteration with Rayleigh–Ritz (Golub & Van Loan, section 8.2.4) for a symmetric matrix.

    Args:
        matrix: `[d, d]`, symmetric.
        start: `[d, k]`, orthonormal columns near the leading eigenvectors, from which `WARM_STEPS` are made, or zeros
            for `COLD_STEPS` from a fixed random start.

    Returns:
        `(values [k], vectors [d, k])`, ascending, the vectors orthonormal; the values are Rayleigh quotients, whose
        error is quadratic in that of the subspace. NaN where the input is not finite.
    """
    dtype = matrix.dtype
    finite = all_finite(matrix, start)
    # In units of the largest entry, so that no square overflows.
    largest = tf.where(finite, tf.reduce_max(tf.abs(matrix)), 0)
    safe = tf.where(finite, matrix, tf.zeros_like(matrix))
    known = finite & tf.reduce_any(start != 0)
    columns = tf.where(known, start, tf.random.stateless_normal(tf.shape(start), [1993, 2023], dtype=dtype))

    def step(index, columns):
        image = divide_no_nan(tf.matmul(safe, columns), largest)
        return index + 1, tf.ensure_shape(tf.linalg.qr(image).q, start.shape)

    steps = tf.where(known, WARM_STEPS, COLD_STEPS)
    _, columns = tf.while_loop(lambda index, _: index < steps, step, (0, columns))
    small = divide_no_nan(tf.matmul(columns, tf.matmul(safe, columns), transpose_a=True), largest)
    values, vectors = eigh(0.5 * (small + tf.transpose(small)))
    nan = tf.constant(float("nan"), dtype)
    return tf.where(finite, values * largest, nan), tf.where(finite, tf.matmul(columns, vectors), nan)
