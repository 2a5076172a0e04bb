"""Float64 NumPy oracles: dense, slow, and independent of the package."""

import numpy as np


def as_samples(activations, gradients):
    """Float64 `[N, T, d]` arrays; `[N, d]` arrays get one position."""
    activations, gradients = np.asarray(activations, np.float64), np.asarray(gradients, np.float64)
    if activations.ndim == 2:
        activations, gradients = activations[:, None], gradients[:, None]
    return activations, gradients


def weight_gradients(activations, gradients):
    """`D_n = Σ_t a_{n,t} g_{n,t}ᵀ`, `[N, d_in, d_out]`."""
    return np.einsum("nti,nto->nio", *as_samples(activations, gradients))


def fisher(activations, gradients):
    """`F = E_n[vec(D_n) vec(D_n)ᵀ]`, row-major, `[d_in·d_out, d_in·d_out]`."""
    rows = weight_gradients(activations, gradients)
    rows = rows.reshape(len(rows), -1)
    return rows.T @ rows / len(rows)


def rearrange(matrix, d_in, d_out):
    """Van Loan and Pitsianis: `R(A ⊗ G) = vec(A) vec(G)ᵀ`, `[d_in², d_out²]`."""
    blocks = np.asarray(matrix, np.float64).reshape(d_in, d_out, d_in, d_out)
    return blocks.transpose(0, 2, 1, 3).reshape(d_in * d_in, d_out * d_out)


def optimum_error(matrix, d_in, d_out, terms):
    """Smallest `‖matrix − Σ_{k ≤ terms} A_k ⊗ G_k‖_F`, from the dense SVD."""
    values = np.linalg.svd(rearrange(matrix, d_in, d_out), compute_uv=False)
    return np.sqrt(np.sum(values[terms:] ** 2))


def kfac_factors(activations, gradients):
    """`A`: mean over examples, sum over positions of `a aᵀ`; `G`: mean over examples and positions of `g gᵀ`."""
    activations, gradients = as_samples(activations, gradients)
    count, positions, _ = activations.shape
    left = np.einsum("nti,ntj->ij", activations, activations) / count
    right = np.einsum("nto,ntp->op", gradients, gradients) / (count * positions)
    return left, right


def kronecker_sum(terms):
    """`Σ A ⊗ G`, dense."""
    return sum(np.kron(np.asarray(left, np.float64), np.asarray(right, np.float64)) for left, right in terms)


def best_terms(matrix, d_in, d_out, terms):
    """Factors `(√σ u, √σ v)` of the leading triples of the rearrangement."""
    left, values, right = np.linalg.svd(rearrange(matrix, d_in, d_out))
    return [
        (
            np.sqrt(values[k]) * left[:, k].reshape(d_in, d_in),
            np.sqrt(values[k]) * right[k].reshape(d_out, d_out),
        )
        for k in range(min(terms, len(values)))
    ]


def factor_damping(left, right, damping, rule):
    """`(λ_A, λ_G)` of the two damping rules."""
    if rule == "factor":
        return damping, damping
    mean_left, mean_right = np.trace(left) / len(left), np.trace(right) / len(right)
    pi = np.sqrt(mean_left / mean_right) if mean_left > 0 and mean_right > 0 else 1.0
    return pi * np.sqrt(damping), np.sqrt(damping) / pi


def damped_sum(terms, damping, rule="sqrt"):
    """Dense sum of the terms, the first one's factors damped."""
    (left, right), *others = [(np.asarray(a, np.float64), np.asarray(g, np.float64)) for a, g in terms]
    damping_left, damping_right = factor_damping(left, right, damping, rule)
    first = (left + damping_left * np.eye(len(left)), right + damping_right * np.eye(len(right)))
    return kronecker_sum([first, *others])


def damped_solve(terms, matrix, damping, rule="sqrt"):
    """Dense solve of the damped sum against `vec(matrix)`."""
    matrix = np.asarray(matrix, np.float64)
    return np.linalg.solve(damped_sum(terms, damping, rule), matrix.reshape(-1)).reshape(matrix.shape)


def matrix_of(linear_map, d_in, d_out):
    """The matrix of a linear map of `[d_in, d_out]` matrices, column by column."""
    columns = [np.asarray(linear_map(unit.reshape(d_in, d_out))).reshape(-1) for unit in np.eye(d_in * d_out)]
    return np.stack(columns, axis=1)


def forward(matrices, x):
    """A tanh network with a linear output, biases as last rows: inputs `ā` of each layer, and the outputs."""
    inputs, hidden = [], np.asarray(x, np.float64)
    for number, matrix in enumerate(matrices, 1):
        inputs.append(np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1))
        hidden = inputs[-1] @ matrix
        if number < len(matrices):
            hidden = np.tanh(hidden)
    return inputs, hidden


def output_jacobians(matrices, x):
    """`∂z/∂s` of each layer of the same network, `[N, outputs, d_out]`."""
    inputs, outputs = forward(matrices, x)
    count, width = outputs.shape
    back, jacobians = np.broadcast_to(np.eye(width), (count, width, width)), []
    for activations, matrix in zip(reversed(inputs), reversed(matrices), strict=True):
        jacobians.insert(0, back)
        back = (back @ matrix[:-1].T) * (1 - activations[:, :-1] ** 2)[:, None]
    return jacobians


