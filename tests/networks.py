"""Small networks that the tests of optimizer and layers train, and how they read them."""

import keras
import numpy as np

from keras_kpsvd import KPSVDDense


def tanh_network(sizes=(4, 3, 2), dtype="float64", layer=KPSVDDense):
    """The network of `reference.forward`, the same weights every time."""
    keras.utils.set_random_seed(7)
    dense = [layer(units, activation="tanh", dtype=dtype, name=f"dense{n}") for n, units in enumerate(sizes[1:-1])]
    layers = [keras.Input((sizes[0],), dtype=dtype), *dense, layer(sizes[-1], dtype=dtype, name="out")]
    model = keras.Sequential(layers, name="network")
    for one in model.layers:  # Biases that are not zero, so that no test passes without them.
        one.bias.assign(np.linspace(-0.3, 0.4, one.units))
    return model


def problem(rows=10, sizes=(4, 3, 2), dtype="float64", seed=0):
    """Inputs and targets of a regression."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, sizes[0]))
    y = np.sin(x @ rng.normal(size=(sizes[0], sizes[-1]))) + 0.1 * rng.normal(size=(rows, sizes[-1]))
    return x.astype(dtype), y.astype(dtype)


def compiled(model, optimizer, loss="mse", **arguments):
    """An eager model whose first step has curvature."""
    model.compile(optimizer, loss, run_eagerly=arguments.pop("run_eagerly", True), **arguments)
    optimizer.build(model.trainable_variables)
    return model


def matrices(model):
    """Weights of each dense layer as one float64 matrix, bias last."""
    return [
        np.concatenate([layer.kernel.numpy(), layer.bias.numpy()[None]]).astype("float64")
        for layer in model.layers
        if hasattr(layer, "kernel")
    ]


def state(model, *, but=("iteration", "learning_rate", "skipped_steps")):
    """`{path: value}` of all variables of a model and its optimizer; a loaded layer's path lacks the model's name."""
    return {
        v.path.replace("network/", "").replace("network_", ""): v.numpy()
        for v in [*model.variables, *model.optimizer.variables]
        if v.name not in but
    }


def assert_same(one, other):
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def variable(optimizer, name):
    """The value of an optimizer's variable."""
    return next(v.numpy() for v in optimizer.variables if v.name == name)


def assert_told_once(told):
    """Of the warnings that `pytest.warns` caught, one is a RuntimeWarning."""
    messages = [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)]
    assert len(messages) == 1, messages
