"""What the mathematics says a step must not depend on, or how it must follow, on random networks and batches.

A step in its plainest form (one rate, no momentum, no bound, no draws, float64), compared with the step of the
transformed problem; errors are measured against the length of the step.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense, fisher_samples
from keras_kpsvd.curvature.approximations import KFAC_METHODS, METHODS
from keras_kpsvd.curvature.reduction import LayerCall, reduce_calls
from tests import reference
from tests.networks import compiled, matrices

RATE, DAMPING, NO_DAMPING = 0.25, 2.0**-7, 1e-20
SETTINGS = {"deadline": None, "derandomize": True}
SVD_METHODS = [method for method in METHODS if method not in KFAC_METHODS]
SEEDS = st.integers(0, 2**16)
# Keras computes a loss in float32 whatever its arguments, unless it is told.
LOSSES = {
    "mse": functools.partial(keras.losses.MeanSquaredError, dtype="float64"),
    "bernoulli": functools.partial(keras.losses.BinaryCrossentropy, from_logits=True, dtype="float64"),
    "categorical": functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True, dtype="float64"),
}


pytestmark = [pytest.mark.usefixtures("untraced"), pytest.mark.slow]


def _problem(seed, loss, sizes, rows):
    """Weights of each layer with the bias as last row, inputs, targets."""
    rng = np.random.default_rng(seed)
    weights = [0.7 * rng.normal(size=(m + 1, n)) for m, n in itertools.pairwise(sizes)]
    targets = {
        "mse": rng.normal(size=(rows, sizes[-1])),
        "bernoulli": rng.integers(0, 2, (rows, sizes[-1])).astype(float),
        "categorical": rng.integers(0, sizes[-1], rows),
    }
    return weights, rng.normal(size=(rows, sizes[0])), targets[loss]


def _step(weights, x, y, loss, damping=DAMPING, activation="tanh", sample_weight=None, loss_scale=1.0, **options):
    """The change of every layer's weights in one step."""
    reduction = options.pop("reduction", "sum_over_batch_size")
    units = [matrix.shape[1] for matrix in weights]
    layers = [KPSVDDense(n, activation=activation, dtype="float64") for n in units[:-1]]
    layers.append(KPSVDDense(units[-1], dtype="float64"))
    model = keras.Sequential([keras.Input((x.shape[1],), dtype="float64"), *layers])
    for layer, matrix in zip(layers, weights, strict=True):
        layer.set_weights([matrix[:-1], matrix[-1]])
    plain = {"learning_rate": RATE, "momentum": 0.0, "damping": damping, "kl_clip": None, "fisher": "exact"}
    compiled(model, KPSVD(**plain, **options), LOSSES[loss](reduction=reduction), loss_weights=[loss_scale])
    model.train_on_batch(x, y, sample_weight=sample_weight)
    return [after - before for after, before in zip(matrices(model), weights, strict=True)]


def _assert_same_step(found, expected, tolerance=1e-6):
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(other) > 0
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@st.composite
def _plain_steps(draw, methods=METHODS, losses=tuple(LOSSES), sizes=((4, 3, 2), (3, 5, 4), (4, 4, 3, 2)), rows=(4, 16)):
    loss, size = draw(st.sampled_from(losses)), draw(st.sampled_from(sizes))
    problem = _problem(draw(SEEDS), loss, size, draw(st.integers(*rows)))
    return problem, loss, {"method": draw(st.sampled_from(methods))}


@st.composite
def _rules(draw):
    return {name: draw(st.sampled_from(values)) for name, values in RULES.items()}


RULES = {"damping_rule": ["sqrt", "factor"], "indefinite": ["absolute", "reflect"]}


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(), st.integers(-10, 10), st.sampled_from(RULES["indefinite"]))
def test_a_loss_and_a_damping_scaled_alike_leave_the_step_of_every_method_unchanged(case, power, indefinite):
    """`(cF + cλ)⁻¹ c∇`, with the damping split by the scales of the factors (rule "sqrt")."""
    (weights, x, y), loss, options = case
    options["indefinite"] = indefinite
    expected = _step(weights, x, y, loss, **options)
    scale = 2.0**power
    _assert_same_step(_step(weights, x, y, loss, damping=scale * DAMPING, loss_scale=scale, **options), expected)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(), _rules(), SEEDS)
