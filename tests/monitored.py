"""Small networks that the tests of `CurvatureMonitor` fit."""

import keras
import numpy as np

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense
from tests.networks import tanh_network

OFTEN = {"curvature_interval": 2, "inverse_interval": 3, "seed": 1}


def dense():
    """Two dense layers."""
    return tanh_network(dtype="float32")


def convolutional():
    """A grouped convolution and a dense layer."""
    keras.utils.set_random_seed(2)
    grouped = KPSVDConv2D(4, 2, groups=2, activation="tanh", name="grouped")
    layers = [grouped, keras.layers.Flatten(), KPSVDDense(2, name="out")]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers], name="network")


def data(model, rows=24):
    """Inputs and targets of a regression."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, *model.input_shape[1:])).astype("float32")
    return x, np.tanh(rng.normal(size=(rows, 2))).astype("float32")


def fit(monitor=None, build=dense, optimizer=None, *, model=None, batch_size=8, epochs=2, callbacks=(), **arguments):
    """Compiles a model, or goes on with one, and fits."""
    if model is None:
        model = build()
        model.compile(optimizer or KPSVD(**OFTEN), "mse", **arguments)
    own = [] if monitor is None else [monitor]
    x, y = data(model)
    history = model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=[*own, *callbacks]
    )
    return model, history.history
