"""One layer's averages and preconditioners against dense float64 oracles, through all five methods."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDConv2D
from keras_kpsvd.curvature import inverses, state
from keras_kpsvd.curvature.approximations import METHODS, approximate_terms
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall, side_by_side
from keras_kpsvd.curvature.state import BlockCurvature, LayerCurvature
from keras_kpsvd.linalg import RearrangedFisher, decompositions
from keras_kpsvd.tracing import graph_function
from tests import reference

D_IN, D_OUT, DECAY = 4, 3, 0.75


def _layer(method, rule="sqrt", indefinite="absolute", shape=(D_IN, D_OUT), eigenvalues="kronecker"):
    made = []

    def add_variable(shape, dtype, name, initializer):
        initial = np.eye(*shape) if initializer == "identity" else np.full(shape, float(initializer == "ones"))
        made.append(keras.Variable(initial.astype(dtype), name=name))
        return made[-1]

    options = CurvatureOptions(method, rule, DECAY, indefinite, eigenvalues)
    return BlockCurvature("block", shape, "float64", options, add_variable)


def _samples(seed=0, scale=1.0, shared=1, rows=12):
    """Dependent activations and gradients, so that no one-term sum is exact."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, shared, D_IN))
    gradients = np.tanh(activations @ rng.normal(size=(D_IN, D_OUT))) * activations[..., :1] * scale
    return tf.constant(activations), tf.constant(gradients)


def _refresh(block, samples):
    values, good = block.refresh(BatchCurvature(*samples) if isinstance(block, BlockCurvature) else samples)
    for variable, value in zip(block.refresh_targets, values, strict=True):
        variable.assign(value)
    return bool(good)


def _invert(block, damping=0.01):
    values, good = block.invert(tf.constant(damping, tf.float64))
    for variable, value in zip(block.preconditioner, values, strict=True):
        variable.assign(value)
    return bool(good)


def _factors(block):
    return [(a.numpy(), g.numpy()) for a, g in block.factors]


def _distance(one, other):
    one, other = (pair if isinstance(pair, np.ndarray) else reference.kronecker_sum(pair) for pair in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_refresh_is_the_method_itself(method):
    block = _layer(method)
    samples = _samples()
    assert _refresh(block, samples)
    assert _distance(_factors(block), reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)) < 1e-8
    np.testing.assert_allclose(np.trace(_factors(block)[0][0]), np.sum(samples[0].numpy() ** 2) / 12)


@pytest.mark.parametrize(("method", "shared"), [*((name, 1) for name in METHODS), ("kpsvd", 3), ("kfac_corrected", 3)])
def test_equal_batches_leave_every_factor_unchanged(method, shared):
    """Sign and scale are fixed: not only the sum stays, each factor does."""
    block = _layer(method)
    _refresh(block, _samples(shared=shared))
    first = _factors(block)
    for _ in range(5):
        _refresh(block, _samples(shared=shared))
    assert block.count.numpy() == 6
    for (a, g), (first_a, first_g) in zip(_factors(block), first, strict=True):
        # A second term's free sign and scale belong to the pair.
        sign = np.sign(np.sum(a * first_a))
        np.testing.assert_allclose(sign * a, first_a, rtol=1e-5, atol=1e-6 * np.abs(first_a).max())
        np.testing.assert_allclose(sign * g, first_g, rtol=1e-5, atol=1e-6 * np.abs(first_g).max())


