"""Short sums of Kronecker products, used without ever forming them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from .damping import DampingRule, factor_damping
from .decompositions import eigh
from .scaling import as_scalar, divide_no_nan, safe_norm
from .solve import (
    IndefiniteRule,
    apply_one_term,
    apply_two_term,
    invert_one_term,
    joint_eigenbasis,
    solve_skew_pair,
)
from .triples import epsilon, project, term_signs

KroneckerTerm = tuple[tf.Tensor, tf.Tensor]


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """`Σ_k A_k ⊗ G_k`, `[d_in·d_out, d_in·d_out]`, acting on `vec(V)`, `V [d_in, d_out]` flattened row-major.

    Attributes:
        terms: List of `(A [d_in, d_in], G [d_out, d_out])`, at least one, all of one dtype. Factors are symmetric, or
            both factors of a term skew.

    Raises:
        ValueError: If there are no terms or their shapes or dtypes differ.
    """

    terms: list[KroneckerTerm]

    def __post_init__(self):
        terms = [(tf.convert_to_tensor(A), tf.convert_to_tensor(G)) for A, G in self.terms]
        if not terms:
            raise ValueError("`terms` must hold at least one pair (A, G). Received none.")
        shapes = [(tuple(A.shape), tuple(G.shape), A.dtype.name, G.dtype.name) for A, G in terms]
        (left, right, *_), *_ = shapes
        if len(set(shapes)) > 1 or len(left) != 2 or len(right) != 2 or left[0] != left[1] or right[0] != right[1]:
            raise ValueError(
                f"`terms` must be pairs of square matrices, of the same shapes and dtype. Received: {shapes}"
            )
        object.__setattr__(self, "terms", terms)

    @property
    def d_in(self) -> int:
        """Size of the left factors."""
        return self.terms[0][0].shape[0]

    @property
    def d_out(self) -> int:
        """Size of the right factors."""
        return self.terms[0][1].shape[0]

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the factors."""
        return self.terms[0][0].dtype

    def __add__(self, other: "KroneckerSum") -> "KroneckerSum":
        """The sum with the terms of both; see `recompress` to shorten it."""
        return KroneckerSum([*self.terms, *other.terms])

    def __mul__(self, factor: float | tf.Tensor) -> "KroneckerSum":
        """The sum times a number, which goes to the left factors."""
        factor = as_scalar(factor, self.dtype)
        return KroneckerSum([(factor * A, G) for A, G in self.terms])

    __rmul__ = __mul__

    def to_dense(self) -> tf.Tensor:
        """The matrix itself, `[d_in·d_out, d_in·d_out]`: small layers only."""
        size = self.d_in * self.d_out
        return tf.add_n([tf.reshape(tf.einsum("ij,op->iojp", A, G), [size, size]) for A, G in self.terms])

    def matvec(self, V: tf.Tensor) -> tf.Tensor:
        """`Σ_k A_k V G_kᵀ`, `[d_in, d_out]`: the matrix times `vec(V)`."""
        return tf.add_n([tf.matmul(A, tf.matmul(V, G, transpose_b=True)) for A, G in self.terms])

    def inner(self, other: "KroneckerSum") -> tf.Tensor:
        """Frobenius inner product `Σ_{k,l} ⟨A_k, A'_l⟩ ⟨G_k, G'_l⟩`, a scalar."""
        return tf.reduce_sum(_gram(self, other, 0) * _gram(self, other, 1))

    def frobenius_norm(self) -> tf.Tensor:
        """`‖Σ_k A_k ⊗ G_k‖_F`, a scalar, down to `√eps` (float64's) of the terms under cancellation."""
        form = _core_form(self)
        return tf.cast(safe_norm(form.core), self.dtype) * form.unit * form.unit

    def solve(
        self,
        V: tf.Tensor,
        damping: float | tf.Tensor,
        damping_rule: DampingRule = "sqrt",
        indefinite: IndefiniteRule = "reflect",
    ) -> tf.Tensor:
        """The damped inverse times `vec(V)`, for one or two terms.

        The damping goes to the first term's factors: `(A₁ + λ_A I) ⊗ (G₁ + λ_G I) + A₂ ⊗ G₂`, λ_A and λ_G by
        `factor_damping`. Where that sum is positive definite, the result is its exact inverse (with "reflect");
        otherwise see `two_term_denominators`. The map is positive definite always.

        Args:
            V: `[d_in, d_out]`; cast to the terms' dtype.
            damping: λ ≥ 0. Zero is fine when the first term's factors are positive definite.
            damping_rule: "sqrt" or "factor".
            indefinite: "reflect" (default) or "absolute".

        Returns:
            `[d_in, d_out]`.

        Raises:
            ValueError: With more than two terms (`recompress` them first), an unknown rule, factors of the second term
                that are neither symmetric nor skew, or a skew second term with `indefinite="absolute"`. The
                symmetry can only be examined eagerly; in graph mode factors are taken to be symmetric.
        """
        V = tf.cast(tf.convert_to_tensor(V), self.dtype)
        A, G = self.terms[0]
        lam_A, lam_G = factor_damping(A, G, damping, damping_rule)
        if len(self.terms) == 1:
            return apply_one_term(*invert_one_term(A, G, lam_A, lam_G), V)
        if len(self.terms) > 2:
            raise ValueError(
                "`solve` takes one or two terms; `recompress(terms, 2)` gives the nearest sum of two. "
                f"Received: {len(self.terms)} terms"
            )
        P, Q = self.terms[1]
        if _is_skew_pair(P, Q):
            if indefinite != "reflect":
                raise ValueError(
                    f"A skew second term needs `indefinite='reflect'`. Received: indefinite={indefinite!r}"
                )
            eye_in, eye_out = tf.eye(self.d_in, dtype=self.dtype), tf.eye(self.d_out, dtype=self.dtype)
            return solve_skew_pair(A + lam_A * eye_in, G + lam_G * eye_out, P, Q, V)
        return apply_two_term(*joint_eigenbasis(A, G, P, Q, lam_A, lam_G), V, indefinite=indefinite)


