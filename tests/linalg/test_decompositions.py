"""`eigh`, and which decompositions raise inside a graph."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.linalg.decompositions import eigh


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("size", [1, 2, 7, 130])
def test_eigenpairs_diagonalise_the_matrix(size, dtype, in_graph):
    rng = np.random.default_rng(size)
    matrix = rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size)) * dtype.startswith("complex")
    matrix = (matrix + matrix.conj().T).astype("complex128" if dtype.startswith("complex") else "float64")
    given = tf.constant(matrix if dtype.startswith("complex") else matrix.real, dtype)
    values, vectors = (tf.function(eigh) if in_graph else eigh)(given)
    precision = 1e-4 if dtype in ("float32", "complex64") else 1e-12
    scale = np.linalg.norm(matrix)
    assert values.dtype == given.dtype.real_dtype and vectors.dtype == given.dtype
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), atol=precision * scale)
    np.testing.assert_allclose(
        (vectors * tf.cast(values, dtype)) @ tf.linalg.adjoint(vectors), given, atol=precision * scale
    )
    np.testing.assert_allclose(tf.linalg.adjoint(vectors) @ vectors, np.eye(size), atol=precision * size)


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_decomposition_that_fails_is_nan_and_raises_nothing(monkeypatch, in_graph):
    def refuse(matrix):
        raise tf.errors.InvalidArgumentError(None, None, "did not converge")

    monkeypatch.setattr(tf.linalg, "eigh", refuse)
    values, vectors = (tf.function(eigh) if in_graph else eigh)(tf.eye(3))
    assert np.isnan(values).all() and np.isnan(vectors).all()


RAISING = {
    "cholesky": tf.linalg.cholesky,
    "qr": lambda matrix: tf.linalg.qr(matrix).r,
    "svd": lambda matrix: tf.linalg.svd(matrix, compute_uv=False),
    "triangular_solve": lambda matrix: tf.linalg.triangular_solve(matrix, tf.eye(2)),
    "cholesky_solve": lambda matrix: tf.linalg.cholesky_solve(matrix, tf.eye(2)),
}


@pytest.mark.parametrize("matrix", [[[np.nan, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]])
@pytest.mark.parametrize("name", RAISING)
def test_tensorflows_other_decompositions_raise_in_no_graph(name, matrix):
    """Steps rely on it: nothing can catch an error inside a graph."""
    tf.function(RAISING[name])(tf.constant(matrix))


@pytest.mark.parametrize("in_graph", [True, False])
def test_nan_makes_nan(in_graph):
    values, vectors = (tf.function(eigh) if in_graph else eigh)(tf.constant([[np.nan, 0.0], [1.0, 1.0]]))
    assert np.isnan(values).all() and np.isnan(vectors).all()


def test_tensorflows_own_eigh_raises():
    """Should this fail one day, there is no need of ours."""
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.function(tf.linalg.eigh)(tf.constant([[np.nan, 0.0], [1.0, 1.0]]))


def test_calls_wait_for_no_other():
    """TensorFlow orders stateful callbacks, and with them all that depends on them: layers would take turns."""

    @tf.function
    def several(matrices):
        return [eigh(matrix) for matrix in matrices]

    graph = several.get_concrete_function([tf.TensorSpec([3, 3])] * 4).graph
    calls = [operation for operation in graph.get_operations() if "PyFunc" in operation.type]
    assert len(calls) == 4
    assert not any(call.control_inputs for call in calls)
    assert not any(call.op_def.is_stateful for call in calls)


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_shapes_and_dtypes_are_known_before_it_runs(dtype, in_graph):
    seen = []

    def looked_at(matrix):
        values, vectors = eigh(matrix)
        seen.extend([(values.shape, values.dtype), (vectors.shape, vectors.dtype)])
        return values

    (tf.function(looked_at) if in_graph else looked_at)(tf.eye(5, dtype=dtype))
    assert seen == [((5,), tf.as_dtype(dtype).real_dtype), ((5, 5), tf.as_dtype(dtype))]
