"""A block's corrected eigenvalues against dense float64 oracles: averages, turned bases, damping, failures."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDConv2D, KPSVDDense
from keras_kpsvd.curvature import corrected, state
from keras_kpsvd.curvature.corrected import factored_part
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall, side_by_side
from keras_kpsvd.curvature.state import LayerCurvature, invert_layers
from keras_kpsvd.tracing import graph_function
from tests import reference
from tests.curvature.blocks import DECAY, add_variable, invert, make_block, refresh

LAMBDA = 0.01
SMALL, LARGE = (4, 3), (12, 9)


@pytest.fixture(autouse=True)
def small_rank(monkeypatch):
    """Of factors of more than 8 rows 4 eigenvectors are kept."""
    monkeypatch.setattr(state, "RANK", 4)


def _block(shape=SMALL, method="kfac", rule="sqrt", dtype="float64"):
    return make_block(method, rule, shape=shape, eigenvalues="corrected", dtype=dtype)


def _samples(seed=0, shape=SMALL, shared=1, rows=12):
    rng = np.random.default_rng(seed)
    d_in, d_out = shape
    activations = rng.normal(size=(rows, shared, d_in)) * np.exp(-np.arange(d_in) / 3.0)
    gradients = np.tanh(activations @ rng.normal(size=shape)) * activations[..., :1]
    return activations, gradients * np.exp(-np.arange(d_out) / 2.0)


def _state(block):
    """`U_A`, `U_G`, `e_A`, `e_G`, `S`."""
    return [variable.numpy() for variable in block.refresh_targets[3:-2]]


def _map(block, shape):
    return reference.matrix_of(lambda one: block.precondition(tf.constant(one)).numpy(), *shape)


def _subspace(basis):
    return basis @ basis.T


@pytest.mark.parametrize("shape", [SMALL, LARGE, (4, 9), (12, 3)])
@pytest.mark.parametrize("shared", [1, 2, 5, 20])  # The last ones are reduced to per-example gradients.
def test_the_first_preconditioner_is_the_damped_inverse_of_the_blocks_own_diagonal(shape, shared):
    block, samples = _block(shape), _samples(shape=shape, shared=shared)
    assert refresh(block, samples) and invert(block, LAMBDA, 0.0)
    a, g = reference.kfac_factors(*samples)
    left, right = _state(block)[:2]
    for factor, basis in ((a, left), (g, right)):
        vectors = np.linalg.eigh(factor)[1][:, -basis.shape[1] :]
        np.testing.assert_allclose(_subspace(basis), _subspace(vectors), atol=3e-2)
    diagonal = reference.diagonal_in_bases(reference.fisher(*samples), left, right)
    expected = reference.matrix_of_diagonal(1 / (diagonal + LAMBDA), left, right)
    np.testing.assert_allclose(_map(block, shape), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["kfac", "kpsvd"])
def test_it_is_nearer_to_the_fisher_block_than_its_kronecker_product(method):
    block, samples = _block(method=method), _samples()
    refresh(block, samples)
    fisher = reference.fisher(*samples)
    left, right, *_, diagonal = _state(block)
    ours = np.linalg.norm(reference.matrix_of_diagonal(diagonal, left, right) - fisher)
    factors = [tuple(one.numpy() for one in pair) for pair in block.factors]
    assert ours < np.linalg.norm(reference.kronecker_sum(factors) - fisher)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_averages_are_bias_corrected_and_carried_over_when_the_bases_turn(shape):
    block, turns = _block(shape), [True, False, True, False, True]
    expected, old = None, None
    for number, turn in enumerate(turns):
        samples = _samples(number, shape)
        assert refresh(block, samples, turn)
        left, right, *_, diagonal = _state(block)
        if number and not turn:
            np.testing.assert_array_equal(left, old[0])
            np.testing.assert_array_equal(right, old[1])
        if number and turn:
            assert np.linalg.norm(_subspace(left[:, -1:]) - _subspace(old[0][:, -1:])) > 1e-3
            expected = reference.diagonal_in_bases(reference.matrix_of_diagonal(expected, *old), left, right)
        now = reference.diagonal_in_bases(reference.fisher(*samples), left, right)
        weight = (1 - DECAY) / (1 - DECAY ** (number + 1))
        expected = now if number == 0 else (1 - weight) * expected + weight * now
        np.testing.assert_allclose(diagonal, expected, rtol=1e-6, atol=1e-9 * diagonal.max())
        old = left, right


@pytest.mark.parametrize("rule", ["sqrt", "factor"])
@pytest.mark.parametrize("factored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_damping_is_that_of_the_formula(shape, factored, rule):
    block = _block(shape, rule=rule)
    for seed in range(2):
        refresh(block, _samples(seed, shape))
    assert invert(block, LAMBDA, factored)
    left, right, left_values, right_values, diagonal = _state(block)
    (a, g), *_ = ([one.numpy() for one in pair] for pair in block.factors)
    if shape == SMALL:
        np.testing.assert_allclose(left_values, np.linalg.eigvalsh(a), atol=1e-9)
        np.testing.assert_allclose(right_values, np.linalg.eigvalsh(g), atol=1e-9)
    means = np.trace(a) / len(a), np.trace(g) / len(g)
    damped = reference.corrected_diagonal(diagonal, left_values, right_values, *means, LAMBDA, factored, rule)
    expected = reference.matrix_of_diagonal(1 / damped, left, right)
    np.testing.assert_allclose(_map(block, shape), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [SMALL, LARGE, (4, 9), (12, 3)])
def test_without_a_preconditioner_gradients_stay_what_they_are(shape):
    block = _block(shape)
    np.testing.assert_array_equal(_map(block, shape), np.eye(shape[0] * shape[1]))
    assert invert(block, LAMBDA, 0.0)
    np.testing.assert_array_equal(_map(block, shape), np.eye(shape[0] * shape[1]))
    refresh(block, _samples(shape=shape))
    np.testing.assert_allclose(_map(block, shape), np.eye(shape[0] * shape[1]), atol=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_samples_that_are_not_finite_leave_everything_bit_for_bit(side):
    block = _block(LARGE)
    refresh(block, _samples(shape=LARGE))
    before = [variable.numpy() for variable in block.refresh_targets]
    samples = _samples(1, LARGE)
    samples[side][2, 0, 1] = np.nan
    assert not refresh(block, samples)
    for variable, old in zip(block.refresh_targets, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)


@pytest.mark.parametrize("broken", ["nan", "not orthonormal"])
def test_a_decomposition_that_fails_leaves_everything_bit_for_bit(broken, monkeypatch):
    block = _block(LARGE)
    refresh(block, _samples(shape=LARGE))
    before = [variable.numpy() for variable in block.refresh_targets]
    sound = corrected.factor_eigenbasis

    def wrong(factor, start):
        values, basis = sound(factor, start)
        return (values * float("nan"), basis) if broken == "nan" else (values, basis * 1.5)

    monkeypatch.setattr(corrected, "factor_eigenbasis", wrong)
    graph_function.cache_clear()
    try:
        assert not refresh(block, _samples(1, LARGE))
    finally:
        graph_function.cache_clear()
    for variable, old in zip(block.refresh_targets, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old)


def test_a_preconditioner_that_is_not_finite_is_refused():
    block = _block()
    refresh(block, _samples())
    assert invert(block, LAMBDA, 0.0)
    before = block.preconditioner[0].numpy()
    values, good = block.invert(tf.constant(np.nan, tf.float64), 0.0)
    assert not good
    np.testing.assert_array_equal(values[0], before)


def test_a_damping_next_to_nothing_leaves_inverses_finite():
    block = _block(dtype="float32")
    activations, gradients = (part.astype("float32") for part in _samples())
    assert refresh(block, (activations, 0 * gradients))
    values, good = block.invert(tf.constant(1e-45), 0.0)
    assert good and np.isfinite(values[0]).all()
    assert float(block.directions_left_free(tf.constant(0.0))) == 0


def test_dead_batches_never_become_nan():
    block = _block(LARGE)
    activations, gradients = _samples(shape=LARGE)
    assert refresh(block, (activations, 0 * gradients)) and invert(block, LAMBDA, 0.0)
    np.testing.assert_allclose(_map(block, LARGE), np.eye(108) / LAMBDA, rtol=1e-6)
    assert refresh(block, (activations, gradients)) and invert(block, LAMBDA, 1.0)
    assert np.isfinite(block.preconditioner[0].numpy()).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [3, 6])
def test_convolutions_have_the_diagonal_of_their_exact_weight_sharing(groups, size):
    """From samples with few positions, from per-example gradients with many."""
    keras.utils.set_random_seed(0)
    layer = KPSVDConv2D(6, 2, groups=groups, dtype="float64")
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(9, size, size, 4)))
    calls = [LayerCall(x, tf.constant(rng.normal(size=layer(x).shape)))]
    options = CurvatureOptions("kfac", "sqrt", DECAY, "absolute", "corrected")
    curvature = LayerCurvature(layer, options, add_variable)
    values, good = curvature.refresh(calls)
    assert good
    for variable, value in zip(curvature.refresh_targets, values, strict=True):
        variable.assign(value)
    for (a, g), block in zip(side_by_side(layer, calls), curvature.blocks, strict=True):
        left, right, *_, diagonal = _state(block)
        expected = reference.diagonal_in_bases(reference.fisher(a.numpy(), g.numpy()), left, right)
        np.testing.assert_allclose(diagonal, expected, rtol=1e-7, atol=1e-9 * expected.max())


@pytest.mark.parametrize("shared", [1, 2, 20])
def test_kurtoses_of_examples_are_averaged_likewise(shared):
    block, kurtoses = _block(), []
    for number in range(4):
        activations, gradients = _samples(number, shared=shared)
        rows = np.concatenate([np.arange(0, 12, 3), np.arange(1, 12, 3), np.arange(2, 12, 3)])  # Three of each example.
        batch = BatchCurvature(tf.constant(activations[rows]), tf.constant(gradients[rows]))
        values, good = block.refresh(batch, True, 3)
        assert good
        for variable, value in zip(block.refresh_targets, values, strict=True):
            variable.assign(value)
        kurtoses.append(reference.length_kurtosis(activations, gradients, 3))
        weights = DECAY ** np.arange(number, -1, -1)
        np.testing.assert_allclose(block.kurtosis, weights @ kurtoses / weights.sum(), rtol=1e-7)
    assert max(kurtoses) > 1.1 * min(kurtoses)


def test_each_block_of_a_layer_has_a_kurtosis():
    layer = KPSVDConv2D(4, 2, groups=2, use_bias=False, dtype="float64")
    layer.build((None, 5, 5, 4))
    curvature = LayerCurvature(layer, CurvatureOptions("kfac", "sqrt", DECAY, "absolute", "corrected"), add_variable)
    np.testing.assert_array_equal(curvature.kurtoses(), [0, 0])  # Nothing is known yet.
    expected = []
    for seed, block in enumerate(curvature.blocks):
        activations, gradients = _samples(seed, block.shape, shared=2)
        refresh(block, (activations, (1 + seed) * gradients))
        expected.append(reference.length_kurtosis(activations, gradients))
    np.testing.assert_allclose(curvature.kurtoses(), expected, rtol=1e-5)
    assert abs(expected[0] - expected[1]) > 0.1


@pytest.mark.parametrize(
    ("directions", "kurtoses", "part"),
    [
        (0.0, [1.0, 1.0], 0.0),
        (10.0, [1.0, 1.0], 0.0),
        (14.0, [1.0, 1.0], 0.25),
        (18.0, [1.0, 1.0], 0.5),
        (1e4, [1.0, 1.0], 1.0),
        (0.0, [2.5, 3.0], 0.25),
        (0.0, [99.0, 3.1], 0.55),
        (14.0, [3.1, 3.1], 0.55),
        (18.0, [2.5, 3.0], 0.5),
        (0.0, [99.0, 1.0], 0.0),
        (0.0, [99.0, 98.0], 1.0),
        (0.0, [0.0, 3.1], 0.55),  # Of one block nothing is known.
    ],
)
def test_the_factors_are_damped_where_a_batch_says_little_by_the_larger_of_two_measures(
    directions, kurtoses, part, monkeypatch
):
    for name, value in (("ENOUGH", 5.0), ("TOO_MANY", 13.0), ("EVEN", 2.0), ("UNEVEN", 4.0)):
        monkeypatch.setattr(corrected, name, value)
    found = factored_part(*map(tf.constant, (kurtoses, directions, 2.0)))
    assert float(found) == pytest.approx(part, abs=1e-6)


def test_of_a_batch_that_nothing_is_known_of_factors_are_not_damped():
    assert float(factored_part(tf.zeros([2]), tf.constant(7.0), tf.constant(0))) == 0


def test_layers_are_inverted_with_the_part_given():
    options = CurvatureOptions("kfac", "sqrt", DECAY, "absolute", "corrected")
    curvatures, dampings = [], {}
    for seed, damping in ((0, 0.01), (1, 0.03)):
        layer = KPSVDDense(SMALL[1], dtype="float64")
        layer.build((None, SMALL[0] - 1))
        curvatures.append(LayerCurvature(layer, options, add_variable))
        refresh(curvatures[-1].blocks[0], _samples(seed))
        dampings[layer] = tf.constant(damping)
    results = invert_layers(curvatures, dampings, factored=tf.constant(0.7))
    assert all(results)
    for one in curvatures:
        left_values, right_values, diagonal = _state(one.blocks[0])[2:]
        (a, g), *_ = ([factor.numpy() for factor in pair] for pair in one.blocks[0].factors)
        means, damping = (np.trace(a) / 4, np.trace(g) / 3), float(dampings[one.layer])
        damped = reference.corrected_diagonal(diagonal, left_values, right_values, *means, damping, 0.7)
        np.testing.assert_allclose(one.blocks[0].preconditioner[0], 1 / damped, rtol=1e-5)
