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
