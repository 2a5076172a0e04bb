"""The quadratic model and its minimiser against forward-mode derivatives, dense matrices and SciPy."""

import keras
import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

from keras_kpsvd import KPSVDDense, loss_densities
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.curvature.step_control import (
    MAX_LOGIT_CHANGE,
    MAX_RELATIVE_CHANGE,
    StepCoefficients,
    fit_step,
    gram_matrices,
    inner,
    inner_by_layer,
    last_step,
    linearised_outputs,
    quadratic_model,
    relative_change,
    share_of_batch,
    trusted_part,
    weight_sizes,
)
from keras_kpsvd.layers import Recorder, RecordingLayer


def _dense_net(activation):
    return keras.Sequential(
        [
            keras.Input((5,)),
            KPSVDDense(6, activation="relu"),
            KPSVDDense(4, activation="tanh", use_bias=False),
            KPSVDDense(3, activation=activation),
        ]
    )


def _with_other_layers():
    return keras.Sequential(
        [
            keras.Input((5,)),
            KPSVDDense(6, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4, activation="elu"),
            KPSVDDense(3),
            keras.layers.LayerNormalization(),
        ]
    )


def _called_twice():
    inputs = keras.Input((5,))
    shared = KPSVDDense(5, activation="tanh")
    return keras.Model(inputs, KPSVDDense(2)(shared(shared(inputs))))


def _sequence():
    return keras.Sequential([keras.Input((4, 5)), KPSVDDense(3, activation="tanh"), KPSVDDense(2)])


# name: (model, family)
NETS = {
    "linear": (lambda: _dense_net(None), "normal"),
    "sigmoid": (lambda: _dense_net("sigmoid"), "bernoulli"),
    "softmax": (lambda: _dense_net("softmax"), "categorical"),
    "other layers": (_with_other_layers, "normal"),
    "called twice": (_called_twice, "normal"),
    "sequence": (_sequence, "normal"),
}


def _problem(name, batch=7):
    keras.utils.set_random_seed(0)
    build, family = NETS[name]
    model = build()
    x = np.random.default_rng(0).normal(size=(batch, *model.input_shape[1:])).astype("float32")
    return model, family, tf.constant(x)


def _instrumented(model):
    return [layer for layer in model.layers if isinstance(layer, RecordingLayer)]


def _record(model, family, x):
    recorder = Recorder(persistent=True, always=True)
    for layer in _instrumented(model):
        layer.attach(recorder)
    outputs = model(x, training=True)
    forward_pass = recorder.take()
    return forward_pass, loss_densities.heads(family, None, outputs)


def _directions(model, count=1):
    rng = np.random.default_rng(1)
    return [
        {
            layer: [tf.constant(rng.normal(size=v.shape), tf.float32) for v in layer.curvature_variables]
            for layer in _instrumented(model)
        }
        for _ in range(count)
    ]


def _logits(output):
    return getattr(output, "_keras_logits", output)


def _forward_mode(model, x, direction):
    variables = [v.value for layer in direction for v in layer.curvature_variables]
    tangents = [part for values in direction.values() for part in values]
    with tf.autodiff.ForwardAccumulator(variables, tangents) as accumulator:
        output = _logits(model(x, training=True))
    return accumulator.jvp(output).numpy()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_linearised_outputs_are_the_forward_mode_derivative(name, graph):
    model, family, x = _problem(name)
    (direction,) = _directions(model)

    def linearise(x):
        forward_pass, heads = _record(model, family, x)
        return linearised_outputs(forward_pass, heads, direction)

    (tangent,) = (tf.function(linearise) if graph else linearise)(x)
    expected = _forward_mode(model, x, direction)
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(tangent - expected) <= 1e-5 * np.linalg.norm(expected)


def test_layers_without_a_direction_stand_still():
    model, family, x = _problem("linear")
    (direction,) = _directions(model)
    first = next(iter(direction))
    forward_pass, heads = _record(model, family, x)
    (tangent,) = linearised_outputs(forward_pass, heads, {first: direction[first]})
    expected = _forward_mode(model, x, {first: direction[first]})
    assert np.linalg.norm(tangent - expected) <= 1e-5 * np.linalg.norm(expected)


def _jacobian(model, x):
    """`[batch, outputs, weights]`, one matrix for all instrumented layers, biases as last rows."""
    layers = _instrumented(model)
    with tf.GradientTape() as tape:
        output = _logits(model(x, training=True))
        output = tf.reshape(output, [len(x), -1])
    blocks = []
    for layer, parts in zip(
        layers, tape.jacobian(output, [layer.curvature_variables for layer in layers]), strict=True
    ):
        blocks.extend(part.numpy().reshape(*output.shape, -1) for part in parts)
        assert len(parts) == len(layer.curvature_variables)
    return np.concatenate(blocks, axis=2).astype("float64")


