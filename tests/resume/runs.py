"""Tiny runs that are interrupted, restored and compared bit for bit; everything here is what a user could write."""

import contextlib
import pathlib

import h5py
import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd import KPSVDDense
from tests.networks import problem

# After seven updates neither a refresh nor an inversion is due: they come at 6 and 8, and at 5 and 10. With two batches
# an update, seven batches are three updates and half of one, between 2 and 4, and between 0 and 5.
INTERVALS = {"curvature_interval": 2, "inverse_interval": 5}
BATCH, SAVED_AT, BATCHES = 4, 7, 14

METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def network(optimizer, deep=False):
    """A stock and an instrumented layer, compiled in graph mode, the same weights every time.

    Deep has two instrumented ones, the first at two positions of each example, whose singular vectors are found by
    power iteration from those of the last refresh, and between them a layer with state that is not trained.
    """
    keras.utils.set_random_seed(3)
    layers = keras.layers
    hidden = [layers.Dense(3, activation="tanh", name="hidden")]
    if deep:
        shared = KPSVDDense(3, activation="tanh", name="hidden")
        hidden = [layers.Reshape((2, 2)), shared, layers.Flatten(), layers.BatchNormalization(name="normalization")]
    out = KPSVDDense(2, dtype="float32", name="out")
    model = keras.Sequential([keras.Input((4,)), *hidden, out], name="network")
    model.compile(optimizer, "mse")
    return model


def data(batches=BATCHES, batch=BATCH):
    """Inputs and targets of so many batches."""
    return problem(rows=batches * batch, dtype="float32")


def fit(model, x, y, first, last, batch=BATCH, callbacks=()):
    """Trains on batches `first` to `last` in one stock `fit`."""
    rows = slice(first * batch, last * batch)
    model.fit(x[rows], y[rows], batch_size=batch, shuffle=False, verbose=0, callbacks=list(callbacks))


def everything(model):
    """`[(name, value)]` of every variable of a model and its optimizer, in order; a loaded one's lack the model's."""
    variables = [*model.variables, *model.optimizer.variables]
    return [(v.name.replace("network_", ""), np.array(v.numpy())) for v in variables]


def assert_bitwise(one, other):
    """The same variables with the same bits, the sign of zero included."""
    assert [name for name, _ in one] == [name for name, _ in other]
    for (name, value), (_, expected) in zip(one, other, strict=True):
        assert value.dtype == expected.dtype, name
        np.testing.assert_array_equal(value, expected, err_msg=name)
        assert value.tobytes() == expected.tobytes(), name


def counter(optimizer, name):
    """An optimizer's own counter, through Keras's wrapper for float16 too."""
    return next(int(v.numpy()) for v in optimizer.variables if v.name == name)


class At(keras.callbacks.Callback):
    """Calls `action(model)` once so many batches are done."""

    def __init__(self, batches, action):
        super().__init__()
        self.batches, self.action = batches, action

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.batches:
            self.action(self.model)


class InterruptError(Exception):
    """What ends a run too early."""


def interrupt(model):
    """An action for `At`."""
    raise InterruptError


def batches_left(model, x, y, batch=BATCH):
    """The batches that a run has not seen yet, by its optimizer's own count, as one stock dataset.

    `BackupAndRestore` restores the state of any batch, but starts the epoch over: without this a run that was saved
    in the middle of an epoch sees that epoch's first batches twice. The count is read when the first batch is asked
    for, which is after the callback restored it.
    """

    def generate():
        for number in range(counter(model.optimizer, "iteration"), len(x) // batch):
            rows = slice(number * batch, (number + 1) * batch)
            yield x[rows], y[rows]

    signature = tuple(tf.TensorSpec((batch, one.shape[1]), one.dtype) for one in (x, y))
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


def torn_states(good, scratch):
    """What a kill leaves in the place of the weights file `good`: `{when: bytes}`.

    Found by tracing the system calls of a save and opening the file after each: HDF5 writes a header, the data, the
    tables, and the header again.
    """
    good = pathlib.Path(good).read_bytes()
    with h5py.File(scratch, "w"):
        header = pathlib.Path(scratch).read_bytes()
    assert 0 < len(header) < len(good) // 2
    return {
        "opened": b"",
        "header": header,
        "data": header + bytes(2048) + good[len(header) + 2048 : len(good) // 2],
        "all but the last header": header + good[len(header) :],
    }


@contextlib.contextmanager
def policy(name):
    """The global dtype policy for a while."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
