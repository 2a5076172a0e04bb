"""Sequences with masks: the samples of every layer are those of the masked loss, in gradient and in curvature."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv1D, KPSVDDense, KPSVDEinsumDense, fisher_samples
from keras_kpsvd.curvature.samples import layer_samples, pass_heads, preactivation_gradients
from keras_kpsvd.layers import Recorder, RecordingLayer, layers_of

ROWS, STEPS, WIDTH, CLASSES = 4, 5, 3, 2
# Of each example, the steps that count; the last has none at all.
MASK = np.arange(STEPS) < np.array([[5], [3], [1], [0]])


@keras.saving.register_keras_serializable(package="tests")
class CarryMask(keras.layers.Layer):
    """Hands a mask on by hand, behind layers that lose it."""

    supports_masking = True

    def call(self, inputs):
        values, mask = inputs
        outputs = tf.identity(values)
        keras.src.backend.set_keras_mask(outputs, mask)
        return outputs

    def compute_mask(self, inputs, mask=None):
        return inputs[1]


def _network(kind, loss):
    """A small float64 network on sequences whose masked loss is compiled, with inputs and targets."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, STEPS, WIDTH))
    if kind == "embedding":
        source = keras.Input((STEPS,), dtype="int32")
        x = np.where(MASK, rng.integers(1, 7, size=MASK.shape), 0).astype("int32")
        hidden = keras.layers.Embedding(7, WIDTH, mask_zero=True, dtype="float64")(source)
    elif kind == "masking":
        source = keras.Input((STEPS, WIDTH), dtype="float64")
        x *= MASK[..., None]
        hidden = keras.layers.Masking(0.0, dtype="float64")(source)
    else:
        source = keras.Input((STEPS, WIDTH), dtype="float64")
        hidden = source
    hidden = KPSVDDense(4, activation="tanh", name="first", dtype="float64", bias_initializer="ones")(hidden)
    if kind == "convolution":
        mask = keras.Input((STEPS,), dtype="bool")
        hidden = KPSVDConv1D(3, 3, padding="same", activation="tanh", name="conv", dtype="float64")(hidden)
        hidden = CarryMask(dtype="float64")([hidden, mask])
        source, x = [source, mask], [x, MASK]
    if kind == "called twice":
        hidden = keras.layers.Masking(0.9, dtype="float64")(hidden)
        again = KPSVDDense(4, activation="tanh", name="again", dtype="float64", bias_initializer="ones")
        hidden = again(again(hidden))
    outputs = KPSVDDense(CLASSES, name="out", dtype="float64")(hidden)
    if loss == "categorical":
        compiled, y = keras.losses.SparseCategoricalCrossentropy(from_logits=True), rng.integers(2, size=(ROWS, STEPS))
    else:
        compiled, y = loss, rng.normal(size=(ROWS, STEPS, CLASSES))
    model = keras.Model(source, outputs)
    model.compile("sgd", compiled)
    return model, x, y


def _tensors(values):
    return None if values is None else keras.tree.map_structure(tf.convert_to_tensor, values)


def _layers(model):
    return {layer.name: layer for layer in model._flatten_layers() if isinstance(layer, RecordingLayer)}


def _loss_gradients(model, x, y, sample_weight=None):
    """`{name: gradient of the compiled loss as a matrix}`, by TensorFlow alone."""
    layers = _layers(model)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(_tensors(x), training=True)
        loss = model.compute_loss(x=x, y=_tensors(y), y_pred=outputs, sample_weight=_tensors(sample_weight))
    gradients = {}
    for name, layer in layers.items():
        values = [variable.value for variable in layer.curvature_variables]
        (gradients[name],) = layer.to_matrices(tape.gradient(loss, values))
    return gradients