def recompress(terms: KroneckerSum | Iterable[KroneckerTerm], k: int, *, symmetric: bool = False) -> KroneckerSum:
    """The nearest sum of k Kronecker products, in Frobenius norm, to a longer one.

    `R(Σ A_i ⊗ G_i) = Σ vec(A_i) vec(G_i)ᵀ = XᵀY` has rank at most the number r of terms: with `XXᵀ = C Cᵀ` and
    `YYᵀ = B Bᵀ`, both r × r, the singular values of the sum are those of `CᵀB = p diag(σ) qᵀ`, and its vectors the
    combinations `Xᵀ B q / σ` and `Yᵀ C p / σ`. Nothing is larger than the terms themselves. The r × r part is done in
    float64, so that terms down to `√eps` (1.5e-8) of the largest keep a direction of their own.

    For an average over time, `recompress(ρ · old + (1 − ρ) · new, k)` averages the matrices, not their factors, so that
    the free scale and sign of terms cannot make them cancel.

    Args:
        terms: The sum, r terms; zero terms do no harm.
        k: How many to keep. If r < k, zero terms fill up.
        symmetric: Every factor is exactly symmetric, so that the result is, and need not be looked at.

    Returns:
        k terms, largest first, both factors of a term with the same Frobenius norm `√σ`, orthogonal to those of other
        terms; signs by `term_signs`.
    """
    total = terms if isinstance(terms, KroneckerSum) else KroneckerSum(list(terms))
    count = min(k, len(total.terms))
    form = _core_form(total)
    finite = tf.reduce_all(tf.math.is_finite(form.core))
    values, p, q = tf.linalg.svd(tf.where(finite, form.core, tf.zeros_like(form.core)))
    # Below √eps of the largest a value is the rounding of the two Gram matrices, and its vectors mean nothing.
    values = tf.where(values > 2 * epsilon(tf.float64) ** 0.5 * values[0], values, tf.zeros_like(values))
    values, p, q = values[:count], p[:, :count], q[:, :count]
    left_mix = divide_no_nan(form.weights * tf.matmul(form.right_factor, q), values)
    right_mix = divide_no_nan(form.weights * tf.matmul(form.left_factor, p), values)
    lefts = _mixed(form.left, divide_no_nan(left_mix, form.left_norms[:, tf.newaxis]))
    rights = _mixed(form.right, divide_no_nan(right_mix, form.right_norms[:, tf.newaxis]))
    if not symmetric:
        # Symmetric or skew up to rounding: which kind each one is follows from its own entries.
        lefts, rights = _cleaned(lefts), _cleaned(rights)
    signs = term_signs(lefts, tf.ones([count], total.dtype))
    values = tf.where(finite, values, tf.constant(float("nan"), values.dtype))
    roots = (form.unit * tf.cast(tf.sqrt(values), total.dtype) * signs)[:, tf.newaxis, tf.newaxis]
    lefts, rights = roots * lefts, roots * rights
    pairs = list(zip(tf.unstack(lefts), tf.unstack(rights), strict=True))
    zero = (tf.zeros_like(total.terms[0][0]), tf.zeros_like(total.terms[0][1]))
    return KroneckerSum(pairs + [zero] * (k - count))


