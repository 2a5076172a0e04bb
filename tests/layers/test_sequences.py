"""Sequences with masks: the samples of every layer are those of the masked loss, in gradient and in curvature."""

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd import KPSVDConv1D, KPSVDDense

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


def _network(kind, loss, weighted=False):
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
