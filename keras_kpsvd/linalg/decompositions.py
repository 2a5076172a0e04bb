"""The one decomposition that can raise where it runs.

Cholesky factors, singular values, QR and triangular solves give NaN where they fail. TensorFlow's `eigh` raises, and
nothing can catch that inside a graph: the step would end half way. So it is called from Python there, one operation by
itself, which needs no other thread of TensorFlow's to go on. The callback is declared stateless: stateful ones run one
after another, and everything around them does, which made a step of `kfac_corrected` a sixth longer
(benchmarks/README.md, `guards.py`). (NumPy's LAPACK could be caught as well, but its threads fight TensorFlow's: 20
decompositions of 64 rows in one graph took 68 ms, so 6 ms, uncaught 4 ms, on two cores.)
"""

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.record import stop_recording
from tensorflow.python.ops import control_flow_util


def eigh(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Eigenvalues in ascending order, and eigenvectors as columns, of a symmetric or Hermitian matrix.

    Args:
        matrix: `[d, d]`, real or complex; only its lower triangle is read.

    Returns:
        `(eigenvalues [d], eigenvectors [d, d])`, the first real. NaN where the decomposition fails, as it does on NaN.
    """
    matrix = tf.convert_to_tensor(matrix)
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        eigenvalues, vectors = tf.linalg.eigh(matrix)  # XLA's own, which does not raise and cannot call the host.
    elif tf.executing_eagerly():
        eigenvalues, vectors = _eigh(matrix)
    else:
        eigenvalues, vectors = tf.numpy_function(_eigh_of_array, [matrix], [matrix.dtype] * 2, stateful=False)
        eigenvalues.set_shape(matrix.shape[:-1])
        vectors.set_shape(matrix.shape)
    return tf.math.real(eigenvalues), vectors


def _eigh(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    try:
        with stop_recording():
            return tf.linalg.eigh(matrix)
    except tf.errors.OpError:
        nan = tf.cast(float("nan"), matrix.dtype)
        return tf.fill(matrix.shape[:-1], nan), tf.fill(matrix.shape, nan)


def _eigh_of_array(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(part.numpy() for part in _eigh(tf.convert_to_tensor(matrix)))
