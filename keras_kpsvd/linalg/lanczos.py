"""Golub–Kahan–Lanczos bidiagonalisation with full reorthogonalisation and thick restarts."""

import tensorflow as tf

from .rearrangement import RearrangedFisher
from .scaling import as_scalar, divide_no_nan, safe_norm
from .triples import (
    CONVERGED,
    NOT_CONVERGED,
    NOT_FINITE,
    Parity,
    SingularTriples,
    epsilon,
    fix_signs,
    project,
    zero_triples,
)


def golub_kahan_lanczos(
    operator: RearrangedFisher,
    k: int,
    start: tf.Tensor,
    *,
    tolerance: float | tf.Tensor,
    max_steps: int,
    krylov_dimension: int | None = None,
    parity: Parity = "symmetric",
    reference: float | tf.Tensor = 0.0,
) -> SingularTriples:
    """The k leading singular triples at once.

    Keeps orthonormal bases `U`, `V` with `R V = U B` and `Rᵀ U = V Bᵀ + β v eᵀ`, B upper triangular: bidiagonal but for
    the column a restart puts there. Each new vector is orthogonalised twice against the whole basis, and its
    coefficients go into B, so B is the projection of `R` and not a recurrence that trusts orthogonality. When the bases
    are full they are cut back to the leading Ritz vectors (a thick restart) until all k residuals `β |eᵀp_i| / σ₁` meet
    the tolerance. A breakdown (an invariant subspace found) puts a pseudo-random orthogonal vector in place, so that
    further triples, equal values included, are still found.

    Args:
        operator: Anything with `matvec`, `rmatvec`, `d_in`, `d_out` and `dtype`; entries of order one in float32.
        k: How many triples. Those beyond the dimension of the space are zero.
        start: `V`, `[d_out, d_out]`.
        tolerance: On the residuals relative to `max(σ₁, reference)`.
        max_steps: Cap on pairs of products; checked at restarts, so it may be passed by less than `krylov_dimension`.
        krylov_dimension: Size of the bases, more than k; default `2 k + 8`. Never above the dimension of the space.
        parity: Symmetric or skew factors, or "any" for no restriction.
        reference: A size below which this operator's values do not matter, such as a largest value already held.

    Returns:
        `SingularTriples`, residuals relative to `max(σ₁, reference)`. Values are Rayleigh quotients of the vectors
        returned, and the residuals are computed from those vectors, by one more pair of products each, not read off the
        recurrence.

    Raises:
        ValueError: If `krylov_dimension` does not exceed k.
    """
    if krylov_dimension is not None and krylov_dimension <= k:
        raise ValueError(f"`krylov_dimension` must exceed k. Received: krylov_dimension={krylov_dimension}, k={k}")
    dtype, d_in, d_out = operator.dtype, operator.d_in, operator.d_out
    dimension = min(_dimension(d_in, parity), _dimension(d_out, parity))
    size = min(2 * k + 8 if krylov_dimension is None else krylov_dimension, dimension)
    wanted = min(k, size)
    if wanted == 0:
        return zero_triples(k, d_in, d_out, dtype)
    # A full space (size = wanted) is exact after one filling: nothing to restart.
    held = max(wanted, min(wanted + (size - wanted) // 2, size - 1))
    tolerance, reference = as_scalar(tolerance, dtype), as_scalar(reference, dtype)

    def multiply(vector):
        return _flat(project(operator.matvec(tf.reshape(vector, [d_out, d_out])), parity))

    def multiply_transposed(vector):
        return _flat(project(operator.rmatvec(tf.reshape(vector, [d_in, d_in])), parity))

    def fill(first, left, right, core, spill):
        """Bidiagonalises columns `first` … `size − 1`; `spill` is the last β."""

        def column(j, left, right, core, spill):
            moved, coefficients = _orthogonalised(multiply(right[j]), left)
            scale = tf.maximum(tf.reduce_max(tf.abs(core)), safe_norm(coefficients))
            new, alpha = _next_vector(moved, left, scale, d_in, j, parity)
            here = tf.one_hot(j, size, dtype=dtype)
            core += (coefficients + alpha * here)[:, tf.newaxis] * here[tf.newaxis, :]
            left = _with_row(left, j, new)
            moved, _ = _orthogonalised(multiply_transposed(new), right)
            scale = tf.reduce_max(tf.abs(core))
            following, spill = _next_vector(moved, right, scale, d_out, j + size, parity)
            right = _with_row(right, j + 1, following)
            return j + 1, left, right, core, spill

        state = (first, left, right, core, spill)
        return tf.while_loop(lambda j, *_: j < size, column, state)[1:]

    def unfinished(steps, first, left, right, core, spill, residual):
        # NaN compares false: the loop ends, and the status says why. Bases that span the space leave no column to fill:
        # one filling is exact, and what is left of a zero operator is rounding that no further one reduces.
        return (residual > tolerance) & (steps < max_steps) & (first < size)

    def fill_and_restart(steps, first, left, right, core, spill, residual):
        left, right, core, spill = fill(first, left, right, core, spill)
        values, p, q = tf.linalg.svd(core)
        residual = spill * tf.reduce_max(tf.abs(p[-1, :wanted]))
        residual = divide_no_nan(residual, tf.maximum(values[0], reference))
        # Cut back to the leading Ritz vectors; the last v stays, as the next column to fill.
        left = _padded(tf.matmul(p[:, :held], left, transpose_a=True), size)
        ritz_right = tf.matmul(q[:, :held], right[:size], transpose_a=True)
        right = _padded(tf.concat([ritz_right, right[size:]], axis=0), size + 1)
        core = tf.linalg.diag(tf.concat([values[:held], tf.zeros([size - held], dtype)], axis=0))
        return steps + size - first, tf.constant(held), left, right, core, spill, residual

    start = _flat(project(tf.cast(start, dtype), parity))
    start = divide_no_nan(start, safe_norm(start))
    state = (
        tf.constant(0),
        tf.constant(0),
        tf.zeros([size, d_in * d_in], dtype),
        _padded(start[tf.newaxis], size + 1),
        tf.zeros([size, size], dtype),
        tf.zeros([], dtype),
        tf.constant(float("inf"), dtype),
    )
    steps, _, left, right, _, _, residual = tf.while_loop(unfinished, fill_and_restart, state)
    left = tf.reshape(left[:wanted], [wanted, d_in, d_in])
    right = tf.reshape(right[:wanted], [wanted, d_out, d_out])
    values, left, right, residuals = _measured(operator, left, right, parity)
    residuals = divide_no_nan(residuals, tf.maximum(tf.reduce_max(values), reference))
    status = tf.where(
        residual <= tolerance, CONVERGED, tf.where(tf.math.is_finite(residual), NOT_CONVERGED, NOT_FINITE)
    )
    missing = k - wanted
    return SingularTriples(
        tf.pad(values, [[0, missing]]),
        tf.pad(left, [[0, missing], [0, 0], [0, 0]]),
        tf.pad(right, [[0, missing], [0, 0], [0, 0]]),
        tf.pad(residuals, [[0, missing], [0, 0]]),
        status,
        steps,
    )


def _measured(
    operator: RearrangedFisher, left: tf.Tensor, right: tf.Tensor, parity: Parity
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Rayleigh quotients, exactly symmetric or skew unit vectors, and both (absolute) residuals."""
    left, right = project(left, parity), project(right, parity)
    left = divide_no_nan(left, safe_norm(left, axis=[1, 2], keepdims=True))
    right = divide_no_nan(right, safe_norm(right, axis=[1, 2], keepdims=True))
    images = tf.stack([project(operator.matvec(one), parity) for one in tf.unstack(right)])
    coimages = tf.stack([project(operator.rmatvec(one), parity) for one in tf.unstack(left)])
    values = tf.maximum(tf.reduce_sum(left * images, axis=[1, 2]), 0)
    scaled = values[:, tf.newaxis, tf.newaxis]
    residuals = tf.stack(
        [safe_norm(images - scaled * left, axis=[1, 2]), safe_norm(coimages - scaled * right, axis=[1, 2])], axis=1
    )
    # Vectors of a zero value are whatever the breakdown put there.
    nothing = scaled <= 0
    left, right = fix_signs(
        tf.where(nothing, tf.zeros_like(left), left), tf.where(nothing, tf.zeros_like(right), right)
    )
    return values, left, right, residuals


def _next_vector(
    moved: tf.Tensor, basis: tf.Tensor, scale: tf.Tensor, d: int, seed: tf.Tensor, parity: Parity
) -> tuple[tf.Tensor, tf.Tensor]:
    """Unit vector and length of an orthogonalised `moved`; after a breakdown another orthogonal one, and zero."""
    norm = safe_norm(moved)
    eps = epsilon(moved.dtype)

    def replacement():
        noise = tf.random.stateless_normal([d, d], seed=tf.stack([73, seed]), dtype=moved.dtype)
        noise = _flat(project(noise, parity))
        noise, _ = _orthogonalised(divide_no_nan(noise, safe_norm(noise)), basis)
        length = safe_norm(noise)
        # What is left when the whole space is in the basis is rounding.
        vector = tf.where(length > eps**0.5, divide_no_nan(noise, length), tf.zeros_like(noise))
        return vector, tf.zeros_like(norm)

    return tf.cond(norm <= 16 * eps * scale, replacement, lambda: (moved / norm, norm))


def _orthogonalised(vector: tf.Tensor, basis: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`vector` less its components along the rows of `basis` (zero rows do no harm), and those; twice is enough [3]."""
    total = tf.zeros([basis.shape[0]], vector.dtype)
    for _ in range(2):
        coefficients = tf.linalg.matvec(basis, vector)
        vector -= tf.linalg.matvec(basis, coefficients, transpose_a=True)
        total += coefficients
    return vector, total


def _dimension(d: int, parity: Parity) -> int:
    return {"symmetric": d * (d + 1) // 2, "skew": d * (d - 1) // 2, "any": d * d}[parity]


def _with_row(rows: tf.Tensor, index: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    # In place where the runtime may: copying the basis would cost as much as orthogonalising against it.
    return tf.tensor_scatter_nd_update(rows, [[index]], row[tf.newaxis])


def _flat(matrix: tf.Tensor) -> tf.Tensor:
    return tf.reshape(matrix, [-1])


def _padded(rows: tf.Tensor, count: int) -> tf.Tensor:
    padded = tf.pad(rows, [[0, count - rows.shape[0]], [0, 0]])
    return tf.ensure_shape(padded, [count, None])