@pytest.mark.parametrize("method", ["kfac", "kpsvd"])
def test_averages_of_different_batches_are_bias_corrected(method):
    """Weights 1, ρ, ρ², …, normalised: of KFAC's factors one by one; of KPSVD the nearest product to the average."""
    block = _layer(method)
    pairs, expected = [], None
    for seed in range(4):
        samples = _samples(seed)
        _refresh(block, samples)
        pairs.append(reference.method_terms(*(s.numpy()[:, 0] for s in samples), method)[0])
        weight = (1 - DECAY) / (1 - DECAY ** (seed + 1))
        if method == "kfac":
            weights = DECAY ** np.arange(seed, -1, -1)
            weights /= weights.sum()
            expected = [tuple(sum(w * pair[side] for w, pair in zip(weights, pairs, strict=True)) for side in (0, 1))]
            for one, other in zip(_factors(block)[0], expected[0], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6)
        else:
            average = weight * np.kron(*pairs[-1])
            if expected is not None:
                average = average + (1 - weight) * reference.kronecker_sum(expected)
            expected = reference.best_terms(average, D_IN, D_OUT, 1)
            assert _distance(_factors(block), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_gradients_scaled_by_c_scale_the_curvature_by_its_square(method):
    plain, scaled = _layer(method), _layer(method)
    for seed in range(3):
        _refresh(plain, _samples(seed))
        _refresh(scaled, _samples(seed, scale=1e3))
    expected = 1e6 * reference.kronecker_sum(_factors(plain))
    assert _distance(_factors(scaled), expected) < 1e-8


@pytest.mark.parametrize(
    ("method", "rule", "indefinite"),
    [
        ("kfac", "sqrt", "absolute"),
        ("kpsvd", "factor", "absolute"),
        ("deflation", "factor", "reflect"),
        ("lanczos", "sqrt", "absolute"),
        ("kfac_corrected", "sqrt", "reflect"),
    ],
)
def test_preconditioning_is_the_dense_solve(method, rule, indefinite):
    gradient = np.random.default_rng(9).normal(size=(D_IN, D_OUT))
    block = _layer(method, rule, indefinite)
    for seed in range(2):
        _refresh(block, _samples(seed))
    assert _invert(block)
    expected = reference.rule_solve(_factors(block), gradient, 0.01, rule, indefinite)
    actual = block.precondition(tf.constant(gradient)).numpy()
    assert np.linalg.norm(actual - expected) < 1e-6 * np.linalg.norm(expected)


def test_without_a_refresh_the_preconditioner_is_the_identity():
    for method in METHODS:
        block = _layer(method)
        assert _invert(block)
        gradient = np.arange(D_IN * D_OUT, dtype=float).reshape(D_IN, D_OUT)
        np.testing.assert_allclose(block.precondition(tf.constant(gradient)), gradient, rtol=1e-12)


@pytest.mark.parametrize("method", ["kpsvd", "deflation", "lanczos", "kfac_corrected"])
def test_triples_at_the_edge_of_rounding_are_not_taken_for_failures(method):
    """Where KFAC leaves next to nothing, and rows so unlike that a second triple is rounding altogether."""
    rng = np.random.default_rng(0)
    for power in np.arange(-16, -11.9, 0.1):
        activations, gradients = (rng.normal(size=(12, 1, size)) for size in (D_IN, D_OUT))
        assert _refresh(_layer(method), (tf.constant(activations), gradients[:1] + 10**power * tf.constant(gradients)))
        lengths = 10.0 ** rng.uniform(-8, 0, size=(2, 12, 1, 1))
        assert _refresh(_layer(method), (tf.constant(lengths[0] * activations), tf.constant(lengths[1] * gradients)))


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "kfac_corrected"])
@pytest.mark.parametrize("side", [0, 1])
def test_samples_that_are_not_finite_leave_the_averages_bit_for_bit(method, side):
    block = _layer(method)
    _refresh(block, _samples())
    before = _factors(block)
    samples = [part.numpy() for part in _samples(1)]
    samples[side][2, 0, 1] = np.nan
    assert not _refresh(block, tuple(map(tf.constant, samples)))
    assert block.count.numpy() == 1
    for pair, old in zip(_factors(block), before, strict=True):
        for one, other in zip(pair, old, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_dead_batches_fade_and_never_become_nan(method):
    """All-zero gradients: the average shrinks as it should, and the preconditioner stays finite."""
    block = _layer(method)
    dead = _samples(scale=0.0)
    assert _refresh(block, dead) and _invert(block)
    assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    _refresh(block, _samples())
    alive = np.linalg.norm(reference.kronecker_sum(_factors(block)))
    for _ in range(3):
        assert _refresh(block, dead) and _invert(block)
        assert all(np.isfinite(v.numpy()).all() for v in block.preconditioner)
    assert 0 < np.linalg.norm(reference.kronecker_sum(_factors(block))) < alive


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
    warm, converged = _layer(method), _layer(method)
    for seed in range(12):
        assert _refresh(warm, _convolution_like(seed))
    monkeypatch.setattr(state, "WARM_STEPS", 500)
    graph_function.cache_clear()
    try:
        for seed in range(12):
            assert _refresh(converged, _convolution_like(seed))
    finally:
        graph_function.cache_clear()
    weights = DECAY ** np.arange(12)[::-1]
    fishers = [reference.fisher(*(s.numpy() for s in _convolution_like(seed))) for seed in range(12)]
    averaged = np.einsum("k,kij->ij", weights / weights.sum(), fishers)
    errors = [_distance(_factors(block), averaged) for block in (warm, converged)]
    assert errors[0] != errors[1]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize(("method", "triples"), [("kpsvd", 1), ("kfac_corrected", 1), ("deflation", 2), ("lanczos", 2)])
def test_a_refresh_from_the_last_one_takes_three_products_for_each_triple(method, triples, monkeypatch):
    block = _layer(method)
    _refresh(block, _convolution_like(0))
    products = []
    for name in ("matvec", "rmatvec"):
        sound = getattr(RearrangedFisher, name)

        def counted(self, matrix, sound=sound):
            products.append(matrix)
            return sound(self, matrix)

        monkeypatch.setattr(RearrangedFisher, name, counted)
    tf.config.run_functions_eagerly(True)
    try:
        _refresh(block, _convolution_like(1))
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

    def add_variable(shape, dtype, name, initializer):
        initial = np.eye(*shape) if initializer == "identity" else np.full(shape, float(initializer == "ones"))
        made.append(keras.Variable(initial.astype(dtype), name=name))
        return made[-1]

    curvature = LayerCurvature(layer, CurvatureOptions(method, "sqrt", DECAY, "reflect"), add_variable)
    assert len({variable.name for variable in made}) == len(made)
    assert _refresh(curvature, calls) and _invert(curvature)
    gradients = [tf.constant(rng.normal(size=v.shape)) for v in layer.curvature_variables]
    directions = curvature.precondition(gradients)
    for (a, g), block, given, found in zip(
        side_by_side(layer, calls),
        curvature.blocks,
        layer.to_matrices(gradients),
        layer.to_matrices(directions),
        strict=True,
    ):
        alone = _layer(method, indefinite="reflect", shape=(5, 2))
        assert _refresh(alone, (a, g)) and _invert(alone)
        np.testing.assert_allclose(found, alone.precondition(given), rtol=1e-9)
        assert block.count.numpy() == 1


@pytest.mark.parametrize("shape", [(4, 1), (1, 3)])
@pytest.mark.parametrize("method", ["kpsvd", "deflation", "kfac_corrected"])
def test_one_filter_or_one_input_with_several_positions_is_the_method_itself(method, shape):
    """The per-example gradients then have one position, and KFAC's base is that of the positions they sum up."""
    rng = np.random.default_rng(0)
    samples = tuple(tf.constant(rng.normal(size=(12, 6, size))) for size in shape)
    block = _layer(method, shape=shape)
    assert _refresh(block, samples)
    expected = approximate_terms(*samples, method, symmetric=True)
    assert _distance(_factors(block), [(a.numpy(), g.numpy()) for a, g in expected]) < 1e-7


def _large(seed, rows):
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, 1, 200)) * np.exp(-np.arange(200) / 20.0)
    gradients = np.tanh(activations[..., :140] @ np.diag(np.linspace(1, 5, 140)))
    return tf.constant(activations), tf.constant(gradients)


