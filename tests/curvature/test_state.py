"""One layer's averages against dense float64 oracles, through all five methods."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDConv2D
from keras_kpsvd.curvature import state
from keras_kpsvd.curvature.approximations import METHODS, approximate_terms
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import LayerCall, side_by_side
from keras_kpsvd.curvature.state import LayerCurvature
from keras_kpsvd.linalg import RearrangedFisher
from keras_kpsvd.tracing import graph_function
from tests import reference
from tests.curvature.blocks import (
    D_IN,
    D_OUT,
    DECAY,
    add_variable,
    dependent_samples,
    factors,
    invert,
    make_block,
    refresh,
)


def _distance(one, other):
    one, other = (pair if isinstance(pair, np.ndarray) else reference.kronecker_sum(pair) for pair in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_refresh_is_the_method_itself(method):
    block = make_block(method)
    samples = dependent_samples()
    assert refresh(block, samples)
    assert _distance(factors(block), reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)) < 1e-8
    np.testing.assert_allclose(np.trace(factors(block)[0][0]), np.sum(samples[0].numpy() ** 2) / 12)


@pytest.mark.parametrize(("method", "shared"), [*((name, 1) for name in METHODS), ("kpsvd", 3), ("kfac_corrected", 3)])
def test_equal_batches_leave_every_factor_unchanged(method, shared):
    """Sign and scale are fixed: not only the sum stays, each factor does."""
    block = make_block(method)
    refresh(block, dependent_samples(shared=shared))
    first = factors(block)
    for _ in range(5):
        refresh(block, dependent_samples(shared=shared))
    assert block.count.numpy() == 6
    for (a, g), (first_a, first_g) in zip(factors(block), first, strict=True):
        # A second term's free sign and scale belong to the pair.
        sign = np.sign(np.sum(a * first_a))
        np.testing.assert_allclose(sign * a, first_a, rtol=1e-5, atol=1e-6 * np.abs(first_a).max())
        np.testing.assert_allclose(sign * g, first_g, rtol=1e-5, atol=1e-6 * np.abs(first_g).max())


@pytest.mark.parametrize("method", ["kfac", "kpsvd"])
def test_averages_of_different_batches_are_bias_corrected(method):
    """Weights 1, ρ, ρ², …, normalised: of KFAC's factors one by one; of KPSVD the nearest product to the average."""
    block = make_block(method)
    pairs, expected = [], None
    for seed in range(4):
        samples = dependent_samples(seed)
        refresh(block, samples)
        pairs.append(reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)[0])
        weight = (1 - DECAY) / (1 - DECAY ** (seed + 1))
        if method == "kfac":
            weights = DECAY ** np.arange(seed, -1, -1)
            weights /= weights.sum()
            expected = [tuple(sum(w * pair[side] for w, pair in zip(weights, pairs, strict=True)) for side in (0, 1))]
            for one, other in zip(factors(block)[0], expected[0], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6)
        else:
            average = weight * np.kron(*pairs[-1])
            if expected is not None:
                average = average + (1 - weight) * reference.kronecker_sum(expected)
            expected = reference.best_terms(average, D_IN, D_OUT, 1)
            assert _distance(factors(block), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_gradients_scaled_by_c_scale_the_curvature_by_its_square(method):
    plain, scaled = make_block(method), make_block(method)
    for seed in range(3):
        refresh(plain, dependent_samples(seed))
        refresh(scaled, dependent_samples(seed, scale=1e3))
    expected = 1e6 * reference.kronecker_sum(factors(plain))
    assert _distance(factors(scaled), expected) < 1e-8


@pytest.mark.parametrize("method", ["kpsvd", "deflation", "lanczos", "kfac_corrected"])
def test_triples_at_the_edge_of_rounding_are_not_taken_for_failures(method):
    """Where KFAC leaves next to nothing, and rows so unlike that a second triple is rounding altogether."""
    rng = np.random.default_rng(0)
    for power in np.arange(-16, -11.9, 0.1):
        activations, gradients = (rng.normal(size=(12, 1, size)) for size in (D_IN, D_OUT))
        assert refresh(make_block(method), (activations, gradients[:1] + 10**power * gradients))
        lengths = 10.0 ** rng.uniform(-8, 0, size=(2, 12, 1, 1))
        assert refresh(make_block(method), (lengths[0] * activations, lengths[1] * gradients))


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "kfac_corrected"])
@pytest.mark.parametrize("side", [0, 1])
def test_samples_that_are_not_finite_leave_the_averages_bit_for_bit(method, side):
    block = make_block(method)
    refresh(block, dependent_samples())
    before = factors(block)
    samples = [part.numpy() for part in dependent_samples(1)]
    samples[side][2, 0, 1] = np.nan
    assert not refresh(block, tuple(map(tf.constant, samples)))
    assert block.count.numpy() == 1
    for pair, old in zip(factors(block), before, strict=True):
        for one, other in zip(pair, old, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_dead_batches_fade_and_never_become_nan(method):
    """All-zero gradients: the average shrinks as it should, and the preconditioner stays finite."""
    block = make_block(method)
    dead = dependent_samples(scale=0.0)
    assert refresh(block, dead) and invert(block)
    assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    refresh(block, dependent_samples())
    alive = np.linalg.norm(reference.kronecker_sum(factors(block)))
    for _ in range(3):
        assert refresh(block, dead) and invert(block)
        assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    assert 0 < np.linalg.norm(reference.kronecker_sum(factors(block))) < alive


def _convolution_like(seed, shared=6, rows=40):
    """Batches of one distribution, positions and sides dependent, so that no one-term sum is exact."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(D_IN, D_OUT))
    activations = rng.normal(size=(rows, shared, D_IN)) * np.linspace(1, 3, D_IN) + rng.normal(size=(rows, 1, D_IN))
    gradients = np.tanh(activations @ mixing) * activations[..., :1]
    return tf.constant(activations), tf.constant(gradients)


@pytest.mark.parametrize("method", ["kpsvd", "deflation", "lanczos", "kfac_corrected"])
def test_refreshes_with_several_positions_follow_the_converged_ones(method, monkeypatch):
    """One step a refresh, from the last, fits the averaged Fisher as well as if every refresh ran to the end."""
    warm, converged = make_block(method), make_block(method)
    for seed in range(12):
        assert refresh(warm, _convolution_like(seed))
    monkeypatch.setattr(state, "WARM_STEPS", 500)
    graph_function.cache_clear()
    try:
        for seed in range(12):
            assert refresh(converged, _convolution_like(seed))
    finally:
        graph_function.cache_clear()
    weights = DECAY ** np.arange(12)[::-1]
    fishers = [reference.fisher(*(s.numpy() for s in _convolution_like(seed))) for seed in range(12)]
    averaged = np.einsum("k,kij->ij", weights / weights.sum(), fishers)
    errors = [_distance(factors(block), averaged) for block in (warm, converged)]
    assert errors[0] != errors[1]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize(("method", "triples"), [("kpsvd", 1), ("kfac_corrected", 1), ("deflation", 2), ("lanczos", 2)])
def test_a_refresh_from_the_last_one_takes_three_products_for_each_triple(method, triples, monkeypatch):
    block = make_block(method)
    refresh(block, _convolution_like(0))
    products = []
    for name in ("matvec", "rmatvec"):
        sound = getattr(RearrangedFisher, name)

        def counted(self, matrix, sound=sound):
            products.append(matrix)
            return sound(self, matrix)

        monkeypatch.setattr(RearrangedFisher, name, counted)
    tf.config.run_functions_eagerly(True)
    try:
        refresh(block, _convolution_like(1))
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(products) == 3 * triples


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_group_of_a_layer_is_a_block_of_its_own(method):
    """What one group's samples hold does not touch the other's curvature or step."""
    keras.utils.set_random_seed(0)
    layer = KPSVDConv2D(4, 2, groups=2, dtype="float64")
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(12, 4, 4, 2)))
    calls = [LayerCall(x, tf.constant(rng.normal(size=layer(x).shape)))]
    made = []

    def add(**arguments):
        made.append(add_variable(**arguments))
        return made[-1]

    curvature = LayerCurvature(layer, CurvatureOptions(method, "sqrt", DECAY, "reflect"), add)
    assert len({variable.name for variable in made}) == len(made)
    assert refresh(curvature, calls) and invert(curvature)
    gradients = [tf.constant(rng.normal(size=v.shape)) for v in layer.curvature_variables]
    directions = curvature.precondition(gradients)
    for (a, g), block, given, found in zip(
        side_by_side(layer, calls),
        curvature.blocks,
        layer.to_matrices(gradients),
        layer.to_matrices(directions),
        strict=True,
    ):
        alone = make_block(method, indefinite="reflect", shape=(5, 2))
        assert refresh(alone, (a, g)) and invert(alone)
        np.testing.assert_allclose(found, alone.precondition(given), rtol=1e-9)
        assert block.count.numpy() == 1


@pytest.mark.parametrize("shape", [(4, 1), (1, 3)])
@pytest.mark.parametrize("method", ["kpsvd", "deflation", "kfac_corrected"])
def test_one_filter_or_one_input_with_several_positions_is_the_method_itself(method, shape):
    """The per-example gradients then have one position, and KFAC's base is that of the positions they sum up."""
    rng = np.random.default_rng(0)
    samples = tuple(tf.constant(rng.normal(size=(12, 6, size))) for size in shape)
    block = make_block(method, shape=shape)
    assert refresh(block, samples)
    expected = approximate_terms(*samples, method, symmetric=True)
    assert _distance(factors(block), [(a.numpy(), g.numpy()) for a, g in expected]) < 1e-7


def test_a_value_that_raises_leaves_all_variables_as_they_were():
    variables = [keras.Variable(tf.zeros([2]), dtype="float32") for _ in range(3)]

    @tf.function(autograph=False)
    def assign(x):
        late = tf.linalg.matmul(tf.random.normal([600, 600]), tf.random.normal([600, 600]))[0, :2]
        checked = tf.debugging.check_numerics(late + tf.math.log(x), "raised on purpose")
        state.assign_last(variables, [x, x + 1, checked])

    with pytest.raises(tf.errors.InvalidArgumentError, match="raised on purpose"):
        assign(tf.constant([1.0, -1.0]))
    assert all(np.array_equal(variable.numpy(), [0, 0]) for variable in variables)
    assign(tf.constant([1.0, 2.0]))
    assert [variable.numpy()[0] for variable in variables[:2]] == [1, 2]