def _gauss_newton(model, x, y, sample_weight=None):
    """`{name: block}` of `Jᵀ H J` of the compiled loss, dense, by TensorFlow alone."""
    layers = _layers(model)
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(_tensors(x), training=True)
    z = tf.identity(outputs)
    with tf.GradientTape() as outer:
        outer.watch(z)
        with tf.GradientTape() as inner:
            inner.watch(z)
            y_pred = tf.identity(z)
            mask = getattr(outputs, "_keras_mask", None)
            if mask is not None:
                y_pred._keras_mask = mask
            loss = model.compute_loss(x=x, y=_tensors(y), y_pred=y_pred, sample_weight=_tensors(sample_weight))
        slope = inner.gradient(loss, z)
    count = outputs.shape.num_elements()
    hessian = outer.jacobian(slope, z).numpy().reshape(count, count)
    blocks = {}
    for name, layer in layers.items():
        values = [variable.value for variable in layer.curvature_variables]
        jacobians = tape.jacobian(outputs, values, experimental_use_pfor=False)
        rows = [
            tf.reshape(layer.to_matrices(list(row))[0], [-1])
            for row in zip(
                *(tf.reshape(j, [count, *v.shape]) for j, v in zip(jacobians, values, strict=True)), strict=True
            )
        ]
        rows = np.stack(rows)
        blocks[name] = rows.T @ hessian @ rows
    return blocks


def _second_moment(activations, gradients):
    rows = np.einsum("nti,nto->nio", activations, gradients).reshape(len(activations), -1)
    return rows.T @ rows / len(rows)


KINDS = ["no mask", "embedding", "masking", "convolution", "called twice"]


