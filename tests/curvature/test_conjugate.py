"""Products with the exact Fisher matrix, and conjugate gradients on it, against dense float64 matrices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense, loss_densities
from keras_kpsvd.curvature import damping as damping_module
from keras_kpsvd.curvature import natural_gradient, step_control
from keras_kpsvd.curvature.conjugate import conjugate_direction, fisher_product
from keras_kpsvd.curvature.replicas import JointPass
from keras_kpsvd.curvature.step_control import changes_of_outputs, last_step
from keras_kpsvd.layers import Recorder, RecordingLayer
from tests import reference
from tests.networks import compiled, matrices, problem, tanh_network

SEED = tf.constant([1, 2])
DAMPING = 2.0**-7


def _dense(activation):
    return keras.Sequential(
        [keras.Input((5,)), KPSVDDense(6, activation="tanh", use_bias=False), KPSVDDense(3, activation=activation)]
    )


def _convolution():
    layers = [KPSVDConv2D(4, 2, groups=2, activation="tanh"), keras.layers.Flatten(), KPSVDDense(3)]
    return keras.Sequential([keras.Input((3, 4, 2)), *layers])


def _called_twice():
    inputs = keras.Input((5,))
    shared = KPSVDDense(5, activation="tanh")
    return keras.Model(inputs, KPSVDDense(2)(shared(shared(inputs))))


def _gathered():
    """The gradient by what the first layer made comes in slices."""
    inputs = keras.Input((5,))
    hidden = KPSVDDense(4)(inputs)
    return keras.Model(inputs, KPSVDDense(2)(keras.ops.take(hidden, [6, 0, 0, 3, 1, 2, 5], axis=0)))


def _added():
    """Two layers have one and the same gradient."""
    inputs = keras.Input((5,))
    both = keras.layers.Add()([KPSVDDense(4)(inputs), KPSVDDense(4, use_bias=False)(inputs)])
    return keras.Model(inputs, KPSVDDense(2)(keras.layers.Activation("tanh")(both)))


NETS = {
    "linear": (lambda: _dense(None), "normal"),
    "sigmoid": (lambda: _dense("sigmoid"), "bernoulli"),
    "softmax": (lambda: _dense("softmax"), "categorical"),
    "convolution": (_convolution, "normal"),
    "called twice": (_called_twice, "normal"),
    "gathered": (_gathered, "normal"),
    "added": (_added, "normal"),
}


class _Case:
    """A recorded pass and its dense Gauss–Newton matrix, by jacobians of the stock tape."""

    def __init__(self, name, scale=1.0):
        keras.utils.set_random_seed(0)
        build, self.family = NETS[name]
        model = build()
        x = tf.constant(np.random.default_rng(0).normal(size=(7, *model.input_shape[1:])), tf.float32)
        recorder = Recorder(persistent=True, always=True)
        self.layers = [layer for layer in model.layers if isinstance(layer, RecordingLayer)]
        for layer in self.layers:
            layer.attach(recorder)
        outputs = model(x, training=True)
        forward_pass = recorder.take()
        heads = [h._replace(weight=h.weight * scale) for h in loss_densities.heads(self.family, None, outputs)]
        self.joint = JointPass([forward_pass], [heads])
        variables = [v for layer in self.layers for v in layer.curvature_variables]
        with tf.GradientTape(persistent=True) as tape:
            output = model(x, training=True)
            z = getattr(output, "_keras_logits", output)
        # Vectorised, TensorFlow 2.21 gets the jacobian of grouped convolutions wrong.
        jacobian = tape.jacobian(z, [v.value for v in variables], experimental_use_pfor=False)
        jacobian = np.concatenate([np.reshape(one, (*z.shape, -1)) for one in jacobian], 2).astype("float64")
        p = output.numpy().astype("float64")
        count = 1 if self.family == "categorical" else p.shape[1]
        at_outputs = {
            "normal": lambda row: 2 * np.eye(len(row)),
            "bernoulli": lambda row: np.diag(row * (1 - row)),
            "categorical": lambda row: np.diag(row) - np.outer(row, row),
        }[self.family]
        blocks = np.stack([at_outputs(row) for row in p]) * scale / count
        self.fisher = np.einsum("nci,ncd,ndj->ij", jacobian, blocks, jacobian) / len(p)

    def direction(self, flat):
        sizes = [v.shape.num_elements() for layer in self.layers for v in layer.curvature_variables]
        parts = iter(np.split(flat, np.cumsum(sizes)[:-1]))
        return {
            layer: [tf.constant(next(parts).reshape(v.shape), tf.float32) for v in layer.curvature_variables]
            for layer in self.layers
        }

    @staticmethod
    def flat(direction):
        return np.concatenate([np.reshape(v, -1) for values in direction.values() for v in values]).astype("float64")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", NETS)
def test_the_fisher_product_is_that_of_the_dense_matrix(name, scale):
    case = _Case(name, scale)
    vector = np.random.default_rng(1).normal(size=len(case.fisher))
    tangents = changes_of_outputs(case.joint, case.direction(vector))
    found = case.flat(fisher_product(case.joint, case.layers, tangents, SEED))
    expected = case.fisher @ vector
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    half = case.flat(fisher_product(case.joint, case.layers, tangents, SEED, tf.constant(0.5)))
    assert np.linalg.norm(half - expected / 2) <= 1e-4 * np.linalg.norm(expected)


def test_changes_of_layers_that_no_output_depends_on_change_nothing():
    case = _Case("linear")
    stranger = KPSVDDense(2)
    stranger.build((None, 3))
    change = {stranger: [tf.ones_like(variable.value) for variable in stranger.curvature_variables]}
    (alone,) = changes_of_outputs(case.joint, change)
    assert alone.shape == (7, 3) and np.all(alone == 0)
    direction = case.direction(np.ones(len(case.fisher)))
    (without,), (with_it,) = (changes_of_outputs(case.joint, one) for one in (direction, direction | change))
    assert np.any(without != 0) and np.array_equal(without, with_it)


def test_layers_that_no_output_depends_on_get_zeros():
    case = _Case("linear")
    stranger = KPSVDDense(2)
    stranger.build((None, 3))
    vector = np.ones(len(case.fisher))
    tangents = changes_of_outputs(case.joint, case.direction(vector))
    found = fisher_product(case.joint, [*case.layers, stranger], tangents, SEED)
    assert all(np.all(value == 0) for value in found[stranger])


@pytest.mark.parametrize("cap", [0.9, 0.0])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_step_minimises_the_dense_model_over_krylov_space_and_last_step(name, steps, cap):
    case, rng = _Case(name), np.random.default_rng(2)
    size, damping = len(case.fisher), 0.05
    dampings = {layer: damping * (1 + index) for index, layer in enumerate(case.layers)}
    of_weights = [np.full(tf.size(v), dampings[layer]) for layer in case.layers for v in layer.curvature_variables]
    metric = case.fisher + np.diag(np.concatenate(of_weights))
    dampings = {layer: tf.constant(value) for layer, value in dampings.items()}
    scales = np.exp(rng.normal(size=size))  # A preconditioner that is not the identity.
    gradient, noise = rng.normal(size=(2, size))
    previous = -np.linalg.solve(metric, gradient)  # Part of the way there.
    previous += 0.5 * noise * np.linalg.norm(previous) / np.linalg.norm(noise)
    scaling = case.direction(scales)

    def precondition(direction):
        return {
            layer: [a * s for a, s in zip(values, scaling[layer], strict=True)] for layer, values in direction.items()
        }

    downhill = case.direction(gradient)
    arguments = (downhill, precondition, last_step(case.direction(previous), downhill), dampings)
    found, overlaps, changes = conjugate_direction(case.joint, *arguments, steps, cap, SEED)
    krylov = [scales * gradient]
    for _ in range(steps - 1):
        krylov.append(scales * (metric @ krylov[-1]))
        krylov[-1] /= np.linalg.norm(krylov[-1])
    basis = np.linalg.qr(np.stack(krylov, 1))[0]

    def best(momentum):
        return -basis @ np.linalg.solve(basis.T @ metric @ basis, basis.T @ (gradient + momentum * metric @ previous))

    whole = np.column_stack([basis, previous])
    momentum = np.clip(-np.linalg.solve(whole.T @ metric @ whole, whole.T @ gradient)[-1], 0, cap)
    assert momentum > 0 or cap == 0
    # A step that goes against the gradient but for the last step is none for this method: it does without that.
    expected = -best(momentum) if -best(momentum) @ gradient > 0 else -best(0.0)
    assert np.linalg.norm(case.flat(found) - expected) <= 2e-3 * np.linalg.norm(expected)
    ends = np.cumsum([sum(int(tf.size(v)) for v in layer.curvature_variables) for layer in case.layers])[:-1]
    parts = [np.split(one, ends) for one in (expected, previous)]
    lengths = [np.linalg.norm(one) * np.linalg.norm(other) for one, other in zip(*parts, strict=True)]
    for overlap, one, other, length in zip(overlaps, *parts, lengths, strict=True):
        assert abs(overlap - one @ other) <= 5e-3 * length
    for tangent, direction in zip(changes, (found, case.direction(previous)), strict=True):
        again = changes_of_outputs(case.joint, direction)[0]
        assert np.linalg.norm(tangent[0] - again) <= 1e-4 * np.linalg.norm(again)


def test_a_gradient_of_zero_gives_no_step():
    case = _Case("linear")
    zeros = case.direction(np.zeros(len(case.fisher)))
    dampings = dict.fromkeys(zeros, tf.constant(0.0))
    found = conjugate_direction(case.joint, zeros, lambda v: v, last_step(zeros, zeros), dampings, 3, 0.9, SEED)
    np.testing.assert_array_equal(case.flat(found.direction), 0)
    np.testing.assert_array_equal(found.overlaps, 0)


@pytest.mark.parametrize("eager", [True, False])
def test_training_steps_are_those_of_the_dense_model(eager, monkeypatch):
    """The whole step of `fit`: Krylov space of the Kronecker preconditioner, the last step, the momentum's bounds."""
    monkeypatch.setattr(damping_module, "KEEP_ABOVE", -1e9)
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", 1e9)  # Of these six the first steps would be cut.
    intervals = {"curvature_interval": 1, "inverse_interval": 1, "factor_decay": 0.0}
    optimizer = KPSVD(damping=DAMPING, fisher="exact", eigenvalues="kronecker", conjugate_steps=3, **intervals)
    model = compiled(tanh_network(), optimizer, run_eagerly=eager)
    weights = matrices(model)
    sizes = [w.size for w in weights]
    step, momenta = np.zeros(sum(sizes)), []

    def flat(parts):
        return np.concatenate([part.reshape(-1) for part in parts])

    for number in range(6):
        x, y = problem(rows=12, seed=number % 2)
        factors = [reference.kfac_factors(*sample) for sample in reference.squared_error_samples(weights, x)]

        def precondition(vector, factors=factors, weights=weights):
            parts = np.split(vector, np.cumsum(sizes)[:-1])
            shaped = [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]
            return flat([reference.rule_solve([p], one, DAMPING) for p, one in zip(factors, shaped, strict=True)])

        gradient = flat(reference.squared_error_gradients(weights, x, y))
        metric = reference.squared_error_gauss_newton(weights, x) + DAMPING * np.eye(gradient.size)
        krylov = [precondition(gradient)]
        for _ in range(2):
            krylov.append(precondition(metric @ krylov[-1]))
        basis = np.linalg.qr(np.stack(krylov, 1))[0]
        whole = basis if number == 0 else np.column_stack([basis, step])
        c = -np.linalg.solve(whole.T @ metric @ whole, whole.T @ gradient)
        momentum = 0.0 if number == 0 else np.clip(c[-1], 0, 0.9)
        inner = basis.T @ metric @ basis
        step = momentum * step - basis @ np.linalg.solve(inner, basis.T @ (gradient + momentum * metric @ step))
        start, ends = weights, np.cumsum(sizes)[:-1]
        weights = [w + part.reshape(w.shape) for w, part in zip(weights, np.split(step, ends), strict=True)]
        model.train_on_batch(x, y)
        for now, wanted, old in zip(matrices(model), weights, start, strict=True):
            assert np.linalg.norm(now - wanted) <= 1e-3 * np.linalg.norm(wanted - old)
        weights = matrices(model)
        momenta.append(momentum)
    assert max(momenta) > 0


def test_conjugate_gradients_end_early_where_models_of_single_batches_do_not_hold(monkeypatch):
    made, sound = [], natural_gradient.conjugate_direction
    monkeypatch.setattr(natural_gradient, "conjugate_direction", lambda *a: made.append(a[5]) or sound(*a))
    model = compiled(tanh_network(), KPSVD(conjugate_steps=4), run_eagerly=True)
    model.train_on_batch(*problem())
    model.train_on_batch(*problem())
    model.optimizer._natural._slope_averages.assign([-1.0, 0.6])
    model.train_on_batch(*problem())
    assert made == [4, 4, 1]
