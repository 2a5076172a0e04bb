"""Models of every kind that `instrument` is to copy, and how the tests look at them."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

SUPPORTED = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.EinsumDense)


class Derived(layers.Dense):
    """A class of the user's own."""


class Block(layers.Layer):
    """A layer that makes layers, some when it is built; not registered."""

    def __init__(self, units, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.units, self.activation = units, activation
        self.first = layers.Dense(units)

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second = layers.Dense(self.units)
        self.second.build((*input_shape[:-1], self.units))

    def call(self, inputs):
        return self.second(self.activation(self.first(inputs)))

    def get_config(self):
        return {**super().get_config(), "units": self.units, "activation": self.activation}


class Cell(layers.Layer):
    """A recurrent cell with a dense layer inside, which runs in a loop's graph."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units
        self.dense = layers.Dense(units, activation="tanh")

    def build(self, input_shape):
        self.dense.build((None, input_shape[-1] + self.units))

    def call(self, inputs, states):
        output = self.dense(keras.ops.concatenate([inputs, states[0]], axis=-1))
        return output, [output]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Subclassed(keras.Model):
    """A model that `from_config` knows nothing about."""

    def __init__(self, units=3):
        super().__init__()
        self.hidden = [layers.Dense(units, activation="relu"), layers.Dense(units)]
        self.attention = layers.MultiHeadAttention(2, 2)
        self.out = layers.Dense(1)

    def call(self, inputs):
        for layer in self.hidden:
            inputs = layer(inputs)
        return self.out(inputs + self.attention(inputs, inputs))


class OwnStep(keras.Sequential):
    """A Sequential model whose class matters."""

    def train_step(self, data):
        return {**super().train_step(data), "own": 1.0}


def sequential():
    convolutions = [layers.Conv2D(3, 2, activation="relu"), layers.BatchNormalization(), layers.Flatten()]
    return keras.Sequential([keras.Input((4, 4, 2)), *convolutions, layers.Dropout(0.2), layers.Dense(2)], name="s")


def branches():
    inputs = {"a": keras.Input((6, 3), name="a"), "b": keras.Input((4,), name="b")}
    one = layers.GlobalAveragePooling1D()(layers.Conv1D(4, 3, padding="causal")(inputs["a"]))
    two = layers.Dense(4, activation="tanh", use_bias=False)(inputs["b"])
    merged = keras.ops.relu(one + 2.0 * two)[:, :3]
    return keras.Model(inputs, {"x": layers.Dense(2, name="x")(merged), "y": layers.Dense(1, name="y")(one)}, name="m")


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="relu")], name="inner")
    inputs = keras.Input((4,))
    middle = keras.Model(inputs, layers.Dense(4)(inner(inputs)), name="middle")
    return keras.Sequential([keras.Input((4,)), middle, layers.Dense(2)], name="outer")


def shared_layers():
    encoder = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="encoder")
    dense = layers.Dense(3)
    one, two = keras.Input((4,)), keras.Input((4,))
    sides = [dense(encoder(side)) + dense(encoder(side * 2.0)) for side in (one, two)]
    return keras.Model([one, two], layers.Dense(1)(layers.Concatenate()(sides)))


def regularized():
    options = {
        "kernel_regularizer": keras.regularizers.L1L2(0.01, 0.02),
        "activity_regularizer": "l2",
        "kernel_constraint": keras.constraints.MaxNorm(0.5),
        "kernel_initializer": keras.initializers.HeNormal(seed=3),
    }
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, **options), layers.Dense(2, trainable=False)])


def attention():
    inputs = keras.Input((5, 4))
    hidden = layers.MultiHeadAttention(2, 3, dropout=0.1)(inputs, inputs)
    hidden = layers.GroupQueryAttention(2, 4, 2)(hidden, hidden)
    hidden = layers.TimeDistributed(layers.Dense(3, activation=lambda x: tf.nn.tanh(x)))(hidden)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.EinsumDense("abc,cd->abd", (5, 4))(hidden))))


def lambdas():
    factor, inputs = 3.0, keras.Input((4,))
    hidden = layers.Lambda(lambda x: np.float32(factor) * x)(layers.Dense(3, activation=lambda x: tf.nn.elu(x))(inputs))
    return keras.Model(inputs, layers.Dense(2)(Block(3, activation=lambda x: tf.nn.relu(x))(hidden)))


def recurrent():
    inputs = keras.Input((5, 4))
    hidden = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(layers.Masking()(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.RNN(Cell(3))(hidden)))


def policies():
    inputs = keras.Input((4,), dtype="float32")
    hidden = layers.Dense(4, activation="relu", dtype="mixed_bfloat16")(inputs)
    return keras.Model(inputs, layers.Dense(2, dtype="float64")(layers.Dense(3, dtype="bfloat16")(hidden)))


MODELS = {
    "sequential": sequential,
    "branches": branches,
    "nested": nested,
    "shared": shared_layers,
    "regularized": regularized,
    "attention": attention,
    "lambdas": lambdas,
    "recurrent": recurrent,
    "policies": policies,
}


def batch_of(shapes, rows=6):
    rng = np.random.default_rng(0)
    return keras.tree.map_shape_structure(lambda s: rng.normal(size=(rows, *s[1:])).astype("float32"), shapes)


def make_model(name, settle=True):
    """A model whose every variable has moved, and a batch."""
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    x = batch_of(keras.tree.map_structure(lambda tensor: tensor.shape, inputs))
    if settle:
        model(x, training=True)
    for number, weight in enumerate(model.weights):
        weight.assign(weight + 0.01 * (number + 1))
    return model, x


def targets_of(model, x):
    return keras.tree.map_structure(lambda output: np.cos(np.array(output, "float32")), model(x))


def assert_equal_bits(one, other):
    keras.tree.map_structure(np.testing.assert_array_equal, one, other)


def kinds_of(model):
    return [type(layer) for layer in model._flatten_layers()]


def state_of(model):
    return [variable.numpy() for variable in model.variables]