def _output_fisher(family, outputs):
    """Fisher matrices at the outputs, `[batch, c, c]`."""
    flat = np.reshape(outputs, (len(outputs), -1)).astype("float64")
    size = flat.shape[1]
    if family == "normal":
        return np.tile(2 * np.eye(size), (len(flat), 1, 1))
    if family == "bernoulli":
        p = 1 / (1 + np.exp(-flat))
        return np.stack([np.diag(row * (1 - row)) for row in p])
    p = np.exp(flat) / np.exp(flat).sum(axis=1, keepdims=True)
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


def _grams(directions):
    """Of the parts of directions in each layer, `[layers, k, k]`, in float64."""
    flat = [
        np.stack([np.concatenate([np.reshape(v, -1) for v in one[layer]]) for one in directions]).astype("float64")
        for layer in directions[0]
    ]
    return np.stack([one @ one.T for one in flat])


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", NETS)
def test_the_quadratic_model_is_the_dense_gauss_newton_matrix_and_the_damping_of_each_layer(name, damping):
    model, family, x = _problem(name)
    directions = _directions(model, 2)
    dampings = {layer: damping * (1 + index) for index, layer in enumerate(directions[0])}
    forward_pass, heads = _record(model, family, x)
    model_of_loss = quadratic_model(
        JointPass([forward_pass], [heads]),
        directions,
        tf.constant(_grams(directions), tf.float32),
        {layer: tf.constant(value) for layer, value in dampings.items()},
        tf.constant([0, 0]),
    )
    quadratic = model_of_loss.curvature

    jacobian = _jacobian(model, x)
    # Without a compiled loss Keras's own is assumed: the mean over outputs, for "categorical" over positions.
    averaged = 1 if family == "categorical" else jacobian.shape[1]
    outputs = _logits(model(x, training=True)).numpy()
    fisher = _output_fisher(family, outputs) / averaged
    gauss_newton = np.einsum("nci,ncd,ndj->ij", jacobian, fisher, jacobian) / len(x)
    flat = [np.concatenate([np.reshape(part, -1) for values in d.values() for part in values]) for d in directions]
    flat = np.stack(flat).astype("float64")
    of_weights = np.concatenate(
        [np.full(tf.size(v), dampings[layer]) for layer in dampings for v in directions[0][layer]]
    )
    expected = flat @ gauss_newton @ flat.T + flat * of_weights @ flat.T
    np.testing.assert_allclose(quadratic, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())

    # What moves the logits, by the family's own measure; squared error is quadratic in them.
    moved = np.einsum("nci,ki->knc", jacobian, flat)
    if family == "normal":
        assert model_of_loss.logit_changes == []
        return
    if family == "categorical":
        moved -= moved.mean(axis=2, keepdims=True)
    inner_products = np.einsum("inc,jnc->ij", moved, moved) / (len(x) if family == "categorical" else moved[0].size)
    (found,) = model_of_loss.logit_changes
    np.testing.assert_allclose(found, inner_products, rtol=1e-4, atol=1e-5 * inner_products.max())


def test_the_quadratic_model_adds_the_outputs_of_a_model_with_their_weights():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = KPSVDDense(4, activation="tanh")(inputs)
    outputs = [KPSVDDense(2)(hidden), KPSVDDense(3, activation="softmax")(hidden)]
    losses, weights = ["mse", "categorical_crossentropy"], [0.5, 3.0]
    model = keras.Model(inputs, outputs)
    model.compile(loss=losses, loss_weights=weights)
    x = tf.constant(np.random.default_rng(0).normal(size=(6, 5)), tf.float32)
    recorder = Recorder(persistent=True, always=True)
    for layer in _instrumented(model):
        layer.attach(recorder)
    returned = model(x, training=True)
    forward_pass = recorder.take()
    heads = loss_densities.heads("auto", model, returned)
    (direction,) = _directions(model)
    undamped = dict.fromkeys(direction, tf.constant(0.0))
    grams = tf.ones([len(direction), 1, 1])
    joint = JointPass([forward_pass], [heads])
    quadratic = quadratic_model(joint, [direction], grams, undamped, tf.constant([0, 0])).curvature
    expected = 0.0
    for index, (family, averaged) in enumerate((("normal", 2), ("categorical", 1))):
        single = keras.Model(inputs, outputs[index])
        mine = {layer: direction[layer] for layer in _instrumented(single)}
        tangent = _forward_mode(single, x, mine)
        fisher = _output_fisher(family, _logits(returned[index]).numpy())
        expected += weights[index] * np.einsum("ni,nij,nj->", tangent, fisher, tangent) / averaged / len(x)
    assert float(quadratic[0, 0]) == pytest.approx(expected, rel=1e-4)