def squared_error_gradients(matrices, x, y):
    """Gradient of the mean squared error by each weight matrix."""
    inputs, outputs = forward(matrices, x)
    slopes = 2 * (outputs - y) / outputs.size
    jacobians = output_jacobians(matrices, x)
    return [np.einsum("ni,nco,nc->io", a, j, slopes) for a, j in zip(inputs, jacobians, strict=True)]


def squared_error_samples(matrices, x):
    """`(ā, g)` of each layer whose second moment is the Gauss–Newton block of the mean squared error."""
    inputs, outputs = forward(matrices, x)
    width = outputs.shape[1]
    # The Hessian by the outputs is 2/width, and a mean over N·width rows needs √width to be a sum over outputs.
    scale = np.sqrt(2 / width) * np.sqrt(width)
    return [
        (np.repeat(a, width, axis=0), scale * j.reshape(-1, j.shape[-1]))
        for a, j in zip(inputs, output_jacobians(matrices, x), strict=True)
    ]


def squared_error_gauss_newton(matrices, x):
    """The whole dense matrix `Jᵀ H J` over all weights, layer after layer, each flattened row-major."""
    inputs, outputs = forward(matrices, x)
    count, width = outputs.shape
    blocks = [
        np.einsum("ni,nco->ncio", a, j).reshape(count * width, -1)
        for a, j in zip(inputs, output_jacobians(matrices, x), strict=True)
    ]
    jacobian = np.concatenate(blocks, axis=1)
    return jacobian.T @ jacobian * 2 / (count * width)


def method_terms(activations, gradients, method):
    """The terms of one of the five methods by dense SVD; SVD methods with KFAC's `tr A` in their first term."""
    base = kfac_factors(activations, gradients)
    matrix, sizes = fisher(activations, gradients), (len(base[0]), len(base[1]))
    if method == "kfac":
        return [base]
    if method == "kfac_corrected":
        return [base, *best_terms(matrix - kronecker_sum([base]), *sizes, 1)]
    (left, right), *others = best_terms(matrix, *sizes, 1 if method == "kpsvd" else 2)
    scale = np.trace(base[0]) / np.trace(left)
    return [(left * scale, right / scale), *others]


def rule_solve(terms, matrix, damping, rule="sqrt", indefinite="absolute"):
    """`B^{-1/2} φ(B^{-1/2} C B^{-1/2})^{-1} B^{-1/2} vec(matrix)`, dense: `B` the damped first term, `C` the second."""
    base = damped_sum(terms[:1], damping, rule)
    values, vectors = np.linalg.eigh(base)
    root = (vectors / np.sqrt(values)) @ vectors.T
    rest = kronecker_sum(terms[1:]) if len(terms) > 1 else np.zeros_like(base)
    x, basis = np.linalg.eigh(root @ rest @ root)
    divisor = 1 + np.abs(x) if indefinite == "absolute" else np.where(1 + x > 0, 1 + x, 1 + np.abs(x))
    inverse = root @ (basis / divisor) @ basis.T @ root
    return (inverse @ np.asarray(matrix, np.float64).reshape(-1)).reshape(matrix.shape)


def split_by_counts(basis):
    """A full basis that begins with the columns given, and for how many directions each of them and the rest stand."""
    d, k = basis.shape
    complement = np.linalg.svd(np.asarray(basis, np.float64), full_matrices=True)[0][:, k:]
    return np.concatenate([basis, complement], axis=1), [1] * k + [d - k] * (d > k)


def diagonal_in_bases(matrix, left, right):
    """`diag((U_A ⊗ U_G)ᵀ F (U_A ⊗ U_G))` with one mean for all directions that a basis does not hold."""
    (left, left_counts), (right, right_counts) = split_by_counts(left), split_by_counts(right)
    full = np.kron(left, right)
    values = np.einsum("ij,ij->j", full, matrix @ full).reshape(len(left), len(right))
    for axis, counts in enumerate((left_counts, right_counts)):
        starts = np.cumsum([0, *counts[:-1]])
        shape = (-1, 1) if axis == 0 else (1, -1)
        values = np.add.reduceat(values, starts, axis=axis) / np.reshape(counts, shape)
    return values


def matrix_of_diagonal(values, left, right):
    """The dense matrix that has this diagonal in the bases, and nothing beside it."""
    (left, left_counts), (right, right_counts) = split_by_counts(left), split_by_counts(right)
    spread = np.repeat(np.repeat(values, left_counts, axis=0), right_counts, axis=1)
    full = np.kron(left, right)
    return full * spread.reshape(-1) @ full.T


def length_kurtosis(activations, gradients, each=1):
    """`E_n[‖D_n‖⁴] / E_n[‖D_n‖²]²`, of examples with `each` gradients next to each other, whose squares add up."""
    squares = np.sum(weight_gradients(activations, gradients) ** 2, axis=(1, 2)).reshape(-1, each).sum(1)
    return np.mean(squares**2) / np.mean(squares) ** 2


def corrected_diagonal(diagonal, left_values, right_values, left_mean, right_mean, damping, factored, rule="sqrt"):
    """`S + (1 − φ) λ + φ ((e_A + λ_A)(e_G + λ_G)ᵀ − e_A e_Gᵀ)`, mean eigenvalues given."""
    damping_left, damping_right = factor_damping(np.diag([left_mean]), np.diag([right_mean]), damping, rule)
    damped = np.outer(left_values + damping_left, right_values + damping_right)
    return diagonal + (1 - factored) * damping + factored * (damped - np.outer(left_values, right_values))
