"""`KPSVDDense` is `keras.layers.Dense`, bit for bit, whatever the arguments."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense

ARGUMENTS = {
    "plain": {},
    "no bias": {"use_bias": False},
    "relu": {"activation": "relu"},
    "softmax": {"activation": "softmax"},
    "activation layer": {"activation": keras.layers.LeakyReLU(0.2)},
    "regularizers": {
        "activation": "tanh",
        "kernel_regularizer": keras.regularizers.L1L2(0.01, 0.02),
        "bias_regularizer": "l2",
        "activity_regularizer": keras.regularizers.L2(0.1),
    },
    "constraints": {"kernel_constraint": keras.constraints.MaxNorm(0.3), "bias_constraint": "non_neg"},
    "initializers": {"kernel_initializer": keras.initializers.HeNormal(seed=3), "bias_initializer": "ones"},
    "float64": {"dtype": "float64"},
    "float16": {"dtype": "mixed_float16", "activation": "sigmoid"},
}
SHAPES = {"vectors": (5,), "sequences": (3, 5), "grids": (2, 3, 5)}


def _input(shape, rows=6):
    return np.random.default_rng(0).normal(size=(rows, *shape)).astype("float32")


def _pair(shape=(5,), **arguments):
    """Both layers with the same weights, built on the same inputs."""
    pair = []
    for kind in (keras.layers.Dense, KPSVDDense):
        keras.utils.set_random_seed(0)
        layer = kind(4, **arguments)
        layer.build((None, *shape))
        pair.append(layer)
    return pair


@pytest.mark.parametrize("training", [None, False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_outputs_losses_and_gradients_are_those_of_dense(arguments, shape, training):
    x = tf.constant(_input(SHAPES[shape]))
    results = []
    for layer in _pair(SHAPES[shape], **ARGUMENTS[arguments]):
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, training=training)
            losses = [tf.cast(loss, "float64") for loss in layer.losses]
            loss = tf.add_n([tf.reduce_mean(tf.cast(output, "float64") ** 2), *losses])
        gradients = tape.gradient(loss, [x, *layer.trainable_variables])
        results.append([output.dtype.name, output.numpy(), loss.numpy(), *(g.numpy() for g in gradients)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("arguments", ["regularizers", "constraints", "float16"])
def test_training_by_sgd_is_that_of_dense(arguments):
    x, y = _input((5,), 24), _input((2,), 24)
    results = []
    for kind in (keras.layers.Dense, KPSVDDense):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), kind(4, **ARGUMENTS[arguments]), kind(2)])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history["loss"]
        results.append([np.array(history), *model.get_weights()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_configurations_are_interchangeable_and_survive_a_round_trip(arguments):
    dense, layer = _pair(**ARGUMENTS[arguments])
    assert {**layer.get_config(), "name": 0} == {**dense.get_config(), "name": 0}
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is KPSVDDense and again.get_config() == layer.get_config()
    assert type(KPSVDDense.from_config(dense.get_config())) is KPSVDDense


def test_saved_models_and_weights_move_both_ways(tmp_path):
    x = tf.constant(_input((5,)))
    models = []
    for kind, seed in ((keras.layers.Dense, 0), (KPSVDDense, 1)):
        keras.utils.set_random_seed(seed)
        models.append(keras.Sequential([keras.Input((5,)), kind(4, activation="relu"), kind(2)]))
    dense, instrumented = models
    for source, target in ((dense, instrumented), (instrumented, dense)):
        source.set_weights([value + 1 for value in source.get_weights()])
        target.set_weights(source.get_weights())
        np.testing.assert_array_equal(source(x), target(x))
    instrumented.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert [type(layer) for layer in loaded.layers] == [KPSVDDense, KPSVDDense]
    np.testing.assert_array_equal(loaded(x), instrumented(x))
    clone = keras.models.clone_model(instrumented)
    clone.set_weights(instrumented.get_weights())
    np.testing.assert_array_equal(clone(x), instrumented(x))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sample_format_reproduces_the_layer(shape, use_bias):
    """`ā W̄` is the pre-activation, and `Σ āᵀg` the gradient of the weights; both as NumPy makes them."""
    layer = KPSVDDense(4, use_bias=use_bias, bias_initializer="ones")
    x = _input(SHAPES[shape])
    output = layer(x).numpy()
    slope = np.random.default_rng(1).normal(size=output.shape).astype("float32")
    ((activations, gradients),) = layer.samples(tf.constant(x), tf.constant(slope))
    activations, gradients = activations.numpy(), gradients.numpy()
    values = [v.value for v in layer.curvature_variables]
    (matrix,) = layer.to_matrices(values)
    matrix = matrix.numpy()
    assert [matrix.shape] == layer.block_shapes
    np.testing.assert_allclose((activations @ matrix).reshape(output.shape), output, rtol=1e-5, atol=1e-6)
    flat, flat_slope = x.reshape(-1, 5), slope.reshape(-1, 4)
    expected = flat.T @ flat_slope
    if use_bias:
        expected = np.concatenate([expected, flat_slope.sum(0, keepdims=True)])
    np.testing.assert_allclose(np.einsum("nti,nto->io", activations, gradients), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(layer.from_matrices([tf.constant(matrix)]), values, strict=True):
        np.testing.assert_array_equal(one, other)


def test_jit_compilation_is_refused_and_left_out_by_default():
    model = keras.Sequential([keras.Input((5,)), KPSVDDense(2)])
    model.compile(KPSVD(), "mse")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile(KPSVD(), "mse", jit_compile=True)
    assert model.jit_compile is False


def test_a_layer_with_lora_computes_as_dense_and_trains_without_curvature():
    x, y = _input((5,), 8), _input((4,), 8)
    results = []
    for layer, optimizer in zip(_pair(lora_rank=2), (keras.optimizers.SGD(0.1, momentum=0.9), KPSVD(0.1)), strict=True):
        model = keras.Sequential([keras.Input((5,)), layer])
        model.compile(optimizer, "mse", run_eagerly=True)
        model.fit(x, y, epochs=2, verbose=0)
        results.append([*model.get_weights(), model(x).numpy()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
