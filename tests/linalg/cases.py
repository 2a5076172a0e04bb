"""Samples that each algorithm must get right, and the comparison every route is held to."""

import numpy as np

import keras_kpsvd.linalg as linalg
from tests import reference

# Permitted excess of ‖F − F̂‖ over the dense optimum, relative to ‖F‖.
EXCESS = {"float32": 1e-4, "float64": 1e-8}


def dependent(rng, count, shared, d_in, d_out):
    """Gradients that are a function of the activations."""
    activations = rng.standard_normal((count, shared, d_in))
    return activations, np.tanh(activations @ rng.standard_normal((d_in, d_out)))


def independent(rng, count, shared, d_in, d_out):
    """Where KFAC's assumption holds."""
    return rng.standard_normal((count, shared, d_in)), rng.standard_normal((count, shared, d_out))


def heavy_tailed(rng, count, shared, d_in, d_out):
    """Student-t samples with infinite variance, weighted by log-normal numbers."""
    activations = rng.standard_t(1.5, (count, shared, d_in))
    gradients = np.tanh(activations @ rng.standard_normal((d_in, d_out)))
    return activations, gradients * rng.lognormal(0, 2, (count, 1, 1))


def dead_units(rng, count, shared, d_in, d_out):
    """Zero columns and zero rows on either side."""
    activations, gradients = dependent(rng, count, shared, d_in, d_out)
    activations[..., 0] = 0
    gradients[..., -1] = gradients[..., -1] * (d_out == 1)
    activations[::3] = 0
    gradients[1::4] = 0
    return activations, gradients


def nearly_constant(rng, count, shared, d_in, d_out):
    """Activations that hardly vary, with a bias column."""
    activations = np.ones(d_in) * 2 + 1e-4 * rng.standard_normal((count, shared, d_in))
    activations[..., -1] = 1
    return activations, rng.standard_normal((count, shared, d_out))


def rank_one(rng, count, shared, d_in, d_out):
    """One example, many times: R(F) has a single triple (for one position)."""
    activations, gradients = independent(rng, 1, shared, d_in, d_out)
    return np.repeat(activations, count, axis=0), np.repeat(gradients, count, axis=0)


def rotations(rng, count, shared, d_in, d_out):
    """`D_n` a random rotation of the plane plus half of `e₁e₁ᵀ`: the second term is skew ⊗ skew."""
    angles = rng.uniform(0, 2 * np.pi, count)
    gradients = np.zeros((count, max(shared, 2), d_out))
    gradients[:, 0, 0], gradients[:, 0, 1] = np.cos(angles), -np.sin(angles)
    gradients[:, 0, 0] += 0.5
    gradients[:, 1, 0], gradients[:, 1, 1] = np.sin(angles), np.cos(angles)
    activations = np.zeros((count, max(shared, 2), d_in))
    activations[:, 0, 0] = activations[:, 1, 1] = 1
    return activations, gradients


FAMILIES = (dependent, independent, heavy_tailed, dead_units, nearly_constant, rank_one)


def excess(activations, gradients, terms, base=()):
    """`(‖F − Σ terms‖ − optimum)`, relative to `‖F‖`, or `‖F‖ + ‖Σ base‖` with the terms of `base` taken off `F`."""
    matrix = reference.fisher(activations, gradients)
    size = np.linalg.norm(matrix)
    if base:
        taken = reference.kronecker_sum(base)
        matrix, size = matrix - taken, size + np.linalg.norm(taken)
    d_in, d_out = np.shape(activations)[-1], np.shape(gradients)[-1]
    error = np.linalg.norm(matrix - reference.kronecker_sum(terms))
    return (error - reference.optimum_error(matrix, d_in, d_out, len(terms))) / max(size, 1e-300)


def operator(activations, gradients, base=(), coefficients=None):
    """`RearrangedFisher` with the terms of `base` taken off, in the samples' dtype."""
    result = linalg.RearrangedFisher(activations, gradients)
    for left, right in base:
        result = result.deflate(left.astype(activations.dtype), right.astype(activations.dtype), *(coefficients or ()))
    return result