def _truncated(factor):
    values, vectors = np.linalg.eigh(factor)
    tail = values[: -inverses.RANK].mean()
    return (vectors * np.where(np.arange(len(values)) < len(values) - inverses.RANK, tail, values)) @ vectors.T


@pytest.mark.parametrize("rows", [40, 600])
def test_large_factors_are_inverted_by_their_leading_eigenpairs(rows):
    """Exactly where the batch has a lower rank, else with the mean of the other eigenvalues for each of them."""
    block = _layer("kfac", shape=(200, 140))
    _refresh(block, _large(0, rows))
    for _ in range(30):
        assert _invert(block)
    assert not any(variable.shape == (200, 200) for variable in block.preconditioner)
    gradient = np.random.default_rng(9).normal(size=(200, 140))
    a, g = _factors(block)[0]
    stand_ins = (a, g) if rows == 40 else (_truncated(a), _truncated(g))
    damping = reference.factor_damping(a, g, 0.01, "sqrt")
    left, right = (np.linalg.inv(f + lam * np.eye(len(f))) for f, lam in zip(stand_ins, damping, strict=True))
    found, expected = block.precondition(tf.constant(gradient)).numpy(), left @ gradient @ right
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    if rows > 40:
        whole = [np.linalg.inv(f + lam * np.eye(len(f))) for f, lam in zip((a, g), damping, strict=True)]
        assert np.linalg.norm(found - whole[0] @ gradient @ whole[1]) > 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_large_blocks_of_a_low_rank_are_solved_as_if_whole(method):
    """Both terms, whose factors have fewer eigenvalues that are not zero than pairs are kept."""
    block, samples = _layer(method, shape=(200, 140)), _large(0, 40)
    _refresh(block, samples)
    for _ in range(30):
        assert _invert(block)
    (a, g), *second = _factors(block)
    activations, gradients = (one.numpy()[:, 0] for one in samples)
    gradient = activations.T @ (np.random.default_rng(9).normal(size=(40, 1)) * gradients)
    found = block.precondition(tf.constant(gradient)).numpy()
    damping = reference.factor_damping(a, g, 0.01, "sqrt")
    damped = [factor + lam * np.eye(len(factor)) for factor, lam in zip((a, g), damping, strict=True)]
    roots = [np.linalg.inv(np.linalg.cholesky(one)) for one in damped]
    one_term = expected = np.linalg.solve(damped[0], gradient) @ np.linalg.inv(damped[1])
    if second:  # In the whole bases that both terms share.
        spectra = [np.linalg.eigh(root @ other @ root.T) for root, other in zip(roots, second[0], strict=True)]
        left, right = (root.T @ vectors for root, (_, vectors) in zip(roots, spectra, strict=True))
        divisor = 1 + np.abs(np.outer(spectra[0][0], spectra[1][0]))
        expected = left @ ((left.T @ gradient @ right) / divisor) @ right.T
        assert np.linalg.norm(found - one_term) > 0.01 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("method", "eigenvalues"),
    [*((method, "kronecker") for method in METHODS), ("kfac", "corrected"), ("kpsvd", "corrected")],
)
def test_no_large_factor_is_decomposed_whole(method, eigenvalues, monkeypatch):
    sizes, sound = [], decompositions._eigh
    monkeypatch.setattr(decompositions, "_eigh", lambda matrix: sizes.append(matrix.shape[-1]) or sound(matrix))
    block = _layer(method, shape=(200, 140), eigenvalues=eigenvalues)
    for seed in range(2):
        assert _refresh(block, _large(seed, 40))
        assert _invert(block)
    assert sizes
    assert max(sizes) <= inverses.RANK + 8  # Subspaces are eight columns wider than what is kept of them.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
@pytest.mark.parametrize("part", ["basis", "weights", "shift"])
def test_a_wrong_truncated_inverse_is_refused(method, part, monkeypatch):
    block = _layer(method, shape=(200, 140))
    _refresh(block, _large(0, 60))
    assert _invert(block)
    before = [variable.numpy() for variable in block.preconditioner]
    name = "invert_one_term" if method == "kfac" else "one_term_and_correction"
    sound = getattr(inverses, name)

    def wrong(*arguments):
        inverse, *others = sound(*arguments)
        broken = {"basis": inverse.basis * 1.5, "weights": inverse.weights * 0.2, "shift": -inverse.shift}
        return inverse._replace(**{part: broken[part]}), *others

    monkeypatch.setattr(inverses, name, wrong)
    graph_function.cache_clear()
    try:
        _refresh(block, _large(1, 60))
        assert not _invert(block)
    finally:
        graph_function.cache_clear()
    for variable, old in zip(block.preconditioner, before, strict=True):
        np.testing.assert_array_equal(variable, old)


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
