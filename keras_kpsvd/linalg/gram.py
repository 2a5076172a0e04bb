"""Leading triples of `R(F)` from `N × N` Gram matrices: exact, and cheaper than power iterations.

With one position per example, `R(F) = (1/N) 𝒜ᵀ 𝒢`, the rows of 𝒜 and 𝒢 being `vec(a_n a_nᵀ)` and `vec(g_n g_nᵀ)`. All
singular vectors lie in the spans of these rows, so the problem has `N` dimensions rather than `d_in² × d_out²`, and the
products of rows are squares of products of samples: `𝒜𝒜ᵀ = (a aᵀ)∘(a aᵀ)`. Here, with unit rows `â_n`, `ĝ_n`,

    R(F) − Σ_i vec(A_i) vec(G_i)ᵀ = 𝒜̂ᵀ W 𝒢̂,     W = diag(‖a_n‖²‖g_n‖²)/N − Σ_i x_i y_iᵀ,

where `A_i = Σ_n x_{i,n} â_n â_nᵀ` and `G_i = Σ_n y_{i,n} ĝ_n ĝ_nᵀ`: what is subtracted (KFAC's own `A ⊗ G` for example)
only changes `W`. With `C_A C_Aᵀ = 𝒜̂𝒜̂ᵀ`, `C_G C_Gᵀ = 𝒢̂𝒢̂ᵀ`, the singular values are those of `M = C_Aᵀ W C_G`; from
its vectors `x`, `y` come the factors `u = âᵀ diag(α) â`, `α = W C_G y/σ`, and `v = ĝᵀ diag(β) ĝ`, `β = Wᵀ C_A x/σ`.
Nothing is inverted.

Accuracy. Unit rows make the problem free of scale: the entries of the Gram matrices are at most one and `σ₁` is at
least the largest `|W_nn|` when nothing is subtracted. A Gram matrix squares the conditioning of its rows, so what it is
factored from resolves `σ/σ₁` only down to the root of the rounding unit. Therefore:

- The `N × N` algebra runs in float64 for float32 samples too (at N=128 an `eigh` takes 1.2 ms against 0.8 ms in
  float32, where the factors take 6 ms): its floor, about 1e-6, is then near the rounding of the samples.
- Where the rows of 𝒜̂ are short they are their own `C_A`: the half-vectorisation, `d(d+1)/2` wide, off-diagonal entries
  times √2. Nothing is squared.
- For float64 samples with longer rows `C` comes from `eigh`, less the directions below rounding, and `M` gets a full
  SVD. Components of the samples' products below about `1e-8 √N` of the largest are not resolved there.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from .decompositions import eigh
from .rearrangement import SubtractedTerm
from .scaling import all_finite, divide_no_nan, safe_norm, size_of, unit_rows
from .triples import CONVERGED, NOT_FINITE, SingularTriples, epsilon, fix_signs

# For float64 samples, half-vectorised rows up to this many times the batch, or of this width, are taken as they are
# (through a QR) rather than through their Gram matrix: dearer, but nothing is squared.
_LONGEST_EXACT_ROW = 4
_WIDEST_EXACT_ROW = 1024
# Half-vectorised rows longer than this are never taken, whatever the batch: with the batch size unknown, both ways are
# traced, and the index of the longer rows would fill the graph.
_LONGEST_INDEX = 2048


class GramSystem(NamedTuple):
    """The triples' problem in `N + r` dimensions, r the number of subtracted terms known only as matrices.

    Attributes:
        activation_rows: `â`, `[N, d_in]`, unit or zero rows, the samples' dtype.
        gradient_rows: `ĝ`, `[N, d_out]`.
        extra_left: `[r, d_in, d_in]`, unit Frobenius norm: further rows of 𝒜̂; likewise
        extra_right: `[r, d_out, d_out]`, of 𝒢̂.
        weights: `W / scale`, `[N+r, N+r]`, float64.
        scale: float64 scalar, the unit of `weights`.
        whole: the diagonal of `W / scale` before anything was subtracted, `[N]`; None where nothing was.
    """

    activation_rows: tf.Tensor
    gradient_rows: tf.Tensor
    extra_left: tf.Tensor
    extra_right: tf.Tensor
    weights: tf.Tensor
    scale: tf.Tensor
    whole: tf.Tensor | None = None


def row_gram(rows: tf.Tensor, extra: tf.Tensor | None = None) -> tf.Tensor:
    """Inner products of the rows `vec(r_n r_nᵀ)`: the entrywise square of `r rᵀ`.

    Args:
        rows: `[N, d]`.
        extra: `[r, d, d]`, symmetric matrices that count as further rows, or None.

    Returns:
        `[N, N]`, or `[N+r, N+r]`, in the dtype of `rows`.
    """
    gram = tf.square(tf.matmul(rows, rows, transpose_b=True))
    if extra is None or extra.shape[0] == 0:
        return gram
    mixed = tf.stack([tf.reduce_sum(tf.matmul(rows, matrix) * rows, axis=1) for matrix in tf.unstack(extra)], axis=1)
    flat = tf.reshape(extra, [extra.shape[0], -1])
    corner = tf.matmul(flat, flat, transpose_b=True)
    return tf.concat([tf.concat([gram, mixed], axis=1), tf.concat([tf.transpose(mixed), corner], axis=1)], axis=0)


def weighted_outer_products(rows: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """`Σ_n c_{n,i} r_n r_nᵀ` for each column `c_i`.

    Args:
        rows: `[N, d]`.
        coefficients: `[N, k]`, k known statically.

    Returns:
        `[k, d, d]`. The largest intermediate is the rows, k times.
    """
    d, k = size_of(rows, 1), coefficients.shape[1]
    # All columns in one product: [N, k, d] against [N, d].
    weighted = coefficients[:, :, tf.newaxis] * rows[:, tf.newaxis, :]
    return tf.reshape(tf.matmul(tf.reshape(weighted, [-1, k * d]), rows, transpose_a=True), [k, d, d])


def gram_triples(
    activations: tf.Tensor,
    gradients: tf.Tensor,
    k: int = 1,
    *,
    subtracted: tuple[SubtractedTerm, ...] = (),
) -> SingularTriples:
    """The `k` leading singular triples of `R(F) − Σ_i vec(A_i) vec(G_i)ᵀ`, one position per example.

    All k come from one decomposition: the second costs no more than forming its two factors.

    Args:
        activations: `[N, d_in]`, float32 or float64. `N` may be unknown statically.
        gradients: `[N, d_out]`, same dtype.
        k: How many triples. Those beyond the rank are zero.
        subtracted: Terms taken off. Terms with coefficients cost nothing of size `d²`; terms known as symmetric
            matrices only cost one more product with the samples each, in float64.

    Returns:
        `SingularTriples` with symmetric factors, in the samples' dtype. Their residuals are measured in the
        N-dimensional representation, not with the factors as rounded to the samples' dtype. Non-finite input gives
        zeros and the status `NOT_FINITE`.

    Not guaranteed: `σ` below about 1e-6 `σ₁` (float32), 1e-13 `σ₁` (float64 with short rows), 1e-8 `√N σ₁`
    (float64 with more than 44 features and half-vectorised rows longer than four times the batch) is not resolved, and
    returned as zero where it is noise; `σ₁` is `‖F‖_F` where that is larger, as it is where the subtracted terms leave
    little.
    """
    dtype = activations.dtype
    tensors = [part for term in subtracted for part in term if part is not None]
    finite = all_finite(activations, gradients, *tensors)

    def keep(tensor):
        return None if tensor is None else tf.where(finite, tensor, tf.zeros_like(tensor))

    subtracted = tuple(SubtractedTerm(*(keep(part) for part in term)) for term in subtracted)
    system = gram_system(keep(activations), keep(gradients), subtracted)
    values, alphas, betas, residuals = _solve(system, k, dtype)
    # Norm and the usual sign are settled in the coefficients: at N=128 passes over [d_in, d_in] are a good part of all.
    traces = _traces(system.activation_rows, system.extra_left, alphas)
    signs = tf.where(traces < 0, -tf.ones_like(traces), tf.ones_like(traces))
    left = _assemble(system.activation_rows, system.extra_left, signs * alphas)
    right = _assemble(system.gradient_rows, system.extra_right, signs * betas)
    left, right = tf.cond(
        tf.reduce_any(tf.abs(traces) <= 2 * epsilon(dtype) ** 0.5),
        lambda: fix_signs(left, right),  # by the largest entry, where there is no trace to speak of
        lambda: (left, right),
    )
    values = tf.cast(values * system.scale, dtype)
    status = tf.where(finite, CONVERGED, NOT_FINITE)
    return SingularTriples(values, left, right, tf.cast(residuals, dtype), status, tf.constant(0))


def gram_system(
    activations: tf.Tensor, gradients: tf.Tensor, subtracted: tuple[SubtractedTerm, ...] = ()
) -> GramSystem:
    """Unit rows and weights of the N-dimensional problem; arguments as in `gram_triples`, finite."""
    activation_rows, activation_lengths = unit_rows(activations)
    gradient_rows, gradient_lengths = unit_rows(gradients)
    activation_lengths = tf.cast(activation_lengths, tf.float64)
    gradient_lengths = tf.cast(gradient_lengths, tf.float64)
    count = tf.cast(tf.shape(activations)[0], tf.float64)
    # float64 has the range for squares of float32 lengths; float64 lengths stay within 1e±75 (a stated bound).
    diagonal = tf.square(activation_lengths) * tf.square(gradient_lengths) / count
    in_span, extra = [], []
    for term in subtracted:
        if term.left_coefficients is None or term.right_coefficients is None:
            extra.append(term)
        else:
            in_span.append(term)
    weights = tf.linalg.diag(diagonal)
    for term in in_span:
        x = tf.cast(term.left_coefficients, tf.float64) * tf.square(activation_lengths)
        y = tf.cast(term.right_coefficients, tf.float64) * tf.square(gradient_lengths)
        weights -= x[:, tf.newaxis] * y[tf.newaxis, :]
    norms = [(safe_norm(term.left), safe_norm(term.right)) for term in extra]
    if extra:
        corner = tf.linalg.diag(tf.stack([-tf.cast(a, tf.float64) * tf.cast(g, tf.float64) for a, g in norms]))
        weights = tf.linalg.LinearOperatorBlockDiag(
            [tf.linalg.LinearOperatorFullMatrix(weights), tf.linalg.LinearOperatorFullMatrix(corner)]
        ).to_dense()
    extra_left = [divide_no_nan(term.left, a) for term, (a, _) in zip(extra, norms, strict=True)]
    extra_right = [divide_no_nan(term.right, g) for term, (_, g) in zip(extra, norms, strict=True)]
    largest = tf.reduce_max(tf.abs(weights))
    scale = tf.where(largest > 0, largest, tf.ones_like(largest))
    d_in, d_out = size_of(activations, 1), size_of(gradients, 1)
    return GramSystem(
        activation_rows,
        gradient_rows,
        tf.stack(extra_left) if extra else tf.zeros([0, d_in, d_in], activations.dtype),
        tf.stack(extra_right) if extra else tf.zeros([0, d_out, d_out], activations.dtype),
        weights / scale,
        scale,
        diagonal / scale if subtracted else None,
    )


def _solve(system: GramSystem, k: int, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Values `[k]` in units of the system's scale, coefficients `[N+r, k]` of unit u and v, residuals `[k, 2]`."""
    weights = system.weights
    factor_left = _row_factor(system.activation_rows, system.extra_left, dtype)
    factor_right = _row_factor(system.gradient_rows, system.extra_right, dtype)
    core = tf.matmul(factor_left, tf.matmul(weights, factor_right), transpose_a=True)
    y, floor = _right_singular_vectors(core, k, dtype)
    moved = tf.matmul(core, y)
    values = tf.norm(moved, axis=0)
    x = divide_no_nan(moved, values)
    # Below the floor singular vectors are noise, no longer orthogonal to the first: adding them would raise the error.
    # Where the subtracted terms leave nothing all of it is noise, which only the size of the whole can tell.
    size = values[0]
    if system.whole is not None:
        rows = tf.shape(system.whole)[0]
        whole = tf.matmul(factor_left[:rows], system.whole[:, tf.newaxis] * factor_right[:rows], transpose_a=True)
        size = tf.maximum(size, tf.norm(whole))
    values = tf.where(values > floor * size, values, tf.zeros_like(values))
    alphas = divide_no_nan(tf.matmul(weights, tf.matmul(factor_right, y)), values)
    betas = divide_no_nan(tf.matmul(weights, tf.matmul(factor_left, x), transpose_a=True), values)
    # Norms and products of vectors through C, not through C Cᵀ: coefficients grow like 1/σ and cancel.
    left, right = tf.matmul(factor_left, alphas, transpose_a=True), tf.matmul(factor_right, betas, transpose_a=True)
    left_error = tf.matmul(core, right) - values * left
    right_error = tf.matmul(core, left, transpose_a=True) - values * right
    residuals = tf.stack([tf.norm(left_error, axis=0), tf.norm(right_error, axis=0)], axis=1)
    residuals = divide_no_nan(residuals, values[0])
    # The Rayleigh quotient of the vectors as they are: with it no term, however poor, adds to the error. One above the
    # singular value itself tells of a small vector swamped by rounding along the first: that must not count twice.
    lengths = tf.norm(left, axis=0) * tf.norm(right, axis=0)
    quotients = divide_no_nan(tf.reduce_sum(left * tf.matmul(core, right), axis=0), lengths)
    values = tf.clip_by_value(quotients, 0, values)
    alphas = divide_no_nan(alphas, tf.norm(left, axis=0))
    betas = divide_no_nan(betas, tf.norm(right, axis=0))
    return values, alphas, betas, residuals


