"""Damped inverses of one- and two-term Kronecker sums.

A one-term preconditioner is a pair of inverses. For two terms (Martens & Grosse 2015, appendix B), with
`A_λ = A + λ_A I = L_A L_Aᵀ`, `G_λ = G + λ_G I = L_G L_Gᵀ`, the eigendecompositions `L_A⁻¹ P L_A⁻ᵀ = E₁ diag(s₁) E₁ᵀ`,
`L_G⁻¹ Q L_G⁻ᵀ = E₂ diag(s₂) E₂ᵀ`, and `K₁ = L_A⁻ᵀ E₁`, `K₂ = L_G⁻ᵀ E₂`,

    (A_λ ⊗ G_λ + P ⊗ Q)⁻¹ vec(V) = vec(K₁ [(K₁ᵀ V K₂) ⊘ (1 + s₁ s₂ᵀ)] K₂ᵀ).

Cholesky factors serve as well as the symmetric roots of the appendix (they differ by a rotation) and are much cheaper.
P and Q are indefinite, so `x = s₁ s₂ᵀ` may be near or below −1: `apply_two_term` divides by `φ(x) > 0` instead.

Decompositions here are plain TensorFlow operations (XLA's on the CPU are slow); `apply_*` are matrix products, made to
be compiled. Nothing here raises on numbers: what is not finite comes out as NaN, for the caller to test.
"""

from typing import Literal, get_args

import tensorflow as tf

from .decompositions import eigh
from .scaling import all_finite, as_scalar, size_of
from .triples import epsilon
from .truncated import TruncatedInverse, truncated_inverse

# Passes of subspace iteration: the Rayleigh quotients are quadratically better than the subspace they are taken in.
SUBSPACE_STEPS = 3

# Of one damped factor, and where a truncated one starts for either.
Inverse = tf.Tensor | TruncatedInverse
Starts = tuple[tf.Tensor | None, tf.Tensor | None]

IndefiniteRule = Literal["reflect", "absolute"]
INDEFINITE_RULES: tuple[str, ...] = get_args(IndefiniteRule)


def damped_cholesky(matrix: tf.Tensor, damping: float | tf.Tensor) -> tf.Tensor:
    """Lower Cholesky factor of `clip(matrix) + damping · I`, clip setting negative eigenvalues to zero.

    The clipping (through `eigh`) runs only where it is needed: where an eigenvalue is below `−damping / 100`, which a
    second Cholesky factorisation tells. Smaller negative ones are rounding, and move the inverse by one percent of its
    norm at most. Where it runs, eigenvalues are also kept above `4 d eps` times the largest, so that a singular matrix
    without damping has a large but finite inverse.

    Args:
        matrix: `[d, d]`, symmetric, positive semi-definite up to rounding.
        damping: Non-negative scalar.

    Returns:
        `[d, d]`, lower triangular; NaN when the matrix is not finite.
    """
    matrix = tf.convert_to_tensor(matrix)
    d, dtype = size_of(matrix, -1), matrix.dtype
    damping = as_scalar(damping, dtype)
    eye = tf.eye(d, dtype=dtype)
    symmetric = 0.5 * (matrix + tf.transpose(matrix))
    finite = all_finite(symmetric, damping)
    # A factorisation must neither see NaN nor fail for a matrix that will be thrown away.
    safe = tf.where(finite, symmetric, eye)
    damping = tf.where(finite, damping, tf.zeros_like(damping))
    plain = tf.linalg.cholesky(safe + damping * eye)
    # `matrix + damping I` may be definite and yet nearly singular, its smallest eigenvalue being −damping: a huge step.
    semidefinite = all_finite(plain, tf.linalg.cholesky(safe + 0.01 * damping * eye))

    def clipped():
        eigenvalues, vectors = eigh(safe)
        raised = tf.maximum(eigenvalues, 0) + damping
        floor = 4 * epsilon(dtype) * tf.cast(d, dtype) * tf.reduce_max(raised)
        raised = tf.maximum(raised, tf.where(floor > 0, floor, tf.ones_like(floor)))
        return tf.linalg.cholesky(tf.matmul(vectors * raised, vectors, transpose_b=True))

    factor = tf.cond(semidefinite, lambda: plain, clipped)
    return tf.where(finite, factor, tf.fill([d, d], tf.constant(float("nan"), dtype)))