def test_permuted_hidden_units_and_inputs_permute_the_step(case, rules, seed):
    (weights, x, y), loss, options = case
    expected = _step(weights, x, y, loss, **options, **rules)
    rng = np.random.default_rng(seed)
    # The order of the inputs, of each hidden layer's units, and of the outputs, which stays.
    orders = [rng.permutation(len(matrix) - 1) for matrix in weights] + [np.arange(weights[-1].shape[1])]

    def permuted(values):
        bias_last = [np.append(order, len(order)) for order in orders]
        return [v[rows][:, columns] for v, rows, columns in zip(values, bias_last, orders[1:], strict=False)]

    found = _step(permuted(weights), x[:, orders[0]], y, loss, **options, **rules)
    _assert_same_step(found, permuted(expected))


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(), _rules(), st.integers(1, 3), SEEDS)
def test_the_order_of_examples_and_how_often_all_are_repeated_leave_the_step_unchanged(case, rules, copies, seed):
    (weights, x, y), loss, options = case
    expected = _step(weights, x, y, loss, **options, **rules)
    order = np.random.default_rng(seed).permutation(np.tile(np.arange(len(x)), copies))
    _assert_same_step(_step(weights, x[order], y[order], loss, **options, **rules), expected)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(), st.sampled_from(["sum_over_batch_size", "mean_with_sample_weight", "sum"]), SEEDS)
def test_padding_without_weight_only_scales_the_loss(case, reduction, seed):
    """The mean over all `N + m` examples is `N/(N+m)` of what it was, loss, gradient and curvature alike.

    KFAC's factor of the activations is a mean over all examples, so for its sake the padding repeats the batch; the SVD
    methods see only per-example gradients, which are zero, and take any.
    """
    (weights, x, y), loss, options = case
    expected = _step(weights, x, y, loss, **options, reduction=reduction)
    if options["method"] in KFAC_METHODS:
        padding = x, y
    else:
        _, *padding = _problem(seed, loss, [x.shape[1], weights[-1].shape[1]], 1 + seed % 5)
    together = [np.concatenate([one, other]) for one, other in zip((x, y), padding, strict=True)]
    weight = np.repeat([1.0, 0.0], [len(x), len(padding[0])])
    part = len(x) / len(weight) if reduction == "sum_over_batch_size" else 1.0
    found = _step(
        weights, *together, loss, damping=part * DAMPING, sample_weight=weight, reduction=reduction, **options
    )
    _assert_same_step(found, expected)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(methods=SVD_METHODS, rows=(4, 8)), SEEDS)
def test_an_integer_sample_weight_is_an_example_repeated_so_often(case, seed):
    (weights, x, y), loss, options = case
    repeats = 1 + np.random.default_rng(seed).integers(0, 3, len(x))
    expected = _step(weights, np.repeat(x, repeats, 0), np.repeat(y, repeats, 0), loss, **options)
    part = repeats.sum() / len(x)
    found = _step(weights, x, y, loss, damping=part * DAMPING, sample_weight=repeats.astype(float), **options)
    _assert_same_step(found, expected)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(sizes=((4, 3, 4), (2, 3, 5)), methods=["kfac"], rows=(12, 16)), SEEDS)
def test_without_damping_kfac_does_not_see_an_affine_change_of_the_inputs(case, seed):
    """`x → (x − c)S` with `W → S⁻¹W, b → b + cW`: the step is `S⁻¹ΔW, Δb + cΔW` (Martens & Grosse 2015, §10)."""
    (weights, x, y), loss, options = case
    rng = np.random.default_rng(seed)
    mixing, shift = np.eye(x.shape[1]) * 2 + rng.uniform(-0.5, 0.5, (x.shape[1],) * 2), rng.normal(size=x.shape[1])

    def of_new_inputs(matrix):
        return np.concatenate([np.linalg.solve(mixing, matrix[:-1]), (matrix[-1] + shift @ matrix[:-1])[None]])

    expected = _step(weights, x, y, loss, damping=NO_DAMPING, **options)
    first, *others = weights
    found = _step([of_new_inputs(first), *others], (x - shift) @ mixing, y, loss, damping=NO_DAMPING, **options)
    _assert_same_step(found, [of_new_inputs(expected[0]), *expected[1:]], 1e-4)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(sizes=((4, 3, 4), (2, 3, 5)), methods=["kfac"], rows=(12, 16)), SEEDS)