def test_products_of_directions_are_those_of_their_weights_by_layer_and_in_all():
    model, _, _ = _problem("linear")
    one, other = _directions(model, 2)
    expected = _grams([one, other])
    own, mixed, others = (inner_by_layer(*pair) for pair in ((one, one), (one, other), (other, other)))
    np.testing.assert_allclose(gram_matrices(own, mixed, others), expected, rtol=1e-5, atol=1e-5)
    assert float(inner(one, other)) == pytest.approx(expected[:, 0, 1].sum(), rel=1e-5)
    last = last_step(other, one)
    np.testing.assert_allclose(last.squares, expected[:, 1, 1], rtol=1e-5)
    assert float(last.slope) == pytest.approx(expected[:, 0, 1].sum(), rel=1e-5) and last.step is other


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_products_are_at_least_of_float32(dtype):
    layer = KPSVDDense(2, use_bias=False)
    layer.build((None, 3))
    direction = {layer: [tf.fill([3, 2], tf.constant(300.0, dtype))]}
    assert inner_by_layer(direction, direction).dtype == tf.float32
    assert float(inner(direction, direction)) == 6 * 300.0**2  # More than float16 holds.


def test_the_change_of_a_network_is_that_of_its_layers_together():
    model, _, _ = _problem("linear")
    zeroed, *_ = layers = _instrumented(model)
    for variable in zeroed.curvature_variables:
        variable.assign(tf.zeros_like(variable))
    change, last = _directions(model, 2)
    step = StepCoefficients(tf.constant(0.3), tf.constant(0.8))
    parts = []
    for layer in layers:
        moved = [0.8 * b.numpy() - 0.3 * a.numpy() for a, b in zip(change[layer], last[layer], strict=True)]
        weights = [variable.numpy() for variable in layer.curvature_variables]
        own, length = (np.sqrt(sum(np.square(v, dtype="float64").sum() for v in one)) for one in (weights, moved))
        ((rows, columns),) = layer.block_shapes
        glorot = np.sqrt(rows * columns * 2 / (rows + columns))  # Of variance 2 / (rows + columns) each.
        parts.append(length / max(own, glorot))
    grams = tf.constant(_grams([change, last]), tf.float32)
    found = relative_change(step, grams, weight_sizes(layers))
    mixed = [a * b for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j]
    assert len(mixed) > 1 and float(found) == pytest.approx(np.sqrt(sum(mixed)), rel=1e-5)
    assert float(relative_change(step, 1e6 * grams[:1], weight_sizes(layers[:1]))) == 0


def test_layers_are_measured_by_their_own_weights_where_these_are_large():
    layer = KPSVDDense(3)
    layer.build((None, 4))
    layer.kernel.assign(tf.fill([4, 3], 100.0))
    layer.bias.assign([0.0, 0.0, 500.0])
    assert float(weight_sizes([layer])[0]) == pytest.approx((12 * 100.0**2 + 500.0**2) ** 0.5)


def _objective(quadratic, slopes, rate, momentum):
    c = np.array([-rate, momentum], "float64")
    return 0.5 * c @ quadratic @ c + slopes @ c