def invert_one_term(
    A: tf.Tensor,
    G: tf.Tensor,
    lam_A: float | tf.Tensor,
    lam_G: float | tf.Tensor,
    starts: Starts = (None, None),
) -> tuple[Inverse, Inverse]:
    """Inverses of `A + λ_A I` and `G + λ_G I`, by Cholesky or truncated.

    Args:
        A: `[d_in, d_in]`, symmetric positive semi-definite up to rounding; see `damped_cholesky` for what is not.
        G: `[d_out, d_out]`, likewise.
        lam_A: λ_A, non-negative scalar; see `factor_damping`.
        lam_G: λ_G.
        starts: for either factor None, or the basis `[d, k]` that `truncated_inverse` starts from.

    Returns:
        `(A_inv, G_inv)`: `[d, d]`, exactly symmetric, or a `TruncatedInverse`; NaN where the input is not finite.
    """
    return tuple(
        _inverse(damped_cholesky(factor, lam)) if start is None else truncated_inverse(factor, lam, start)
        for factor, lam, start in zip((A, G), (lam_A, lam_G), starts, strict=True)
    )


def joint_eigenbasis(
    A: tf.Tensor,
    G: tf.Tensor,
    P: tf.Tensor,
    Q: tf.Tensor,
    lam_A: float | tf.Tensor,
    lam_G: float | tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Bases in which both terms of `A_λ ⊗ G_λ + P ⊗ Q` are diagonal.

    Args:
        A: `[d_in, d_in]`, symmetric positive semi-definite up to rounding.
        G: `[d_out, d_out]`, likewise.
        P: `[d_in, d_in]`, symmetric, any eigenvalues.
        Q: `[d_out, d_out]`, likewise.
        lam_A: λ_A, non-negative scalar.
        lam_G: λ_G.

    Returns:
        `(K1 [d_in, d_in], K2 [d_out, d_out], s1 [d_in], s2 [d_out])`, `K1ᵀ A_λ K1 = I`, `K1ᵀ P K1 = diag(s1)`, and
        likewise for `K2`, `G_λ`, `Q`, `s2`. NaN where the input is not finite.
    """
    K1, s1 = _joint_basis(damped_cholesky(A, lam_A), P)
    K2, s2 = _joint_basis(damped_cholesky(G, lam_G), Q)
    return K1, K2, s1, s2


def one_term_and_correction(
    A: tf.Tensor,
    G: tf.Tensor,
    P: tf.Tensor,
    Q: tf.Tensor,
    lam_A: float | tf.Tensor,
    lam_G: float | tf.Tensor,
    rank: int,
    starts: Starts = (None, None),
) -> tuple[Inverse, Inverse, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The two-term inverse as the one-term inverse and a correction in the directions where the second term is large.

    Of the eigenpairs of `L_A⁻¹ P L_A⁻ᵀ` and `L_G⁻¹ Q L_G⁻ᵀ` the `rank` of largest magnitude are kept, found by subspace
    iteration, the others are taken to be zero: there the second term is neglected. Exact up to rounding where neither
    has more than `rank` eigenvalues that are not zero, and always for factors of up to `2 · rank` rows, for which all
    pairs are computed. (P of one batch has at most as many as the batch has examples.) The cost is that of the one-term
    inverse plus `O(rank · d²)`, where `joint_eigenbasis` takes an `eigh` of either whole factor.

    Args:
        A: `[d_in, d_in]`, symmetric positive semi-definite up to rounding.
        G: `[d_out, d_out]`, likewise.
        P: `[d_in, d_in]`, symmetric, any eigenvalues.
        Q: `[d_out, d_out]`, likewise.
        lam_A: λ_A, non-negative scalar.
        lam_G: λ_G.
        rank: How many eigenpairs to keep on either side, at least 1.
        starts: as `invert_one_term`. A truncated factor stands for `A + λ_A I` in the correction too.

    Returns:
        `(A_inv, G_inv, K1 [d_in, r_in], K2 [d_out, r_out], s1 [r_in], s2 [r_out])` for `apply_corrected`; see
        `correction_rank` for `r_in`, `r_out`. NaN where the input is not finite.
    """
    inverses, bases, eigenvalues = [], [], []
    for factor, second, lam, start in zip((A, G), (P, Q), (lam_A, lam_G), starts, strict=True):
        if start is None:
            cholesky = damped_cholesky(factor, lam)
            basis, values = _leading_joint_basis(cholesky, second, rank)
            inverses.append(_inverse(cholesky))
        else:
            inverses.append(truncated_inverse(factor, lam, start))
            basis, values = _leading_joint_basis(inverses[-1].root(), second, rank)
        bases.append(basis)
        eigenvalues.append(values)
    return *inverses, *bases, *eigenvalues


def correction_rank(d: int, rank: int) -> int:
    """How many eigenpairs `one_term_and_correction` keeps for a factor of `d` rows."""
    return d if d <= 2 * rank else rank


def apply_corrected(
    A_inv: Inverse,
    G_inv: Inverse,
    K1: tf.Tensor,
    K2: tf.Tensor,
    s1: tf.Tensor,
    s2: tf.Tensor,
    V: tf.Tensor,
    indefinite: IndefiniteRule = "absolute",
) -> tf.Tensor:
    """`A⁻¹VG⁻¹ + K1 [(K1ᵀ V K2) ∘ (1/φ(s1 s2ᵀ) − 1)] K2ᵀ`: what `apply_two_term` gives with all other eigenvalues zero.

    Args:
        A_inv: from `one_term_and_correction`, as the others.
        G_inv: likewise.
        K1: `[d_in, r_in]`.
        K2: `[d_out, r_out]`.
        s1: `[r_in]`.
        s2: `[r_out]`.
        V: `[d_in, d_out]`.
        indefinite: See `two_term_denominators`.

    Returns:
        `[d_in, d_out]`, a positive definite function of `V`: in the joint basis it divides by `φ > 0`, or by 1.
    """
    rotated = tf.matmul(tf.matmul(K1, V, transpose_a=True), K2)
    factors = 1 / two_term_denominators(s1[:, tf.newaxis] * s2[tf.newaxis, :], indefinite) - 1
    return apply_one_term(A_inv, G_inv, V) + tf.matmul(K1, tf.matmul(rotated * factors, K2, transpose_b=True))


def apply_one_term(A_inv: Inverse, G_inv: Inverse, V: tf.Tensor) -> tf.Tensor:
    """`A⁻¹ V G⁻¹`, `[d_in, d_out]`."""
    V = G_inv.times_transposed(V) if isinstance(G_inv, TruncatedInverse) else tf.matmul(V, G_inv)
    return A_inv.times(V) if isinstance(A_inv, TruncatedInverse) else tf.matmul(A_inv, V)


def apply_two_term(
    K1: tf.Tensor,
    K2: tf.Tensor,
    s1: tf.Tensor,
    s2: tf.Tensor,
    V: tf.Tensor,
    indefinite: IndefiniteRule = "absolute",
) -> tf.Tensor:
    """`K1 [(K1ᵀ V K2) ⊘ φ(s1 s2ᵀ)] K2ᵀ`, a positive definite function of `V` by either rule: see
    `two_term_denominators`.

    Args:
        K1: `[d_in, d_in]`, from `joint_eigenbasis`.
        K2: `[d_out, d_out]`.
        s1: `[d_in]`.
        s2: `[d_out]`.
        V: `[d_in, d_out]`.
        indefinite: "absolute" or "reflect".

    Returns:
        `[d_in, d_out]`.
    """
    rotated = tf.matmul(tf.matmul(K1, V, transpose_a=True), K2)
    quotient = rotated / two_term_denominators(s1[:, tf.newaxis] * s2[tf.newaxis, :], indefinite)
    return tf.matmul(K1, tf.matmul(quotient, K2, transpose_b=True))


def two_term_denominators(products: tf.Tensor, indefinite: IndefiniteRule) -> tf.Tensor:
    """`φ(x) > 0` in place of `1 + x`, entry by entry.

    Rules:
        "absolute": `1 + |x|`. At least one, so the second term never lengthens a step; differs from the exact inverse
            wherever `x < 0`.
        "reflect": `1 + x` where it is positive, so exactly the inverse of the damped sum when that is positive definite
            and, when it is not, on the eigendirections where it is positive; `1 + |x|` on the others. `1 + x` is kept
            above `√eps` (3.5e-4 in float32, 1.5e-8 in float64): nearer to singular, the sum is not known to that
            accuracy.

    Args:
        products: `x`, any shape, real.
        indefinite: The rule.

    Returns:
        Same shape, positive.

    Raises:
        ValueError: On an unknown rule.
    """
    if indefinite not in INDEFINITE_RULES:
        raise ValueError(f"`indefinite` must be 'reflect' or 'absolute'. Received: indefinite={indefinite!r}")
    absolute = 1 + tf.abs(products)
    if indefinite == "absolute":
        return absolute
    exact = 1 + products
    return tf.where(exact > 0, tf.maximum(exact, epsilon(products.dtype) ** 0.5), absolute)


def solve_skew_pair(A: tf.Tensor, G: tf.Tensor, P: tf.Tensor, Q: tf.Tensor, V: tf.Tensor) -> tf.Tensor:
    """`(A ⊗ G + P ⊗ Q)⁻¹ vec(V)` for skew `P`, `Q`, by rule "reflect"; the damping is already in `A` and `G`.

    `iP` and `iQ` are Hermitian and `P ⊗ Q = −(iP) ⊗ (iQ)`: the same formula with complex bases and `x = −s₁ s₂ᵀ`.

    Args:
        A: `[d_in, d_in]`, symmetric positive definite.
        G: `[d_out, d_out]`, likewise.
        P: `[d_in, d_in]`, skew.
        Q: `[d_out, d_out]`, skew.
        V: `[d_in, d_out]`.

    Returns:
        `[d_in, d_out]`, real.
    """
    complex_dtype = tf.complex64 if A.dtype == tf.float32 else tf.complex128

    def basis(damped, skew):
        factor = damped_cholesky(damped, 0.0)
        whitened = _whitened(factor, skew)
        hermitian = tf.complex(tf.zeros_like(whitened), 0.5 * (whitened - tf.transpose(whitened)))
        eigenvalues, vectors = eigh(hermitian)
        vectors = tf.linalg.triangular_solve(tf.cast(factor, complex_dtype), vectors, adjoint=True)
        return vectors, eigenvalues

    K1, s1 = basis(A, P)
    K2, s2 = basis(G, Q)
    rotated = tf.matmul(tf.matmul(K1, tf.cast(V, complex_dtype), adjoint_a=True), tf.math.conj(K2))
    denominators = two_term_denominators(-s1[:, tf.newaxis] * s2[tf.newaxis, :], "reflect")
    solution = tf.matmul(K1, tf.matmul(rotated / tf.cast(denominators, complex_dtype), K2, transpose_b=True))
    return tf.math.real(solution)


def _inverse(factor: tf.Tensor) -> tf.Tensor:
    inverse = tf.linalg.cholesky_solve(factor, tf.eye(size_of(factor, -1), dtype=factor.dtype))
    return 0.5 * (inverse + tf.transpose(inverse))


def _whitened(factor: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """`L⁻¹ M L⁻ᵀ`."""
    half = tf.linalg.triangular_solve(factor, matrix)
    return tf.transpose(tf.linalg.triangular_solve(factor, tf.transpose(half)))


def _joint_basis(factor: tf.Tensor, matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    whitened = _whitened(factor, matrix)
    whitened = 0.5 * (whitened + tf.transpose(whitened))
    finite = all_finite(whitened)
    eigenvalues, vectors = eigh(tf.where(finite, whitened, tf.zeros_like(whitened)))
    nan = tf.constant(float("nan"), factor.dtype)
    basis = tf.linalg.triangular_solve(factor, vectors, adjoint=True)
    return tf.where(finite, basis, nan), tf.where(finite, eigenvalues, nan)


def _leading_joint_basis(
    factor: tf.Tensor | TruncatedInverse, matrix: tf.Tensor, rank: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(K [d, r], s [r])`: the eigenpairs of `RᵀMR` of largest magnitude, as columns of `R E`.

    `R Rᵀ` is the inverse of the damped factor: `R = L⁻ᵀ` for a Cholesky factor `L`, or a truncated symmetric root.

    Subspace iteration with Rayleigh–Ritz (Golub & Van Loan, section 8.2.4) from a fixed random start, eight columns
    wider than asked; the matrix is only ever applied.
    """
    d, dtype = size_of(matrix, -1), matrix.dtype
    truncated = isinstance(factor, TruncatedInverse)
    if not truncated and (tf.is_tensor(d) or correction_rank(d, rank) == d):
        return _joint_basis(factor, matrix)
    kept = rank if truncated else correction_rank(d, rank)
    finite = all_finite(matrix, *(factor if truncated else [factor]))
    matrix = tf.where(finite, matrix, tf.zeros_like(matrix))
    if not truncated:
        factor = tf.where(finite, factor, tf.eye(d, dtype=dtype))

    def root(columns, adjoint):
        return factor.times(columns) if truncated else tf.linalg.triangular_solve(factor, columns, adjoint=adjoint)

    def apply(columns):
        return root(tf.matmul(matrix, root(columns, adjoint=True)), adjoint=False)

    columns = tf.random.stateless_normal([d, tf.minimum(rank + 8, d)], [1993, 2023], dtype=dtype)
    for _ in range(SUBSPACE_STEPS):
        image = apply(columns)
        columns = tf.linalg.qr(tf.where(finite, image, tf.zeros_like(image))).q
    small = tf.matmul(columns, apply(columns), transpose_a=True)
    small = tf.where(finite, small, tf.zeros_like(small))
    eigenvalues, vectors = eigh(0.5 * (small + tf.transpose(small)))
    order = tf.argsort(tf.abs(eigenvalues), direction="DESCENDING")[:kept]
    basis = root(tf.matmul(columns, tf.gather(vectors, order, axis=1)), adjoint=True)
    nan = tf.constant(float("nan"), dtype)
    return tf.where(finite, basis, nan), tf.where(finite, tf.gather(eigenvalues, order), nan)