def test_without_damping_kfac_does_not_see_a_rescaling_of_hidden_units(case, seed):
    """Leaky rectifiers are homogeneous: `W₁ → W₁D, W₂ → D⁻¹W₂` computes the same, and so do the steps."""
    ((first, second), x, y), loss, options = case
    scale = 2.0 ** np.random.default_rng(seed).integers(-3, 4, first.shape[1])
    bias_one = np.append(scale, 1.0)[:, None]
    fixed = {**options, "damping": NO_DAMPING, "activation": "leaky_relu"}
    expected = _step([first, second], x, y, loss, **fixed)
    found = _step([first * scale, second / bias_one], x, y, loss, **fixed)
    _assert_same_step(found, [expected[0] * scale, expected[1] / bias_one], 1e-4)


@settings(max_examples=8, **SETTINGS)
@given(
    cut=st.integers(1, 9),
    padding=st.sampled_from(["valid", "same"]),
    stride=st.sampled_from([1, 2]),
    use_bias=st.booleans(),
    seed=SEEDS,
)
def test_kfacs_factors_of_a_batch_are_the_weighted_means_of_its_parts(cut, padding, stride, use_bias, seed):
    """Of a convolution; whether the examples are worked on together or one by one within a memory budget."""
    rng = np.random.default_rng(seed)
    layer = KPSVDConv2D(3, 2, stride, padding, use_bias=use_bias, dtype="float64")
    x = tf.constant(rng.normal(size=(10, 5, 4, 2)))
    gradient = tf.constant(rng.normal(size=layer(x).shape))

    def factors(rows, budget=2**20):
        (batch,) = reduce_calls(layer, [LayerCall(x[rows], gradient[rows])], base=True, svd=False, budget=budget)
        return [factor.numpy() for factor in batch.base]

    parts = zip(factors(slice(cut)), factors(slice(cut, None)), strict=True)
    expected = [(cut * one + (10 - cut) * other) / 10 for one, other in parts]
    for whole in (factors(slice(None)), factors(slice(None), budget=1)):
        for one, other in zip(whole, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@settings(max_examples=8, **SETTINGS)
@given(_plain_steps(), st.integers(1, 3), st.sampled_from(["sum_over_batch_size", "sum"]))
def test_the_samples_of_a_batch_are_those_of_its_parts(case, cut, reduction):
    """Each example's gradient is its own, so that the Fisher block of a batch is the mean of those of its parts.

    Under a summed loss the gradients carry the number of rows, whose sum over the parts it is.
    """
    (weights, x, y), loss, _ = case
    layers = [KPSVDDense(m.shape[1], activation="tanh", dtype="float64", name=f"l{n}") for n, m in enumerate(weights)]
    model = keras.Sequential([keras.Input((x.shape[1],), dtype="float64"), *layers])
    for layer, matrix in zip(layers, weights, strict=True):
        layer.set_weights([matrix[:-1], matrix[-1]])
    compiled(model, KPSVD(), LOSSES[loss](reduction=reduction))
    whole, *parts = (fisher_samples(model, x[r], y[r]) for r in (slice(None), slice(cut), slice(cut, None)))
    rows = len(x), cut, len(x) - cut
    for name, (activations, gradients) in whole.items():
        np.testing.assert_allclose(np.concatenate([part[name][0] for part in parts]), activations)
        scale = [count if reduction == "sum" else 1 for count in rows]
        split = [part[name][1] / count for part, count in zip(parts, scale[1:], strict=True)]
        np.testing.assert_allclose(np.concatenate(split), gradients / scale[0], atol=1e-12)
        fishers = [reference.fisher(*part[name]) / c**2 for part, c in zip((whole, *parts), scale, strict=True)]
        mean = (rows[1] * fishers[1] + rows[2] * fishers[2]) / rows[0]
        np.testing.assert_allclose(fishers[0], mean, atol=1e-10 * np.abs(mean).max())
