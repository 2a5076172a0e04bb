"""Variables without curvature train as by `keras.optimizers.SGD` with momentum: bit for bit, over a hundred steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense


def _branches(sparse=True):
    """A plain branch of many kinds of variables, and an instrumented one with its own input, output and loss."""
    keras.utils.set_random_seed(1)
    plain, tokens, curved = keras.Input((4,)), keras.Input((3,), dtype="int32"), keras.Input((4,))
    layers = keras.layers
    vocabulary = layers.Embedding(7, 2, name="plain_embedding") if sparse else layers.CategoryEncoding(7, "multi_hot")
    x = layers.Concatenate()([plain, layers.Flatten()(vocabulary(tokens))])
    x = layers.Dense(5, "tanh", kernel_constraint="max_norm", kernel_regularizer="l2", name="plain_dense")(x)
    x = layers.LayerNormalization(name="plain_norm")(layers.BatchNormalization(name="plain_batch")(x))
    x = layers.Dense(2, name="plain_out")(x)
    y = KPSVDDense(2, name="out")(KPSVDDense(3, "tanh", name="hidden")(curved))
    return keras.Model([plain, tokens, curved], [x, y])


def _data(rows):
    rng = np.random.default_rng(0)
    x, z, targets = rng.normal(size=(3, rows, 4)).astype("float32")
    return [x, rng.integers(0, 7, (rows, 3)), z], [targets[:, :2], targets[:, 2:]]


def _plain(model):
    """Weights of the plain branch, and what the optimizer keeps of them."""
    kept = {v.name: v.numpy() for v in model.optimizer.variables if v.name.startswith("plain_")}
    return _weights(model) | kept


def _weights(model):
    return {v.path: v.numpy() for v in model.weights if v.path.startswith("plain_")}


def _schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 20, 0.5)


CASES = {
    "adaptive": {"learning_rate": 0.01, "momentum": 0.9},
    "nesterov, schedule, decay, norm": {
        "learning_rate": _schedule,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
        "clipnorm": 0.3,
    },
    # With dense gradients: Keras divides no sparse ones by a scale.
    "no momentum, averages, accumulation, value, scaling": {
        "learning_rate": 0.05,
        "momentum": 0.0,
        "use_ema": True,
        "ema_momentum": 0.9,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
        "clipvalue": 0.05,
        "loss_scale_factor": 64.0,
    },
}


def _made(kind, arguments):
    return kind(**{name: value() if callable(value) else value for name, value in arguments.items()})


@pytest.fixture
def rewriting(request):
    """Grappler rewrites gradients by what else is in the graph: beside the adaptive step's exact model, which it
    computes from the same forward pass, that moves the last bit of batch normalisation's gradient.
    """
    if request.param:
        yield
        return
    options = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False, **options})


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rewriting"), [(case, case != "adaptive") for case in CASES], indirect=["rewriting"])
def test_a_hundred_steps_of_stock_fit_leave_the_bits_that_sgd_leaves(case, rewriting):
    arguments = CASES[case]
    ours = {} if case == "adaptive" else {**arguments, "damping": 0.1}
    results = []
    for kind, options in ((keras.optimizers.SGD, arguments), (KPSVD, ours)):
        model = _branches(sparse="loss_scale_factor" not in arguments)
        start = _weights(model)
        model.compile(_made(kind, options), ["mse", "mse"])
        x, y = _data(400)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        results.append(_plain(model))
    assert results[0].keys() <= results[1].keys()
    for name, value in results[0].items():
        np.testing.assert_array_equal(results[1][name], value, err_msg=name)
        assert name not in start or not np.array_equal(value, start[name]), name