def _row_factor(rows: tf.Tensor, extra: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`C`, `[N+r, p]`, with `C Cᵀ` the rows' Gram matrix, float64."""
    rows, extra = tf.cast(rows, tf.float64), tf.cast(extra, tf.float64)
    features = size_of(rows, 1)
    width = features * (features + 1) // 2
    gram = row_gram(rows, extra)
    squared = _eigen_factor if dtype == tf.float64 or extra.shape[0] else _jittered_cholesky
    if not tf.is_tensor(features) and width > _LONGEST_INDEX:
        return squared(gram)
    count = size_of(gram, 0)

    def exact():
        return _half_vectorised(rows, extra)

    def reduced():
        return tf.transpose(tf.linalg.qr(tf.transpose(exact())).r)

    def longer():
        if dtype != tf.float64:
            return squared(gram)
        return _choose(
            (width <= _WIDEST_EXACT_ROW) | (width <= _LONGEST_EXACT_ROW * count), reduced, lambda: squared(gram)
        )

    return _choose(width <= count, exact, longer)


def _choose(condition: bool | tf.Tensor, if_true, if_false) -> tf.Tensor:
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return tf.cond(condition, if_true, if_false)


def _half_vectorised(rows: tf.Tensor, extra: tf.Tensor) -> tf.Tensor:
    """`[N+r, d(d+1)/2]`: upper triangles of `r_n r_nᵀ` and of the extra rows, off-diagonal entries times √2."""
    d = size_of(rows, 1)
    if tf.is_tensor(d):
        first, second = tf.unstack(tf.where(tf.range(d)[:, tf.newaxis] <= tf.range(d)), axis=1)
        factors = tf.where(first == second, tf.constant(1.0, rows.dtype), tf.constant(2.0**0.5, rows.dtype))
        d = tf.cast(d, first.dtype)
    else:
        first, second = np.triu_indices(d)
        factors = np.where(first == second, 1.0, 2.0**0.5)
    halves = tf.gather(rows, first, axis=1) * tf.gather(rows, second, axis=1) * factors
    if extra.shape[0] == 0:
        return halves
    more = tf.gather(tf.reshape(extra, [extra.shape[0], d * d]), first * d + second, axis=1) * factors
    return tf.concat([halves, more], axis=0)


def _jitter(gram: tf.Tensor) -> tf.Tensor:
    """What makes a positive semi-definite matrix with unit diagonal safe to factor: ten rounding units per row."""
    return 10 * epsilon(tf.float64) * tf.cast(tf.shape(gram)[0], tf.float64)


def _jittered_cholesky(gram: tf.Tensor) -> tf.Tensor:
    # Zero rows of the samples have a zero diagonal: the jitter alone then, decoupled from all others.
    return tf.linalg.cholesky(tf.linalg.set_diag(gram, tf.linalg.diag_part(gram) + _jitter(gram)))


def _eigen_factor(gram: tf.Tensor) -> tf.Tensor:
    eigenvalues, vectors = eigh(gram)
    kept = tf.where(eigenvalues > _jitter(gram) * eigenvalues[-1], eigenvalues, tf.zeros_like(eigenvalues))
    return vectors * tf.sqrt(kept)


def _right_singular_vectors(core: tf.Tensor, k: int, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The k leading right singular vectors, `[p, k]`, zero where there are none, and the relative noise floor."""
    if dtype == tf.float64:
        # TensorFlow's SVD is slow (5 ms at 128, 110 ms at 512) but keeps all digits.
        _, _, vectors = tf.linalg.svd(core)
        floor = tf.constant(64 * epsilon(tf.float64), tf.float64)
    else:
        vectors = tf.reverse(eigh(tf.matmul(core, core, transpose_a=True))[1], axis=[1])
        size = tf.cast(tf.reduce_max(tf.shape(core)), tf.float64)
        floor = 4 * tf.sqrt(10 * epsilon(tf.float64) * size)
    missing = tf.maximum(k - tf.shape(vectors)[1], 0)
    padded = tf.pad(vectors[:, :k], [[0, 0], [0, missing]])
    return tf.ensure_shape(padded, [None, k]), floor


def _traces(rows: tf.Tensor, extra: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """Traces `[k]` of what `_assemble` gives, float64."""
    lengths = tf.reduce_sum(tf.square(tf.cast(rows, coefficients.dtype)), axis=1)
    own = tf.concat([lengths, tf.cast(tf.linalg.trace(extra), coefficients.dtype)], axis=0)
    return tf.linalg.matvec(coefficients, own, transpose_a=True)


def _assemble(rows: tf.Tensor, extra: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """Exactly symmetric factors `[k, d, d]` from coefficients `[N+r, k]`."""
    halves = tf.cast(0.5 * coefficients, rows.dtype)
    count = tf.shape(rows)[0]
    matrices = weighted_outer_products(rows, halves[:count])
    if extra.shape[0]:
        matrices += tf.einsum("rk,rij->kij", halves[count:], extra)
    return matrices + tf.linalg.matrix_transpose(matrices)