@pytest.mark.parametrize("loss", ["mse", "categorical"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_reproduce_the_gradient_of_the_masked_loss(kind, loss):
    model, x, y = _network(kind, loss)
    expected = _loss_gradients(model, x, y)
    samples = fisher_samples(model, x, y)
    assert set(samples) == set(expected)
    for name, (activations, gradients) in samples.items():
        mean = np.einsum("nti,nto->io", activations, gradients) / ROWS
        np.testing.assert_allclose(mean, expected[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", ["mse", "categorical"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_samples_have_the_gauss_newton_matrix_of_the_masked_loss(kind, loss):
    model, x, y = _network(kind, loss)
    expected = _gauss_newton(model, x, y)
    for name, (activations, gradients) in fisher_samples(model, x, fisher="exact").items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(_second_moment(activations, gradients), expected[name], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "targets"])
@pytest.mark.parametrize("kind", ["embedding", "masking"])
def test_masked_positions_contribute_nothing(kind, fisher):
    model, x, y = _network(kind, "categorical")
    samples = fisher_samples(model, x, y) if fisher == "targets" else fisher_samples(model, x, seed=0, fisher=fisher)
    for _, gradients in samples.values():
        masked = np.tile(~MASK, (len(gradients) // ROWS, 1))
        np.testing.assert_array_equal(gradients.numpy()[masked], 0)
        assert np.abs(gradients.numpy()[~masked]).max() > 1e-3


@pytest.mark.parametrize("weights", ["examples", "positions"])
@pytest.mark.parametrize("kind", ["no mask", "masking", "convolution"])
def test_sample_weights_count_in_gradient_and_curvature_as_in_the_loss(kind, weights):
    model, x, y = _network(kind, "categorical")
    sample_weight = np.random.default_rng(3).uniform(0, 2, size=(ROWS, 1 if weights == "examples" else STEPS))
    recorder = Recorder(keep_loss=True, persistent=True, always=True)
    for layer in _layers(model).values():
        layer.attach(recorder)
    with tf.GradientTape():
        outputs = model(_tensors(x), training=True)
        model.compute_loss(x=x, y=_tensors(y), y_pred=outputs, sample_weight=_tensors(sample_weight))
    forward_pass = recorder.take()
    for layer in _layers(model).values():
        layer.detach(recorder)
    sources = [record.preactivation for record in forward_pass.records]
    gradients = [ROWS * gradient for gradient in forward_pass.tape.gradient(forward_pass.loss, sources)]
    expected = _loss_gradients(model, x, y, sample_weight)
    for layer, ((activations, slopes),) in layer_samples(forward_pass, gradients).items():
        mean = np.einsum("nti,nto->io", activations, slopes) / ROWS
        np.testing.assert_allclose(mean, expected[layer.name], rtol=1e-5, atol=1e-9)
    exact = preactivation_gradients(forward_pass, pass_heads(forward_pass, "auto"), "exact", tf.constant([0, 0]))
    expected = _gauss_newton(model, x, y, sample_weight)
    for layer, ((activations, slopes),) in layer_samples(forward_pass, exact).items():
        scale = np.abs(expected[layer.name]).max()
        np.testing.assert_allclose(
            _second_moment(activations, slopes), expected[layer.name], rtol=1e-5, atol=1e-6 * scale
        )


@pytest.mark.parametrize(
    ("layer", "stock"),
    [
        (KPSVDDense(2), keras.layers.Dense(2)),
        (KPSVDConv1D(2, 3, padding="same"), keras.layers.Conv1D(2, 3, padding="same")),
        (KPSVDEinsumDense("abc,cd->abd", (None, 2)), keras.layers.EinsumDense("abc,cd->abd", (None, 2))),
    ],
    ids=["dense", "convolution", "einsum"],
)
def test_masks_pass_as_through_the_stock_layer(layer, stock):
    """Handed on by `Dense`, lost with a warning by the others; instrumented or not."""
    seen = []
    for one in (stock, layer):
        values = tf.constant(np.random.default_rng(0).normal(size=(ROWS, STEPS, WIDTH)), tf.float32)
        values._keras_mask = tf.constant(MASK)
        if not stock.supports_masking:
            with pytest.warns(UserWarning, match="destroy the mask"):
                outputs = one(values, training=True)
        else:
            outputs = one(values, training=True)
        mask = getattr(outputs, "_keras_mask", None)
        seen.append(None if mask is None else mask.numpy().tolist())
    assert layer.supports_masking == stock.supports_masking
    assert seen[0] == seen[1] and (seen[0] is not None) == stock.supports_masking


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_masked_sequences_train_in_a_graph_with_sample_weights(kind):
    model, x, y = _network(kind, "categorical")
    optimizer = KPSVD(0.1, curvature_interval=2, inverse_interval=2, seed=0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert len(layers_of(model.trainable_variables)) == len(_layers(model))
    weights = np.random.default_rng(3).uniform(0.5, 2, size=(ROWS, STEPS))
    history = model.fit(x, y, sample_weight=weights, batch_size=ROWS, epochs=10, verbose=0)
    losses = history.history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_a_layer_inside_time_distributed_trains_in_a_graph():
    """Keras reshapes there, and the static shape of the gradient is lost on the way back."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.TimeDistributed(KPSVDDense(2, name="inner"))])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5, 3)).astype("float32")
    model.compile(KPSVD(), "mse")
    history = model.fit(x, x[..., :2] * 2, epochs=20, batch_size=12, verbose=0).history["loss"]
    assert history[-1] < 0.05 * history[0]
    (curvature,) = model.optimizer._blocks
    assert curvature.layer.name == "inner" and curvature.blocks[0].count.numpy() > 0


def test_two_layers_with_one_kernel_are_refused_by_name():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = KPSVDDense(4, name="one"), KPSVDDense(4, name="other")
            self.one.build((None, 4))
            self.other.build((None, 4))
            object.__setattr__(self.other, "_kernel", self.one._kernel)

        def call(self, inputs):
            return self.other(keras.ops.tanh(self.one(inputs)))

    model = Tied()
    model.compile(KPSVD(), "mse", run_eagerly=True)
    x = np.ones((4, 4), "float32")
    with pytest.raises(ValueError, match="'one' and 'other' share one kernel"):
        model.fit(x, x, epochs=2, verbose=0)
