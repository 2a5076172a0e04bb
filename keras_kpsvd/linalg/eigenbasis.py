"""A Fisher block by its diagonal in the eigenbasis of Kronecker factors (George et al. 2018, arXiv:1806.03884).

With `U_A`, `U_G` orthonormal eigenvectors of the two factors, `A ⊗ G` has the eigenvalues `e_A e_Gᵀ`. The block itself
has in that basis the diagonal

    S_ij = E_n[(u_iᵀ D_n v_j)²],   D_n = Σ_t ā_{n,t} g_{n,t}ᵀ,

and `(U_A ⊗ U_G) diag(S) (U_A ⊗ U_G)ᵀ` is the nearest matrix to the block, in Frobenius norm, that this basis makes
diagonal: nearer than `A ⊗ G`. It takes no more to apply.

Of a large factor the basis holds the leading eigenvectors only. All directions that are left share one row of `S` (of
the other factor: one column), their mean, so that traces are kept. A basis without such a tail is square.
"""

from __future__ import annotations

import tensorflow as tf

from .decompositions import eigh
from .scaling import all_finite, divide_no_nan, size_of
from .truncated import leading_eigenpairs


def is_complete(basis: tf.Tensor) -> bool:
    """Whether `basis [d, k]` spans everything: there is no tail."""
    return basis.shape[0] == basis.shape[1]


def left_over(basis: tf.Tensor) -> tf.Tensor:
    """How many directions the tail has."""
    return tf.cast(size_of(basis, 0) - size_of(basis, 1), basis.dtype)


