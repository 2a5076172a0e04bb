"""The map that a layer applies to its gradient is symmetric and positive definite, whatever the samples were."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd import KPSVDConv2D
from keras_kpsvd.curvature.approximations import METHODS, TWO_TERM_METHODS
from keras_kpsvd.curvature.inverses import RANK
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall
from keras_kpsvd.curvature.state import BlockCurvature, LayerCurvature
from tests import reference
from tests.curvature.blocks import add_variable
from tests.linalg import cases

SETTINGS = {"deadline": None, "derandomize": True}
SHAPES = [(5, 4), (6, 1), (1, 4), (3, 6)]
# One factor, or the other, or both too large to be inverted whole.
LARGE = [(2 * RANK + 2, 3), (3, 2 * RANK + 2)]


pytestmark = [pytest.mark.usefixtures("untraced"), pytest.mark.slow]


def _update(targets, results):
    values, good = results
    for variable, value in zip(targets, values, strict=True):
        variable.assign(value)
    return bool(good)


@st.composite
def _histories(draw, shapes, dtype="float64", methods=METHODS, positions=(1, 1, 3), corrected=False):
    """Options, batches of samples to refresh from one after another, and how strong the damping is."""
    # By rule "factor" the condition number follows the scales: beyond what float32 resolves, inverses are refused.
    rule = draw(st.sampled_from(["sqrt"] if dtype == "float32" else ["sqrt", "factor"]))
    eigenvalues = "corrected" if corrected else "kronecker"
    indefinite = draw(st.sampled_from(["absolute", "reflect"]))
    options = CurvatureOptions(draw(st.sampled_from(methods)), rule, 0.75, indefinite, eigenvalues)
    shape, shared = draw(st.sampled_from(shapes)), draw(st.sampled_from(positions))
    scales = 10.0 ** np.array(draw(st.tuples(st.integers(-4, 4), st.integers(-4, 4))))
    batches = []
    for _ in range(draw(st.integers(1, 3))):
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        # Fewer examples than rows of either factor: both are singular.
        family, rows = draw(st.sampled_from(cases.FAMILIES)), draw(st.sampled_from([1, 3, 12]))
        samples = family(rng, rows, shared, *shape)
        batches.append([(part * scale).astype(dtype) for part, scale in zip(samples, scales, strict=True)])
    strengths = {"float64": st.integers(-8, 1), "float32": st.integers(-4, -3)}[dtype]
    return options, shape, batches, 10.0 ** draw(strengths)


def _damping(factors, strength, rule):
    """λ relative to the curvature: on samples of any scale the condition numbers stay within what dtypes resolve."""
    means = [np.trace(np.asarray(factor, np.float64)) / len(factor) for factor in factors]
    if min(means) <= 0:
        return strength
    return strength * means[0] * means[1] if rule == "sqrt" else np.sqrt(strength * means[0] * means[1])


def _preconditioned(history, dtype="float64"):
    """The dense matrix of the map, and the block it is of, after all refreshes."""
    options, shape, batches, strength = history
    block = BlockCurvature("block", shape, dtype, options, add_variable)
    for samples in batches:
        assert _update(block.refresh_targets, block.refresh(BatchCurvature(*map(tf.constant, samples))))
        damping = _damping([factor.numpy() for factor in block.factors[0]], strength, options.damping_rule)
        assert _update(block.preconditioner, block.invert(tf.constant(damping, dtype)))
    units = tf.reshape(tf.eye(shape[0] * shape[1], dtype=dtype), [-1, *shape])
    # One by one costs less than tracing where there are few of them.
    each = tf.vectorized_map(block.precondition, units) if len(units) > 100 else map(block.precondition, units)
    matrix = np.stack([np.reshape(column, -1) for column in each], axis=1)
    return matrix.astype("float64"), block, damping


def _assert_positive_definite(matrix, tolerance):
    assert np.isfinite(matrix).all()
    assert np.linalg.norm(matrix - matrix.T) <= tolerance * np.linalg.norm(matrix)
    assert np.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min() > 0


@settings(max_examples=25, **SETTINGS)
@given(_histories(SHAPES))
def test_a_damped_preconditioner_is_symmetric_and_positive_definite(history):
    _assert_positive_definite(_preconditioned(history)[0], 1e-9)


@settings(max_examples=50, **SETTINGS)
@given(_histories([(5, 4), (3, 6)], "float32", TWO_TERM_METHODS, positions=(1,)))
def test_a_damped_two_term_preconditioner_is_positive_definite_in_single_precision_too(history):
    _assert_positive_definite(_preconditioned(history, "float32")[0], 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=25, **SETTINGS)
@given(data=st.data())
def test_a_preconditioner_of_corrected_eigenvalues_is_symmetric_and_positive_definite(dtype, data):
    """Truncated on either side or not, whatever the scales: `S` is a mean of squares."""
    history = data.draw(_histories([*SHAPES, LARGE[0]], dtype, ["kfac", "kpsvd"], corrected=True))
    _assert_positive_definite(_preconditioned(history, dtype)[0], 1e-3 if dtype == "float32" else 1e-9)


@settings(max_examples=100, **SETTINGS)
@given(_histories([(5, 4), (3, 6)], methods=["deflation", "lanczos"], positions=(3,)))
def test_the_averaged_first_term_of_the_svd_methods_stays_positive_semidefinite(history):
    """`V ↦ E[D V Dᵀ]` keeps the cone, so the leading factors lie in it (Perron–Frobenius); clipping is for rounding."""
    options, shape, batches, _ = history
    block = BlockCurvature("block", shape, "float64", options, add_variable)
    for samples in batches:
        assert _update(block.refresh_targets, block.refresh(BatchCurvature(*map(tf.constant, samples))))
        for factor in block.factors[0]:
            values = np.linalg.eigvalsh(factor.numpy())
            assert values[0] >= -1e-6 * np.abs(values).max()


@settings(max_examples=10, **SETTINGS)
@given(_histories(LARGE))
def test_a_preconditioner_with_a_truncated_inverse_is_symmetric_and_positive_definite(history):
    matrix, block, _ = _preconditioned(history)
    assert any(variable.shape == (max(history[1]), RANK) for variable in block.preconditioner)
    _assert_positive_definite(matrix, 1e-9)


@settings(max_examples=20, **SETTINGS)
@given(_histories(SHAPES))
def test_against_its_damped_first_term_a_preconditioner_shortens_or_divides_by_the_rule(history):
    """`B^½ M B^½` has the eigenvalues `1/φ`: 1 with one term, in (0, 1] by rule "absolute", positive by "reflect"."""
    matrix, block, damping = _preconditioned(history)
    options = history[0]
    pairs = [[factor.numpy() for factor in pair] for pair in block.factors]
    base = reference.damped_sum(pairs[:1], damping, options.damping_rule)
    values, vectors = np.linalg.eigh(base)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    found = np.linalg.eigvalsh(root @ (0.5 * (matrix + matrix.T)) @ root)
    # The product is known to rounding times the condition number.
    error = 1e-14 * values.max() * np.linalg.norm(matrix) + 1e-9
    if options.method not in TWO_TERM_METHODS:
        np.testing.assert_allclose(found, 1, atol=error)
        return
    assert found.min() > -error
    if options.indefinite == "absolute":
        assert found.max() < 1 + error


@settings(max_examples=10, **SETTINGS)
@given(
    method=st.sampled_from(METHODS),
    indefinite=st.sampled_from(["absolute", "reflect"]),
    groups=st.sampled_from([1, 2]),
    use_bias=st.booleans(),
    scale=st.integers(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_the_preconditioner_of_a_whole_convolution_is_positive_definite(
    method, indefinite, groups, use_bias, scale, seed
):
    """Kernel and bias together, whatever the groups, through `LayerCurvature`."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    layer = KPSVDConv2D(2, 2, groups=groups, use_bias=use_bias, dtype="float64")
    x = tf.constant(rng.standard_t(2, size=(6, 3, 4, 2)) * 10.0**scale)
    gradient = tf.constant(rng.standard_t(2, size=layer(x).shape))
    curvature = LayerCurvature(layer, CurvatureOptions(method, "sqrt", 0.75, indefinite), add_variable)
    assert _update(curvature.refresh_targets, curvature.refresh([LayerCall(x, gradient)]))
    damping = max(_damping([f.numpy() for f in block.factors[0]], 1e-4, "sqrt") for block in curvature.blocks)
    assert _update(curvature.preconditioner, curvature.invert(tf.constant(damping, tf.float64)))
    sizes = [int(np.prod(variable.shape)) for variable in layer.curvature_variables]

    def column(unit):
        parts = np.split(unit, np.cumsum(sizes)[:-1])
        shaped = [tf.constant(p.reshape(v.shape)) for p, v in zip(parts, layer.curvature_variables, strict=True)]
        return np.concatenate([np.reshape(value, -1) for value in curvature.precondition(shaped)])

    _assert_positive_definite(np.stack([column(unit) for unit in np.eye(sum(sizes))], axis=1), 1e-9)
