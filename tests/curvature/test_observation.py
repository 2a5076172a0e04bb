"""What a monitor sees of one refresh, against dense float64 oracles."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDConv2D, KPSVDDense
from keras_kpsvd.curvature.observation import block_names, extreme_eigenvalues, observe_layer, observe_samples
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall, side_by_side
from keras_kpsvd.curvature.state import LayerCurvature
from keras_kpsvd.linalg import pack, truncated_inverse
from tests import reference

D_IN, D_OUT = 5, 3


def _samples(shared=1, rows=12, seed=0):
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, shared, D_IN))
    return activations, np.tanh(activations @ rng.normal(size=(D_IN, D_OUT))) * activations[..., :1]


def _terms(count, seed=5):
    rng = np.random.default_rng(seed)
    factors = [(rng.normal(size=(D_IN, D_IN)), rng.normal(size=(D_OUT, D_OUT))) for _ in range(count)]
    return [(a @ a.T / D_IN, g @ g.T / D_OUT) for a, g in factors]


def _dense(samples, terms):
    fisher = reference.fisher(*samples)
    sigmas = np.linalg.svd(reference.rearrange(fisher, D_IN, D_OUT), compute_uv=False)
    return np.linalg.norm(fisher - reference.kronecker_sum(terms)) / np.linalg.norm(fisher), sigmas[0], sigmas[1]


def _observed(samples, terms, dtype="float32"):
    cast = tf.nest.map_structure(lambda one: tf.constant(one, dtype), (samples, terms))
    return observe_samples(BatchCurvature(*cast[0]), cast[1]).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shared", [1, 2, 7])
def test_error_and_singular_values_are_the_dense_ones(shared, count, dtype):
    samples, terms = _samples(shared), _terms(count)
    tolerance = 1e-5 if shared == 1 else 1e-3  # Lanczos stops at a residual of 1e-2
    error, *sigmas = _observed(samples, terms, dtype)
    np.testing.assert_allclose(error, _dense(samples, terms)[0], rtol=1e-5)
    np.testing.assert_allclose(sigmas, _dense(samples, terms)[1:], rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_fewer_and_more_samples_than_dimensions_make_no_difference_to_the_oracle(rows):
    samples, terms = _samples(rows=rows), _terms(1)
    expected = np.array(_dense(samples, terms))
    np.testing.assert_allclose(_observed(samples, terms), expected, rtol=1e-5, atol=1e-5 * expected[1])


@pytest.mark.parametrize("shared", [1, 7])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_errors_have_no_unit_and_singular_values_that_of_the_fisher_block(shared, scale):
    (a, g), ((left, right),) = _samples(shared), _terms(1)
    expected = _observed((a, g), [(left, right)])
    observed = _observed((a * scale, g), [(left * scale, right * scale)])
    np.testing.assert_allclose(observed, expected * [1, scale**2, scale**2], rtol=1e-3)


@pytest.mark.parametrize("shared", [1, 7])
def test_dead_blocks_and_broken_ones_give_numbers(shared):
    zero = tuple(np.zeros_like(one) for one in _samples(shared))
    nothing = [(np.zeros((D_IN, D_IN)), np.zeros((D_OUT, D_OUT)))]
    np.testing.assert_array_equal(_observed(zero, nothing), [0, 0, 0])
    np.testing.assert_array_equal(_observed(zero, _terms(1)), [np.inf, 0, 0])
    np.testing.assert_array_equal(_observed(_samples(shared), nothing)[0], 1)
    for value in (np.nan, np.inf):
        broken = _samples(shared)
        broken[1][3, 0, 1] = value
        assert np.isnan(_observed(broken, _terms(1))).all()
        terms = _terms(1)
        terms[0][0][1, 1] = value
        assert np.isnan(_observed(_samples(shared), terms)).all()


def _spd(size, seed=3):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return (basis * np.geomspace(1e-2, 3, size)) @ basis.T


def test_extreme_eigenvalues_of_whole_inverses_are_the_dense_ones():
    a, g = _spd(6), _spd(4, seed=4)
    values = np.linalg.eigvalsh(np.kron(a, g))
    observed = extreme_eigenvalues(*(tf.constant(np.linalg.inv(one), tf.float32) for one in (a, g)))
    np.testing.assert_allclose(observed, [values[-1], values[0]], rtol=1e-3)


def test_extreme_eigenvalues_of_truncated_inverses_are_those_of_what_they_invert():
    a, g = _spd(30), _spd(4, seed=4)
    inverse = truncated_inverse(tf.constant(a), 0.1, tf.zeros([30, 8], tf.float64))
    dense = np.linalg.inv(inverse.times(tf.eye(30, dtype=tf.float64)).numpy())
    values = np.linalg.eigvalsh(np.kron(dense, g))
    observed = extreme_eigenvalues(inverse, tf.constant(np.linalg.inv(g)))
    np.testing.assert_allclose(observed, [values[-1], values[0]], rtol=1e-9)


def test_an_inverse_without_number_gives_none_and_does_not_raise():
    broken = tf.constant(np.full((3, 3), np.nan))
    assert np.isnan(extreme_eigenvalues(broken, tf.eye(2, dtype=tf.float64))).all()
    assert extreme_eigenvalues(tf.zeros([3, 3]), tf.eye(2))[0] == np.inf


def _add_variable(shape, dtype, name, initializer):
    initial = np.eye(*shape) if initializer == "identity" else np.zeros(shape)
    return keras.Variable(initial.astype(dtype), name=name)


def _curvature(layer):
    return LayerCurvature(layer, CurvatureOptions("kfac", "sqrt", 0.0, "absolute"), _add_variable)


def _convolution(groups=1, name="conv"):
    layer = KPSVDConv2D(2 * groups, 2, groups=groups, name=name)
    layer.build((None, 4, 4, 2 * groups))
    return _curvature(layer)


def test_blocks_are_named_after_their_layer_and_by_its_path_where_two_have_one_name():
    inputs = keras.Input((3,))
    halves = [keras.Sequential([keras.Input((3,)), KPSVDDense(2, name="dense")], name=name) for name in "ab"]
    model = keras.Model(inputs, [half(inputs) for half in halves])
    twins = [_curvature(half.layers[0]) for half in model.layers if isinstance(half, keras.Sequential)]
    names = list(block_names([*twins, _convolution(groups=2)]).values())
    assert names == [["a/dense"], ["b/dense"], ["conv/block_0", "conv/block_1"]]


@pytest.mark.parametrize(("groups", "repeats"), [(1, 1), (2, 1), (1, 3)])
def test_the_first_examples_of_a_layer_are_observed_with_all_or_none_of_their_samples(groups, repeats):
    curvature = _convolution(groups)
    rng = np.random.default_rng(1)
    images = np.tile(rng.normal(size=(6, 4, 4, 2 * groups)), (repeats, 1, 1, 1)).astype("float32")
    gradients = rng.normal(size=(6 * repeats, 3, 3, 2 * groups)).astype("float32")
    for block, (a, g) in zip(curvature.blocks, side_by_side(curvature.layer, [_call(images, gradients)]), strict=True):
        for variable, value in zip(block.refresh_targets, reference.kfac_factors(a, g), strict=False):
            variable.assign(pack(tf.constant(value)))
    used = np.concatenate([np.arange(4) + 6 * repeat for repeat in range(repeats)])
    rows = tf.constant(4 * repeats + repeats - 1)  # not enough for a fifth
    observed = observe_layer(curvature, [_call(images, gradients)], rows, repeats).numpy()
    first = side_by_side(curvature.layer, [_call(images[used], gradients[used])])
    assert observed.shape == (groups, 3)
    for values, block, (a, g) in zip(observed, curvature.blocks, first, strict=True):
        fisher = reference.fisher(a, g)
        rest = fisher - reference.kronecker_sum([[factor.numpy() for factor in block.factors[0]]])
        np.testing.assert_allclose(values[0], np.linalg.norm(rest) / np.linalg.norm(fisher), rtol=1e-5)
        sigmas = np.linalg.svd(reference.rearrange(fisher, *block.shape), compute_uv=False)
        np.testing.assert_allclose(values[1:], sigmas[:2], rtol=1e-3)


def _call(images, gradients):
    return LayerCall(tf.constant(images), tf.constant(gradients))
