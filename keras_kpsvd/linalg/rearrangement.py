"""The rearranged Fisher block `R(F)` as an operator that is never formed.

With `D_n = Σ_t a_{n,t} g_{n,t}ᵀ` the per-example weight gradient and `F = E_n[vec(D_n) vec(D_n)ᵀ]` (row-major `vec`),
Van Loan and Pitsianis' rearrangement `R`, defined by `R(A ⊗ G) = vec(A) vec(G)ᵀ` and linearity, is an isometry for the
Frobenius norm and turns the nearest Kronecker product into a nearest rank-one matrix. Its products need no `R(F)`:

    R(F) vec(V) = vec(E_n[D_n V D_nᵀ]),        R(F)ᵀ vec(U) = vec(E_n[D_nᵀ U D_n]).

References:
    [1] C. F. Van Loan, N. Pitsianis, Approximation with Kronecker products, 1993.
    [2] A. Koroko et al., Efficient approximations of the Fisher matrix in neural networks using Kronecker product
        singular value decomposition, ESAIM: ProcS 73 (2023), arXiv:2201.10285, section 3.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import tensorflow as tf

from .scaling import all_finite, divide_no_nan, safe_norm, unit_rows


class SubtractedTerm(NamedTuple):
    """A Kronecker term `A ⊗ G` taken off the Fisher block.

    Attributes:
        left: `A`, `[d_in, d_in]`.
        right: `G`, `[d_out, d_out]`.
        left_coefficients: `x`, `[N]`, when `A = Σ_n x_n a_n a_nᵀ` (one position per example); else None. Only the
            Gram route reads it, which then needs no product with `A` at all.
        right_coefficients: `y`, `[N]`, when `G = Σ_n y_n g_n g_nᵀ`; else None.
    """

    left: tf.Tensor
    right: tf.Tensor
    left_coefficients: tf.Tensor | None = None
    right_coefficients: tf.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RearrangedFisher:
    """`R(F) − Σ_i vec(A_i) vec(G_i)ᵀ`, `[d_in², d_out²]`, known through its products.

    Exact for any number of positions. The batch size may be unknown statically; feature sizes too for one position.

    Attributes:
        activations: `[N, T, d_in]`, float32 or float64 (a bias column, if any, already appended).
        gradients: `[N, T, d_out]`, same dtype.
        subtracted: Terms taken off: `SubtractedTerm`s or plain pairs `(A [d_in, d_in], G [d_out, d_out])`.
        weight_gradients: `D_n` as `[d_in, N, d_out]`, the order in which both products are single matrix products
            without a transposition; None to form it on demand: see `prepared`.

    Raises:
        ValueError: If the samples are not of rank 3, their dtypes or known batch and position sizes differ, or a
            feature size is unknown with several positions.
    """

    activations: tf.Tensor
    gradients: tf.Tensor
    subtracted: tuple[SubtractedTerm, ...] = ()
    weight_gradients: tf.Tensor | None = None

    def __post_init__(self):
        activations, gradients = tf.convert_to_tensor(self.activations), tf.convert_to_tensor(self.gradients)
        for name, samples in (("activations", activations), ("gradients", gradients)):
            if samples.shape.rank != 3 or (samples.shape[2] is None and samples.shape[1] != 1):
                raise ValueError(
                    f"`{name}` must be of shape [batch, shared, features] with a known number of features. "
                    f"Received: {name}.shape={samples.shape}"
                )
            if samples.dtype not in (tf.float32, tf.float64):
                raise ValueError(f"`{name}` must be float32 or float64. Received: {name}.dtype={samples.dtype.name}")
        if activations.dtype != gradients.dtype:
            raise ValueError(
                "`activations` and `gradients` must share their dtype. "
                f"Received: {activations.dtype.name} and {gradients.dtype.name}"
            )
        if not activations.shape[:2].is_compatible_with(gradients.shape[:2]):
            raise ValueError(
                "`activations` and `gradients` must agree in batch and shared sizes. "
                f"Received: {activations.shape} and {gradients.shape}"
            )
        terms = tuple(term if isinstance(term, SubtractedTerm) else SubtractedTerm(*term) for term in self.subtracted)
        object.__setattr__(self, "activations", activations)
        object.__setattr__(self, "gradients", gradients)
        object.__setattr__(self, "subtracted", terms)

    @classmethod
    def from_weight_gradients(cls, weight_gradients: tf.Tensor) -> "RearrangedFisher":
        """The operator of given `D_n`, with no samples that made them.

        Its `activations` and `gradients` are `D_n` itself and the identity, of `min(d_in, d_out)` positions, whatever
        the number of positions summed in `D_n`.

        Args:
            weight_gradients: `[d_in, N, d_out]`.
        """
        d_in, count, d_out = tf.unstack(tf.shape(weight_gradients))
        static_in, _, static_out = weight_gradients.shape
        if static_in < static_out:
            eye = tf.eye(d_in, batch_shape=[count], dtype=weight_gradients.dtype)
            return cls(eye, tf.transpose(weight_gradients, [1, 0, 2]), (), weight_gradients)
        eye = tf.eye(d_out, batch_shape=[count], dtype=weight_gradients.dtype)
        return cls(tf.transpose(weight_gradients, [1, 2, 0]), eye, (), weight_gradients)

    @property
    def dtype(self) -> tf.DType:
        """Dtype of the samples and of every product."""
        return self.activations.dtype

    @property
    def d_in(self) -> int:
        """Number of activation features."""
        return self.activations.shape[2]

    @property
    def d_out(self) -> int:
        """Number of gradient features."""
        return self.gradients.shape[2]

    @property
    def positions(self) -> int | None:
        """`T`, the number of positions that share the weights, None when unknown statically."""
        known = self.activations.shape[1]
        return self.gradients.shape[1] if known is None else known

    @property
    def batch_size(self) -> int | None:
        """`N`, None when unknown statically."""
        known = self.activations.shape[0]
        return self.gradients.shape[0] if known is None else known

    @property
    def forms_weight_gradients(self) -> bool:
        """Whether products go through `D_n` rather than through `T × T` kernels, by multiplications per example.

        Kernels `g_n V g_nᵀ` cost `T d_out² + T²(d_in + d_out) + T d_in²`, explicit `D_n` cost
        `d_in d_out (d_in + d_out)`. With `T` unknown, `D_n` is formed: its memory does not depend on `T`.
        """
        positions, d_in, d_out = self.positions, self.d_in, self.d_out
        if positions == 1:
            return False
        if positions is None or self.weight_gradients is not None:
            return True
        kernels = positions * (d_in**2 + d_out**2) + positions**2 * (d_in + d_out)
        return d_in * d_out * (d_in + d_out) < kernels

    def prepared(self) -> "RearrangedFisher":
        """The same operator with `D_n` formed once where products use it, so that loops do not form it anew."""
        if self.weight_gradients is not None or not self.forms_weight_gradients:
            return self
        return replace(self, weight_gradients=self._explicit_weight_gradients())

    def matvec(self, right: tf.Tensor) -> tf.Tensor:
        """`R vec(V)` as a matrix: `E_n[D_n V D_nᵀ] − Σ_i ⟨G_i, V⟩ A_i`.

        Args:
            right: `V`, `[d_out, d_out]`; need not be symmetric.

        Returns:
            `[d_in, d_in]`.
        """
        product = self._average(self.activations, self.gradients, right, transpose=False)
        for term in self.subtracted:
            product -= tf.reduce_sum(term.right * right) * term.left
        return product

    def rmatvec(self, left: tf.Tensor) -> tf.Tensor:
        """`Rᵀ vec(U)` as a matrix: `E_n[D_nᵀ U D_n] − Σ_i ⟨A_i, U⟩ G_i`.

        Args:
            left: `U`, `[d_in, d_in]`; need not be symmetric.

        Returns:
            `[d_out, d_out]`.
        """
        product = self._average(self.gradients, self.activations, left, transpose=True)
        for term in self.subtracted:
            product -= tf.reduce_sum(term.left * left) * term.right
        return product

    def deflate(
        self,
        left: tf.Tensor,
        right: tf.Tensor,
        left_coefficients: tf.Tensor | None = None,
        right_coefficients: tf.Tensor | None = None,
    ) -> "RearrangedFisher":
        """The operator with `vec(A) vec(G)ᵀ` taken off; this one is left as it was.

        Args:
            left: `A`, `[d_in, d_in]`.
            right: `G`, `[d_out, d_out]`.
            left_coefficients: See `SubtractedTerm`.
            right_coefficients: See `SubtractedTerm`.

        Returns:
            A new `RearrangedFisher` with one more subtracted term.
        """
        term = SubtractedTerm(left, right, left_coefficients, right_coefficients)
        return replace(self, subtracted=(*self.subtracted, term))

    def deflate_kfac(self, left: tf.Tensor, right: tf.Tensor) -> "RearrangedFisher":
        """`deflate` for KFAC's own term of these samples, `A = E_n[Σ_t a aᵀ]`, `G = E_{n,t}[g gᵀ]`.

        With one position per example the term's coefficients, `1/N` each, are passed along, so that the Gram route
        needs no product with `A` or `G`.
        """
        if self.positions != 1 or self.weight_gradients is not None:  # D_n of one position may be sums over several.
            return self.deflate(left, right)
        weights = tf.ones_like(self.activations[:, 0, 0]) / tf.cast(tf.shape(self.activations)[0], self.dtype)
        return self.deflate(left, right, weights, weights)

    def inner(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """`⟨F − Σ_i A_i ⊗ G_i, A ⊗ G⟩ = ⟨A, matvec(G)⟩`, a scalar, without forming any of them.

        Args:
            left: `A`, `[d_in, d_in]`.
            right: `G`, `[d_out, d_out]`.
        """
        return tf.reduce_sum(left * self.matvec(right))

    def frobenius_norm(self) -> tf.Tensor:
        """`‖F − Σ_i A_i ⊗ G_i‖_F`, a scalar in the samples' dtype, without forming `F`.

        Uses `‖F‖² = N⁻² Σ_{n,m} ⟨D_n, D_m⟩²` and inner products for the subtracted terms, in float64 whatever the
        dtype: a difference of squares keeps half the digits, so what is left of `F` is not resolved below about
        `1e-8 ‖F‖`. `Σ ⟨D_n, D_m⟩²` takes an `[N, N]` matrix for one position; for more it takes the cheaper of explicit
        `D_n` and, one example at a time, the `[T, N T]` kernels.
        """
        operator, unit = self.balanced()
        operator = operator.astype(tf.float64)
        count = tf.cast(tf.shape(operator.activations)[0], tf.float64)
        total = operator._sum_of_squared_inner_products() / tf.square(count)
        plain = replace(operator, subtracted=())
        for term in operator.subtracted:
            total -= 2 * plain.inner(term.left, term.right)
            for other in operator.subtracted:
                total += tf.reduce_sum(term.left * other.left) * tf.reduce_sum(term.right * other.right)
        unit = tf.cast(unit, tf.float64)
        return tf.cast(tf.sqrt(tf.maximum(total, 0)) * unit * unit, self.dtype)

    def frobenius_norm_squared(self) -> tf.Tensor:
        """`frobenius_norm` squared; of eighth degree in the samples, so float32 overflows where the norm does not."""
        return tf.square(self.frobenius_norm())

    def balanced(self) -> tuple["RearrangedFisher", tf.Tensor]:
        """A copy with entries of order one, and its unit.

        `a gᵀ` is unchanged by `a → c a, g → g / c`: each position's two vectors get equal lengths, then all are divided
        by the largest. Subtracted terms are balanced likewise. Coefficients of subtracted terms are dropped, since they
        refer to the unscaled samples.

        Returns:
            `(operator, unit)` with `self = unit² · operator`, unit a positive scalar.
        """
        if self.weight_gradients is None:
            activation_rows, activation_lengths = unit_rows(self.activations)
            gradient_rows, gradient_lengths = unit_rows(self.gradients)
            # √ of each length, never of their product, which may overflow.
            lengths = tf.sqrt(activation_lengths) * tf.sqrt(gradient_lengths)
        else:
            lengths = tf.sqrt(safe_norm(self.weight_gradients, axis=[0, 2]))
        magnitudes = [(safe_norm(term.left), safe_norm(term.right)) for term in self.subtracted]
        roots = [tf.sqrt(tf.sqrt(left)) * tf.sqrt(tf.sqrt(right)) for left, right in magnitudes]
        # reduce_max of an empty batch is -inf; the zero in front keeps it out.
        root = tf.reduce_max(tf.stack([tf.zeros([], self.dtype), tf.reduce_max(lengths), *roots]))
        root = tf.where(root > 0, root, tf.ones_like(root))
        terms = tuple(
            SubtractedTerm(
                tf.square(own / root) * divide_no_nan(term.left, left),
                tf.square(own / root) * divide_no_nan(term.right, right),
            )
            for term, (left, right), own in zip(self.subtracted, magnitudes, roots, strict=True)
        )
        unit = tf.square(root)
        if self.weight_gradients is not None:
            scaled = RearrangedFisher.from_weight_gradients(self.weight_gradients / unit)
            return replace(scaled, subtracted=terms), unit
        weights = (lengths / root)[..., tf.newaxis]
        return RearrangedFisher(weights * activation_rows, weights * gradient_rows, terms), unit

    def astype(self, dtype: tf.DType) -> "RearrangedFisher":
        """The operator with samples and subtracted terms cast to `dtype`."""
        terms = tuple(
            SubtractedTerm(*(None if part is None else tf.cast(part, dtype) for part in term))
            for term in self.subtracted
        )
        explicit = None if self.weight_gradients is None else tf.cast(self.weight_gradients, dtype)
        return RearrangedFisher(tf.cast(self.activations, dtype), tf.cast(self.gradients, dtype), terms, explicit)

    def finite_or_zero(self) -> tuple["RearrangedFisher", tf.Tensor]:
        """The operator itself and True, or the zero operator and False when a sample or subtracted entry is not finite.

        `eigh` raises on NaN in graph mode, so nothing that is not finite may reach a decomposition.
        """
        terms = [part for term in self.subtracted for part in (term.left, term.right)]
        finite = all_finite(self.activations, self.gradients, *terms)

        def keep(tensor):
            return None if tensor is None else tf.where(finite, tensor, tf.zeros_like(tensor))

        terms = tuple(SubtractedTerm(*(keep(part) for part in term)) for term in self.subtracted)
        return (
            RearrangedFisher(keep(self.activations), keep(self.gradients), terms, keep(self.weight_gradients)),
            finite,
        )

    def _explicit_weight_gradients(self) -> tf.Tensor:
        if self.weight_gradients is not None:
            return self.weight_gradients
        return tf.transpose(tf.matmul(self.activations, self.gradients, transpose_a=True), [1, 0, 2])

    def _average(self, outer: tf.Tensor, inner: tf.Tensor, matrix: tf.Tensor, transpose: bool) -> tf.Tensor:
        """`E_n[X_n M X_nᵀ]` with `X_n = outer_nᵀ inner_n`, `[d_outer, d_outer]`."""
        count = tf.cast(tf.maximum(tf.shape(outer)[0], 1), self.dtype)
        d_outer = outer.shape[2]
        if self.positions == 1:
            rows, directions = tf.squeeze(outer, 1), tf.squeeze(inner, 1)
            weights = tf.reduce_sum(tf.matmul(directions, matrix) * directions, axis=1) / count
            return tf.matmul(rows * weights[:, tf.newaxis], rows, transpose_a=True)
        if not self.forms_weight_gradients:
            kernels = tf.matmul(tf.tensordot(inner, matrix, 1), inner, transpose_b=True)
            right = tf.reshape(tf.matmul(kernels, outer), [-1, d_outer])
            return tf.matmul(tf.reshape(outer, [-1, d_outer]), right, transpose_a=True) / count
        products = self._explicit_weight_gradients()
        d_in, d_out = self.d_in, self.d_out
        wide, tall = tf.reshape(products, [d_in, -1]), tf.reshape(products, [-1, d_out])
        if transpose:
            moved = tf.reshape(tf.matmul(matrix, wide), [-1, d_out])
            return tf.matmul(tall, moved, transpose_a=True) / count
        moved = tf.reshape(tf.matmul(tall, matrix), [d_in, -1])
        return tf.matmul(moved, wide, transpose_b=True) / count

    def _sum_of_squared_inner_products(self) -> tf.Tensor:
        """`Σ_{n,m} ⟨D_n, D_m⟩²`, in the operator's dtype."""
        activations, gradients, positions = self.activations, self.gradients, self.positions
        if positions == 1:
            rows, directions = tf.squeeze(activations, 1), tf.squeeze(gradients, 1)
            gram = tf.matmul(rows, rows, transpose_b=True) * tf.matmul(directions, directions, transpose_b=True)
            return tf.reduce_sum(tf.square(gram))
        if positions is None or positions**2 * (self.d_in + self.d_out) >= self.d_in * self.d_out:
            flat = tf.transpose(self._explicit_weight_gradients(), [1, 0, 2])
            flat = tf.reshape(flat, [-1, self.d_in * self.d_out])
            return tf.reduce_sum(tf.square(tf.matmul(flat, flat, transpose_b=True)))
        all_activations = tf.reshape(activations, [-1, self.d_in])
        all_gradients = tf.reshape(gradients, [-1, self.d_out])

        def one_example(samples):
            kernel = tf.matmul(samples[0], all_activations, transpose_b=True)
            kernel *= tf.matmul(samples[1], all_gradients, transpose_b=True)
            products = tf.reduce_sum(tf.reshape(kernel, [positions, -1, positions]), axis=[0, 2])
            return tf.reduce_sum(tf.square(products))

        return tf.reduce_sum(tf.map_fn(one_example, (activations, gradients), fn_output_signature=self.dtype))
