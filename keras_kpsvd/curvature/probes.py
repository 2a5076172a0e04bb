"""Whether decompositions gave what they should, told by one vector."""

from __future__ import annotations

import tensorflow as tf

from keras_kpsvd.linalg import Inverse, TruncatedInverse
from keras_kpsvd.tracing import traced_once

# A decomposition is trusted when it reproduces a probe vector to this part of the sizes that went into it.
PROBE_TOLERANCE = 1e-2


def _probe(size: int | tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.cos(tf.constant(2.4, dtype) * tf.cast(tf.range(size), dtype))[:, tf.newaxis]


def inverts(inverse: Inverse, factor: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Whether `inverse` solves with `factor + λI`; see `_reproduces`."""
    return traced_once(_reproduces, None, inverse, factor, lam)


def _reproduces(_: None, inverse: Inverse, factor: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Whether `inverse` solves with `factor + λI`, to a backward error; a truncated one, within its subspace.

    The residual of one probe vector is measured against the sizes that made it (Rigal & Gaches 1967), so that an
    ill-conditioned factor is not taken for a failure. A Rayleigh–Ritz subspace need not have converged to pass.
    """
    if not isinstance(inverse, TruncatedInverse):
        probe = _probe(tf.shape(factor)[0], factor.dtype)
        solution = tf.matmul(inverse, probe)
        residual = tf.norm(tf.matmul(factor, solution) + lam * solution - probe)
        return residual <= PROBE_TOLERANCE * ((tf.norm(factor) + lam) * tf.norm(solution) + tf.norm(probe))
    basis = inverse.basis
    probe = _probe(tf.shape(basis)[1], basis.dtype)
    inside = (inverse.shift + inverse.weights)[:, None] * probe
    solution = tf.matmul(basis, inside)
    image = tf.matmul(basis, tf.matmul(factor, solution) + lam * solution, transpose_a=True)
    sizes = (tf.norm(factor) + lam) * tf.norm(inside) + tf.norm(probe)
    orthonormal = tf.norm(tf.matmul(basis, tf.matmul(basis, probe), transpose_a=True) - probe)
    return (
        (tf.norm(image - probe) <= PROBE_TOLERANCE * sizes)
        & (orthonormal <= PROBE_TOLERANCE * tf.norm(probe))
        & (inverse.shift > 0)
    )


def orthonormalises(basis: tf.Tensor, inverse: Inverse, factor: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
    """Whether `Kᵀ (factor + λI) K = I`, likewise; of a truncated factor with what its truncation stands for."""
    probe = _probe(tf.shape(basis)[1], basis.dtype)
    image = tf.matmul(basis, probe)
    truncated = isinstance(inverse, TruncatedInverse)
    damped = inverse.inverse().times(image) if truncated else tf.matmul(factor, image) + lam * image
    residual = tf.norm(tf.matmul(basis, damped, transpose_a=True) - probe)
    return residual <= PROBE_TOLERANCE * (tf.norm(basis) * tf.norm(damped) + tf.norm(probe))


def is_orthonormal(basis: tf.Tensor) -> tf.Tensor:
    """Whether `UᵀU = I`, likewise."""
    return traced_once(_is_orthonormal, None, basis)


def _is_orthonormal(_: None, basis: tf.Tensor) -> tf.Tensor:
    probe = _probe(tf.shape(basis)[1], basis.dtype)
    image = tf.matmul(basis, tf.matmul(basis, probe), transpose_a=True)
    return tf.norm(image - probe) <= PROBE_TOLERANCE * tf.norm(probe)
