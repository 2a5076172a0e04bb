"""Samples of convolutional networks against gradients and Gauss–Newton matrices taken by `tf.GradientTape` alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv1D, KPSVDConv2D, KPSVDDense, fisher_samples
from keras_kpsvd.layers import layers_of
from tests import reference


def _normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def _one_hot(rng, shape):
    return np.eye(shape[-1], dtype="float32")[rng.integers(0, shape[-1], shape[:-1])]


# name: (output activation, loss, targets)
LOSSES = {
    "bce": ("sigmoid", "binary_crossentropy", lambda rng, shape: rng.integers(0, 2, shape).astype("float32")),
    "categorical": ("softmax", "categorical_crossentropy", _one_hot),
    "sparse_logits_sum": (
        None,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        lambda rng, shape: rng.integers(0, shape[-1], shape[:-1]),
    ),
    "mse": (None, "mse", lambda rng, shape: rng.normal(size=shape).astype("float32")),
}


def _classifier(activation):
    return keras.Sequential(
        [
            keras.Input((8, 7, 3)),
            KPSVDConv2D(6, 3, padding="same", use_bias=False, name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.MaxPooling2D(),
            KPSVDConv2D(4, (2, 3), groups=2, activation="tanh", name="grouped"),
            keras.layers.Flatten(),
            KPSVDDense(3, activation=activation, name="out"),
        ]
    )


def _network_1d(activation):
    """A causal layer that is called twice."""
    shared = KPSVDConv1D(3, 2, padding="causal", activation="tanh", name="shared")
    inputs = keras.Input((9, 3))
    hidden = KPSVDConv1D(4, 3, strides=2, groups=2, name="grouped")(
        keras.layers.Concatenate()([shared(shared(inputs)), inputs[..., :1]])
    )
    return keras.Model(inputs, KPSVDDense(3, activation=activation, name="out")(keras.layers.Flatten()(hidden)))


def _instrumented(model):
    return [layer for layer in model.layers if isinstance(layer, (KPSVDConv1D, KPSVDConv2D, KPSVDDense))]


def _whole(layer, gradients):
    """Kernel and bias as one matrix, all groups' filters side by side."""
    rows = [np.reshape(gradients[0], [-1, layer.kernel.shape[-1]])]
    return np.concatenate([*rows, *(np.reshape(gradient, [1, -1]) for gradient in gradients[1:])])


@pytest.mark.parametrize("network", [_classifier, _network_1d])
@pytest.mark.parametrize("name", LOSSES)
def test_mean_of_samples_is_the_gradient_of_the_compiled_loss(name, network):
    activation, loss, targets = LOSSES[name]
    keras.utils.set_random_seed(0)
    model = network(activation)
    model.compile(loss=loss)
    x = tf.constant(_normal(5, *model.input_shape[1:]), tf.float32)
    y = targets(np.random.default_rng(1), (5, 3))
    layers = _instrumented(model)
    with tf.GradientTape() as tape:
        value = model.compute_loss(x=x, y=tf.constant(y), y_pred=model(x, training=True))
    gradients = tape.gradient(value, [layer.trainable_variables for layer in layers])
    samples = fisher_samples(model, x, y)
    for layer, of_layer in zip(layers, gradients, strict=True):
        mean = reference.weight_gradients(*samples[layer.name]).mean(0)
        expected = _whole(layer, of_layer)
        assert np.linalg.norm(mean - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["categorical", "mse"])
def test_exact_samples_give_the_gauss_newton_matrix(name):
    """`Jᵀ H J` of every layer's weights, between the groups of a convolution as well."""
    keras.utils.set_random_seed(0)
    activation, loss, _ = LOSSES[name]
    body = [
        KPSVDConv2D(4, 2, groups=2, activation="tanh", bias_initializer="random_normal", dtype="float64", name="first"),
        KPSVDConv2D(2, (1, 2), padding="same", activation="tanh", dtype="float64", name="second"),
        keras.layers.Flatten(dtype="float64"),
        KPSVDDense(3, dtype="float64", name="out"),
    ]
    logits = keras.Sequential([keras.Input((3, 3, 2), dtype="float64"), *body])
    last = keras.layers.Activation(activation or "linear", dtype="float64")
    model = keras.Sequential([keras.Input((3, 3, 2), dtype="float64"), *body, last])
    model.compile(loss=loss)
    x = tf.constant(_normal(4, 3, 3, 2))
    samples = fisher_samples(model, x, fisher="exact")
    with tf.GradientTape(persistent=True) as tape:
        z = logits(x)
    if name == "mse":
        hessians = [2 / 3 * np.eye(3)] * 4
    else:
        hessians = [np.diag(p) - np.outer(p, p) for p in tf.nn.softmax(z).numpy()]
    for layer in _instrumented(model):
        parts = tape.jacobian(z, layer.trainable_variables, experimental_use_pfor=False)
        jacobians = np.concatenate([np.reshape(part, [4, 3, -1]) for part in parts], axis=-1)
        expected = np.mean([j.T @ h @ j for j, h in zip(jacobians, hessians, strict=True)], axis=0)
        np.testing.assert_allclose(reference.fisher(*samples[layer.name]), expected, atol=1e-6 * abs(expected).max())


def test_stock_fit_in_graph_mode_learns_with_curvature_of_every_layer():
    keras.utils.set_random_seed(0)
    layers = [KPSVDConv2D(4, 3, groups=2, strides=2, activation="tanh"), keras.layers.Flatten(), KPSVDDense(3)]
    model = keras.Sequential([keras.Input((7, 6, 2)), *layers])
    model.compile(KPSVD(), keras.losses.CategoricalCrossentropy(from_logits=True))
    x = _normal(40, *model.input_shape[1:])
    y = np.eye(3)[np.argmax(x.reshape(40, -1)[:, :3], axis=1)]
    history = model.fit(x, y, batch_size=12, epochs=6, verbose=0).history["loss"]
    assert np.isfinite(history).all() and history[-1] < 0.8 * history[0]
    assert layers_of(model.trainable_variables) == _instrumented(model)