class _CoreForm(NamedTuple):
    """`R = Xᵀ Y`, whose singular values are those of `unit² core`; the r × r parts in float64, for unit rows."""

    left: list[tf.Tensor]  # the rows of X, each [d_in, d_in]
    right: list[tf.Tensor]  # the rows of Y
    left_norms: tf.Tensor  # [r], float64
    right_norms: tf.Tensor
    left_factor: tf.Tensor  # C [r, r]: the Gram matrix of the rows of X at unit norm is C Cᵀ
    right_factor: tf.Tensor  # B, likewise for Y
    weights: tf.Tensor  # [r, 1], products of norms relative to the largest
    core: tf.Tensor  # [r, r], Cᵀ diag(weights) B
    unit: tf.Tensor


def _core_form(total: KroneckerSum) -> _CoreForm:
    left, right = [A for A, _ in total.terms], [G for _, G in total.terms]
    (left_norms, left_factor), (right_norms, right_factor) = _gram_factor(left), _gram_factor(right)
    # Relative to the largest, so that no product leaves the range of the dtype.
    unit = tf.reduce_max(tf.sqrt(left_norms) * tf.sqrt(right_norms))
    unit = tf.where(unit > 0, unit, tf.ones_like(unit))
    weights = (left_norms / unit * (right_norms / unit))[:, tf.newaxis]
    core = tf.matmul(left_factor, weights * right_factor, transpose_a=True)
    unit = tf.cast(unit, total.dtype)
    return _CoreForm(left, right, left_norms, right_norms, left_factor, right_factor, weights, core, unit)


def _gram_factor(matrices: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Frobenius norms `[r]` and `C [r, r]` with `C Cᵀ` the Gram matrix of the matrices at unit norm, in float64."""
    rows = tf.cast(tf.reshape(tf.stack(matrices), [len(matrices), -1]), tf.float64)
    gram = tf.matmul(rows, rows, transpose_b=True)
    norms = tf.sqrt(tf.linalg.diag_part(gram))
    gram = divide_no_nan(gram, norms[:, tf.newaxis] * norms)
    # eigh raises on NaN; the core turns NaN through the norms all the same.
    gram = tf.where(tf.reduce_all(tf.math.is_finite(gram)), gram, tf.zeros_like(gram))
    eigenvalues, vectors = eigh(gram)
    return norms, vectors * tf.sqrt(tf.maximum(eigenvalues, 0))


def _mixed(matrices: list[tf.Tensor], mix: tf.Tensor) -> tf.Tensor:
    """Combinations `[k, d, d]` of r matrices with weights `[r, k]`, entry by entry: symmetric ones stay exactly so."""
    mix = tf.unstack(tf.cast(mix, matrices[0].dtype))
    return tf.add_n([weight[:, tf.newaxis, tf.newaxis] * matrix for weight, matrix in zip(mix, matrices, strict=True)])


def _cleaned(matrices: tf.Tensor) -> tf.Tensor:
    """Rounds `[k, d, d]` matrices that are symmetric or skew up to rounding to exactly that; others stay."""
    symmetric, skew = project(matrices, "symmetric"), project(matrices, "skew")
    size = safe_norm(matrices, axis=[1, 2], keepdims=True) * (64 * epsilon(matrices.dtype))
    is_symmetric = safe_norm(skew, axis=[1, 2], keepdims=True) <= size
    is_skew = safe_norm(symmetric, axis=[1, 2], keepdims=True) <= size
    return tf.where(is_symmetric, symmetric, tf.where(is_skew, skew, matrices))


def _gram(one: KroneckerSum, other: KroneckerSum, side: int) -> tf.Tensor:
    rows = tf.reshape(tf.stack([term[side] for term in one.terms]), [len(one.terms), -1])
    columns = tf.reshape(tf.stack([term[side] for term in other.terms]), [len(other.terms), -1])
    return tf.matmul(rows, columns, transpose_b=True)


def _is_skew_pair(P: tf.Tensor, Q: tf.Tensor) -> bool:
    if not tf.executing_eagerly():
        return False
    tolerance = epsilon(P.dtype) ** 0.5
    kinds = []
    for factor in (P, Q):
        size = tolerance * float(safe_norm(factor))
        if not float(safe_norm(project(factor, "skew"))) > size:
            kinds.append("symmetric")
        elif not float(safe_norm(project(factor, "symmetric"))) > size:
            kinds.append("skew")
        else:
            kinds.append("neither")
    if kinds == ["skew", "skew"]:
        return True
    if kinds == ["symmetric", "symmetric"]:
        return False
    raise ValueError(
        "The second term's factors must both be symmetric or both be skew: its sum with the first is not symmetric "
        f"otherwise. Received: {kinds[0]} and {kinds[1]}"
    )