def factor_eigenbasis(matrix: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Eigenvalues and eigenvectors of a positive semi-definite factor.

    Args:
        matrix: `[d, d]`, symmetric; negative eigenvalues, which are rounding, count as zero.
        start: `[d, k]`; square for all eigenvectors, else the last basis or zeros, as `leading_eigenpairs` takes it.

    Returns:
        `(values [k], basis [d, k])`, ascending, the basis orthonormal; with a tail its mean eigenvalue comes last of
        `k + 1` values. NaN where the input is not finite or the decomposition fails.
    """
    if not is_complete(start):
        values, basis = leading_eigenpairs(matrix, start)
        values = tf.maximum(values, 0)
        left = tf.maximum(tf.linalg.trace(matrix) - tf.reduce_sum(values), 0) / left_over(basis)
        return tf.concat([values, left[tf.newaxis]], 0), basis
    finite = all_finite(matrix)
    values, basis = eigh(tf.where(finite, matrix, tf.zeros_like(matrix)))
    nan = tf.constant(float("nan"), matrix.dtype)
    return tf.where(finite, tf.maximum(values, 0), nan), tf.where(finite, tf.ensure_shape(basis, start.shape), nan)


def multiplicities(basis: tf.Tensor) -> tf.Tensor:
    """For how many directions each row of `S` stands, `[k]`, or `[k + 1]` with the tail's."""
    ones = tf.ones([size_of(basis, 1)], basis.dtype)
    return ones if is_complete(basis) else tf.concat([ones, left_over(basis)[tf.newaxis]], 0)


def length_kurtosis(squares: tf.Tensor, repeats: int = 1) -> tf.Tensor:
    """`E_n[‖D_n‖⁴] / E_n[‖D_n‖²]²`: 1 where a mean of `‖D_n‖²` rests on all of `N` examples alike, `N` where on one.

    Its inverse is the part of the examples that it rests on (Kish's effective sample size, 1965, §11.7).

    Args:
        squares: `‖D_n‖²`, `[repeats · N]`.
        repeats: how often there is one of every example, all once before any twice; they add up.

    Returns:
        Scalar; 0 where all squares are zero.
    """
    squares = tf.reduce_sum(tf.reshape(squares, [repeats, -1]), 0)
    squares = divide_no_nan(squares, tf.reduce_max(squares))  # Their own squares leave float32's range.
    count = tf.cast(tf.size(squares), squares.dtype)
    return divide_no_nan(count * tf.reduce_sum(tf.square(squares)), tf.square(tf.reduce_sum(squares)))


def directions_left_free(diagonal: tf.Tensor, damping: tf.Tensor, a_basis: tf.Tensor, g_basis: tf.Tensor) -> tf.Tensor:
    """`tr F̂ (F̂ + λI)⁻¹`, the number of directions in which λ damps little (MacKay 1992's effective parameters)."""
    parts = divide_no_nan(diagonal, diagonal + damping)
    return tf.tensordot(multiplicities(a_basis), tf.linalg.matvec(parts, multiplicities(g_basis)), 1)


def damped_diagonal(
    diagonal: tf.Tensor,
    a_values: tf.Tensor,
    g_values: tf.Tensor,
    damping: tf.Tensor,
    factor_dampings: tuple[tf.Tensor, tf.Tensor],
    factored: tf.Tensor | float,
) -> tf.Tensor:
    """`S` with λ, and with that part of what damping the factors would add to `e_A e_Gᵀ`.

    Args:
        diagonal: `S`.
        a_values: `e_A`, a value for each row of `S`.
        g_values: `e_G`, for each column.
        damping: λ.
        factor_dampings: `(λ_A, λ_G)`, see `factor_damping`.
        factored: `φ` in [0, 1].

    Returns:
        `S + (1 − φ) λ + φ ((e_A + λ_A)(e_G + λ_G)ᵀ − e_A e_Gᵀ)`, in the form of `S`.
    """
    lam_a, lam_g = factor_dampings
    added = lam_g * a_values[:, tf.newaxis] + lam_a * g_values + lam_a * lam_g
    return diagonal + (1 - factored) * damping + factored * added


def diagonal_of_samples(
    activations: tf.Tensor, gradients: tf.Tensor, a_basis: tf.Tensor, g_basis: tf.Tensor
) -> tf.Tensor:
    """`S` of samples.

    Args:
        activations: `ā [batch, shared, d_in]`.
        gradients: `g [batch, shared, d_out]`.
        a_basis: `U_A [d_in, k_A]`.
        g_basis: `U_G [d_out, k_G]`.

    Returns:
        `[k_A, k_G]`, with one row more where `U_A` has a tail and one column more where `U_G` has; not negative.
    """
    if activations.shape[1] == 1:
        # D_n is āgᵀ: a product of squares.
        sides = [
            _squares_and_tail(tf.squeeze(values, 1), basis)
            for values, basis in ((activations, a_basis), (gradients, g_basis))
        ]
        count = tf.cast(tf.maximum(tf.shape(activations)[0], 1), activations.dtype)
        return tf.matmul(*sides, transpose_a=True) / count
    a_inner, g_inner = tf.matmul(activations, a_basis), tf.matmul(gradients, g_basis)
    rows = tf.matmul(a_inner, gradients, transpose_a=True)  # U_Aᵀ D_n
    columns = tf.matmul(activations, g_inner, transpose_a=True)  # D_n U_G
    grams = [tf.matmul(values, values, transpose_b=True) for values in (activations, gradients)]
    inside = tf.matmul(a_inner, g_inner, transpose_a=True)
    count = tf.shape(activations)[0]
    total = tf.reduce_sum(grams[0] * grams[1])
    return _with_tails(inside, rows, columns, total, count, a_basis, g_basis, batch_axis=0)


def diagonal_of_weight_gradients(weight_gradients: tf.Tensor, a_basis: tf.Tensor, g_basis: tf.Tensor) -> tf.Tensor:
    """`S` of per-example gradients `D_n`.

    Args:
        weight_gradients: `[d_in, batch, d_out]`.
        a_basis: as `diagonal_of_samples`.
        g_basis: likewise.
    """
    rows = tf.tensordot(a_basis, weight_gradients, [[0], [0]])  # [k_A, batch, d_out]
    columns = tf.tensordot(weight_gradients, g_basis, [[2], [0]])  # [d_in, batch, k_G]
    inside = tf.tensordot(rows, g_basis, [[2], [0]])
    count, total = tf.shape(weight_gradients)[1], tf.reduce_sum(tf.square(weight_gradients))
    return _with_tails(inside, rows, columns, total, count, a_basis, g_basis, batch_axis=1)


def transported(diagonal: tf.Tensor, old: tuple[tf.Tensor, tf.Tensor], new: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """The diagonal in a new basis of the matrix that is diagonal in the old one.

    Args:
        diagonal: `S` in the old basis.
        old: `(U_A, U_G)`.
        new: likewise, of the same shapes.

    Returns:
        `S` in the new basis; the trace is the same.
    """
    (a_old, g_old), (a_new, g_new) = old, new
    return tf.matmul(_overlaps(a_new, a_old), tf.matmul(diagonal, _overlaps(g_new, g_old), transpose_b=True))


def apply_diagonal(a_basis: tf.Tensor, g_basis: tf.Tensor, values: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """`(U_A ⊗ U_G) diag(values) (U_A ⊗ U_G)ᵀ vec(matrix)`, tails included.

    Args:
        a_basis: `U_A [d_in, k_A]`.
        g_basis: `U_G [d_out, k_G]`.
        values: in the form of `S`.
        matrix: `[d_in, d_out]`.

    Returns:
        `[d_in, d_out]`.
    """
    if is_complete(g_basis):
        turned = _apply_on_the_left(a_basis, values, tf.matmul(matrix, g_basis))
        return tf.matmul(turned, g_basis, transpose_b=True)
    if is_complete(a_basis):
        return tf.transpose(apply_diagonal(g_basis, a_basis, tf.transpose(values), tf.transpose(matrix)))
    both, right, below, corner = values[:-1, :-1], values[:-1, -1:], values[-1:, :-1], values[-1, -1]
    rows, columns = tf.matmul(a_basis, matrix, transpose_a=True), tf.matmul(matrix, g_basis)
    inside = (both - right - below + corner) * tf.matmul(rows, g_basis)
    left = (right - corner) * rows + tf.matmul(inside, g_basis, transpose_b=True)
    outside = corner * matrix + tf.matmul((below - corner) * columns, g_basis, transpose_b=True)
    return outside + tf.matmul(a_basis, left)


def _apply_on_the_left(basis: tf.Tensor, values: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """The same where `matrix` is in the whole basis of the other side; each column of `values` belongs to one of it."""
    inside = tf.matmul(basis, matrix, transpose_a=True)
    if is_complete(basis):
        return tf.matmul(basis, values * inside)
    return values[-1:] * matrix + tf.matmul(basis, (values[:-1] - values[-1:]) * inside)


def _squares_and_tail(rows: tf.Tensor, basis: tf.Tensor) -> tf.Tensor:
    """`(u_iᵀ x)²` of each row `x`, and what is left of `‖x‖²` over the number of other directions."""
    squares = tf.square(tf.matmul(rows, basis))
    if is_complete(basis):
        return squares
    left = tf.reduce_sum(tf.square(rows), 1, keepdims=True) - tf.reduce_sum(squares, 1, keepdims=True)
    return tf.concat([squares, tf.maximum(left, 0) / left_over(basis)], 1)


def _with_tails(
    inside: tf.Tensor,
    rows: tf.Tensor,
    columns: tf.Tensor,
    total: tf.Tensor,
    count: tf.Tensor,
    a_basis: tf.Tensor,
    g_basis: tf.Tensor,
    *,
    batch_axis: int,
) -> tf.Tensor:
    """`S` from `U_Aᵀ D_n U_G`, `U_Aᵀ D_n`, `D_n U_G` and `Σ_n ‖D_n‖²`; which axis the batch is of the first three."""
    inside = tf.reduce_sum(tf.square(inside), batch_axis)
    row, column = tf.reduce_sum(tf.square(rows), [batch_axis, 2]), tf.reduce_sum(tf.square(columns), [0, 1])
    left_in_rows = row - tf.reduce_sum(inside, 1)
    left_in_columns = column - tf.reduce_sum(inside, 0)
    corner = total - tf.reduce_sum(row) - tf.reduce_sum(left_in_columns)
    values = inside
    if not is_complete(g_basis):
        values = tf.concat([values, left_in_rows[:, tf.newaxis] / left_over(g_basis)], 1)
    if not is_complete(a_basis):
        below = left_in_columns[tf.newaxis]
        if not is_complete(g_basis):
            below = tf.concat([below, tf.reshape(corner / left_over(g_basis), [1, 1])], 1)
        values = tf.concat([values, below / left_over(a_basis)], 0)
    return tf.maximum(values, 0) / tf.cast(tf.maximum(count, 1), values.dtype)


def _overlaps(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """How much of each old direction is in each new one, `[k, k]` with a row and a column for the tails."""
    squares = tf.square(tf.matmul(new, old, transpose_a=True))
    if is_complete(new):
        return squares
    left = left_over(new)
    right = tf.maximum(1 - tf.reduce_sum(squares, 1, keepdims=True), 0)
    below = tf.maximum(1 - tf.reduce_sum(squares, 0, keepdims=True), 0) / left
    corner = 1 - tf.reduce_sum(below, 1, keepdims=True)
    return tf.concat([tf.concat([squares, right], 1), tf.concat([below, corner], 1)], 0)