@pytest.mark.parametrize("cap", [0.0, 0.9, 50.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_step_minimises_the_quadratic_model_within_its_bounds(cap, scale):
    rng = np.random.default_rng(0)
    inside, without_rate = 0, 0
    for _ in range(40):
        root = rng.standard_normal((2, 2)) * np.exp(rng.normal(size=2))[:, None]
        quadratic = root @ root.T
        slopes = rng.standard_normal(2) * np.exp(rng.normal(size=2))
        slopes[0] = abs(slopes[0])
        step = fit_step(tf.constant(quadratic * scale, tf.float32), tf.constant(slopes * scale, tf.float32), cap)
        rate, momentum = float(step.rate), float(step.momentum)
        assert rate >= 0
        assert 0 <= momentum <= cap * (1 + 1e-6)
        # ½ cᵀMc + sᵀc with M = R Rᵀ is ½ ‖Rᵀc + R⁻¹s‖² to a constant.
        upper = max(cap, 1e-12)
        best = scipy.optimize.lsq_linear(
            root.T, -np.linalg.solve(root, slopes), bounds=([-np.inf, 0], [0, upper]), tol=1e-14
        ).x
        optimum = _objective(quadratic, slopes, -best[0], best[1])
        assert _objective(quadratic, slopes, rate, momentum) - optimum <= 2e-3 * abs(optimum)
        inside += rate > 0 and 0 < momentum < cap
        without_rate += rate == 0
    assert cap != 50.0 or (inside > 5 and without_rate > 1)


@pytest.mark.parametrize(
    ("quadratic", "slopes", "expected"),
    [
        pytest.param([[0, 0], [0, 0]], [1, -1], (0, 0), id="no curvature at all"),
        pytest.param([[2, 0], [0, 0]], [1, 0], (0.5, 0), id="no previous step"),
        pytest.param([[2, 6], [6, 18]], [1, 3], (0.5, 0), id="parallel to the previous step"),
        pytest.param([[2, -6], [-6, 18]], [1, -3], (0.5, 0), id="opposite to the previous step"),
        pytest.param([[0, 0], [0, 2]], [0, -1], (0, 0.5), id="no gradient"),
        pytest.param([[1e-30, 0], [0, 1e-30]], [1e-30, -0.5e-30], (1, 0.5), id="tiny"),
    ],
)
def test_degenerate_quadratics_give_finite_steps(quadratic, slopes, expected):
    step = fit_step(tf.constant(quadratic, tf.float32), tf.constant(slopes, tf.float32), 0.9)
    np.testing.assert_allclose([step.rate, step.momentum], expected, rtol=1e-5)


def test_curvature_that_is_not_a_number_is_not_taken_for_none():
    """The optimizer skips a step whose coefficients are not finite; a rate of zero would hide the fault."""
    for place in ((0, 0), (0, 1), (1, 1)):
        quadratic = np.eye(2, dtype="float32")
        quadratic[place] = np.nan
        step = fit_step(tf.constant(quadratic), tf.constant([1.0, -0.5]), 0.9)
        assert not np.all(np.isfinite([step.rate, step.momentum])), place


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_output_moves_by_more_than_the_bound_and_short_steps_are_left_alone(scale):
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(2, 3, 2))  # Two outputs.
    changes = [tf.constant(root.T @ root * scale**2, tf.float32) for root in roots]
    step = StepCoefficients(tf.constant(0.7), tf.constant(0.4))
    part = float(trusted_part(step, changes))
    lengths = scale * np.linalg.norm(roots @ [-0.7, 0.4], axis=1)
    assert part == pytest.approx(min(1.0, MAX_LOGIT_CHANGE / lengths.max()), rel=1e-5)
    assert (part == 1) == (scale < 1e3) or scale == 1
    assert float(trusted_part(step, [])) == 1.0


@pytest.mark.parametrize("moved", [0.5, 0.99, 1.01, 40.0])
def test_no_network_changes_by_more_than_the_bound(moved):
    """On its own, and beside a logit change that allows more or less than it does."""
    step = StepCoefficients(tf.constant(1.0), tf.constant(0.0))
    alone = min(1.0, 1 / moved)
    change = tf.constant(moved * MAX_RELATIVE_CHANGE)
    assert float(trusted_part(step, [], change)) == pytest.approx(alone)
    for length in (0.1, 3.0):
        logits = [tf.constant([[(length * MAX_LOGIT_CHANGE) ** 2, 0.0], [0.0, 0.0]])]
        assert float(trusted_part(step, logits, change)) == pytest.approx(min(alone, 1 / length))
    assert np.isnan(trusted_part(step, [], tf.constant(np.nan)))


def test_changes_that_are_not_numbers_are_not_taken_for_small_ones():
    step = StepCoefficients(tf.constant(0.7), tf.constant(0.4))
    assert np.isnan(trusted_part(step, [tf.fill([2, 2], float("nan"))]))


def test_small_batches_take_their_share_of_a_step():
    usual = tf.constant(0.0)
    share, usual = share_of_batch(tf.constant(256), usual)
    assert (float(share), float(usual)) == (1.0, 256.0)
    share, usual = share_of_batch(tf.constant(16), usual)
    assert float(share) == 16 / 256
    assert float(usual) == pytest.approx(0.95 * 256 + 0.05 * 16)
    share, usual = share_of_batch(tf.constant(512), usual)
    assert float(share) == 1.0
