"""Weights of examples and of classes, and several outputs with several losses, in gradient and curvature."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD, KPSVDDense
from tests import reference
from tests.contract.oracle import (
    PLAIN,
    assert_steps,
    cross_entropy,
    gradients_at,
    moved,
    samples_at,
    solved,
    squared_error,
)
from tests.networks import compiled, matrices, problem, tanh_network

SIZES = (4, 3, 3)


def _classes(rows=10):
    """Every class, the last one oftener."""
    return np.array([0, 1, 2, 2, 1, 2, 2, 0, 2, 2])[:rows]


def _step(start, x, slopes, roots):
    return moved(start, solved(samples_at(start, x, roots), gradients_at(start, x, slopes)))


@pytest.mark.parametrize(("kind", "eager"), [("sample_weight", False), ("class_weight", True)])
def test_weights_count_in_gradient_and_curvature(kind, eager):
    x, classes = problem(sizes=SIZES)[0], _classes()
    rng = np.random.default_rng(3)
    argument, weights = {
        "sample_weight": lambda: (given := rng.uniform(0.2, 3, len(x)), given),
        "class_weight": lambda: ({0: 4.0, 1: 0.5, 2: 2.0}, np.array([4.0, 0.5, 2.0])[classes]),
    }[kind]()
    model = tanh_network(SIZES)
    compiled(model, KPSVD(**PLAIN), keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=eager)
    start = matrices(model)
    expected = _step(start, x, *cross_entropy(reference.forward(start, x)[1], classes, weights))
    unweighted = _step(start, x, *cross_entropy(reference.forward(start, x)[1], classes, np.ones(len(x))))
    assert np.linalg.norm(expected[0] - unweighted[0]) > 0.1 * np.linalg.norm(expected[0] - start[0])
    model.fit(x, classes, batch_size=len(x), shuffle=False, verbose=0, **{kind: argument})
    assert_steps(matrices(model), expected, start, 1e-5)


def _two_headed(names=("classes", "values")):
    """One hidden layer, logits of three classes, two values; weights as one network of five outputs."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,), dtype="float64")
    hidden = KPSVDDense(3, activation="tanh", dtype="float64", bias_initializer="ones")(inputs)
    heads = [KPSVDDense(units, dtype="float64", name=name) for units, name in zip((3, 2), names, strict=True)]
    return keras.Model(inputs, {name: head(hidden) for name, head in zip(names, heads, strict=True)})


def test_each_output_counts_by_its_own_loss_its_weight_and_its_examples_weights():
    """The hidden layer's block is the sum of both curvatures, a head's is its own."""
    x, values = problem()
    classes = _classes()
    rng = np.random.default_rng(5)
    of_classes, of_values = rng.uniform(0.2, 3, (2, len(x)))
    model = _two_headed()
    model.compile(
        KPSVD(**PLAIN),
        {"classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "values": "mse"},
        loss_weights={"classes": 0.5, "values": 4.0},
    )
    start = matrices(model)
    trunk, whole = start[0], [start[0], np.concatenate(start[1:], axis=1)]
    outputs = reference.forward(whole, x)[1]
    logit_slopes, logit_roots = cross_entropy(outputs[:, :3], classes, 0.5 * of_classes)
    value_slopes, value_roots = squared_error(outputs[:, 3:], values, 4.0 * of_values)
    roots = np.zeros((len(x), 5, 5))
    roots[:, :3, :3], roots[:, 3:, 3:] = logit_roots, value_roots
    gradients = gradients_at(whole, x, np.concatenate([logit_slopes, value_slopes], axis=1))
    samples = samples_at(whole, x, roots)
    heads = [((samples[1][0], samples[1][1][:, part]), gradients[1][:, part]) for part in (slice(0, 3), slice(3, 5))]
    directions = solved([samples[0], *(s for s, _ in heads)], [gradients[0], *(g for _, g in heads)])
    targets, weights = {"classes": classes, "values": values}, {"classes": of_classes, "values": of_values}
    model.fit(x, targets, sample_weight=weights, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), moved([trunk, *start[1:]], directions), start, 1e-5)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_an_output_that_no_instrumented_layer_reaches_has_no_part_in_the_curvature(fisher):
    """One unit each: the Fisher matrix, however drawn, is a multiple of the activations' moments, and a tiny damping
    leaves Newton's direction.
    """
    x, y = problem(rows=20, sizes=(4, 1))
    inputs = keras.Input((4,), dtype="float64")
    heads = [KPSVDDense(1, dtype="float64", name="curved"), keras.layers.Dense(1, dtype="float64", name="plain")]
    model = keras.Model(inputs, [head(inputs) for head in heads])
    model.compile(KPSVD(**{**PLAIN, "fisher": fisher, "damping": 1e-14, "learning_rate": 0.5}), ["mse", "mse"])
    start = matrices(model)
    (gradient,) = reference.squared_error_gradients(start[1:], x, y)
    model.fit(x, [y, y], batch_size=20, shuffle=False, verbose=0)
    best = np.linalg.lstsq(np.concatenate([x, np.ones((20, 1))], 1), y, rcond=None)[0]
    now = matrices(model)
    assert_steps(now[1:], moved(start[1:], [gradient], 0.5), start[1:])
    step, newton = now[0] - start[0], best - start[0]
    scale = np.sum(step * newton) / np.sum(newton**2)
    assert scale > 0 and np.linalg.norm(step - scale * newton) < 1e-4 * np.linalg.norm(step)
    assert fisher == "sampled" or scale == pytest.approx(0.5, rel=1e-4)
