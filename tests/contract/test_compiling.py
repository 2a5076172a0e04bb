"""Ways to compile, and to name the optimizer: XLA, strings, configurations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd
from keras_kpsvd import KPSVD
from tests import reference
from tests.contract.oracle import PLAIN, assert_steps, moved, squared_error_directions
from tests.networks import matrices, problem, tanh_network

NAME = "keras_kpsvd>KPSVD"


def test_with_jit_compile_keras_says_that_it_does_not_and_the_step_is_the_same():
    x, y = problem()
    model = tanh_network()
    with pytest.warns(UserWarning, match=r"doesn't support `jit_compile=True`. Proceeding with `jit_compile=False`"):
        model.compile(KPSVD(**PLAIN), "mse", jit_compile=True)
    start = matrices(model)
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), moved(start, squared_error_directions(start, x, y)), start)


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.01}], ids=["adaptive", "given"])
def test_a_model_without_instrumented_layers_trains_under_xla_and_skips_what_is_not_finite(options):
    """Keras compiles such models by XLA of its own accord where there is a GPU."""
    x, y = problem()
    model = tanh_network(layer=keras.layers.Dense)
    model.compile(KPSVD(**options), "mse", jit_compile=True)
    start = weights = matrices(model)
    velocity = [0 * w for w in weights]
    for number in range(3):
        x, y = problem(seed=number)
        gradients = reference.squared_error_gradients(weights, x, y)
        velocity = [0.9 * v - 0.01 * g for v, g in zip(velocity, gradients, strict=True)]
        weights = [w + v for w, v in zip(weights, velocity, strict=True)]
        model.train_on_batch(x, y)
        model.train_on_batch(np.full_like(x, np.nan), y)
    assert model.jit_compile
    assert_steps(matrices(model), weights, start)


def test_a_hand_written_step_with_instrumented_layers_under_xla_is_refused_by_name():
    x, y = problem()
    model = tanh_network()
    optimizer = KPSVD(**PLAIN, likelihood="normal")
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=True, autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    before = matrices(model)
    with pytest.raises(ValueError, match="jit_compile"):
        step()
    for now, wanted in zip(matrices(model), before, strict=True):
        np.testing.assert_array_equal(now, wanted)


def _settings(optimizer):
    """The configuration but for the seed, which everyone draws anew."""
    return {name: value for name, value in optimizer.get_config().items() if name != "seed"}


def test_the_registered_name_is_the_optimizer_with_its_defaults():
    found = keras.optimizers.get(NAME)
    assert type(found) is KPSVD and found.adaptive
    assert _settings(found) == _settings(KPSVD())
    model = tanh_network()
    model.compile(NAME, "mse")
    assert type(model.optimizer) is KPSVD


def test_a_dictionary_names_the_optimizer_and_its_arguments():
    arguments = {"learning_rate": 0.25, "method": "kpsvd", "damping": 0.5, "weight_decay": 0.125, "seed": 3}
    for name in (NAME, "KPSVD"):
        found = keras.optimizers.get(
            {
                "module": "keras_kpsvd.optimizer",
                "registered_name": NAME,
                "class_name": name,
                "config": arguments,
            }
        )
        assert type(found) is KPSVD
        assert found.get_config() == KPSVD(**arguments).get_config()


def test_a_clone_is_compiled_from_the_configuration_with_every_setting():
    model = tanh_network()
    model.compile(KPSVD(**PLAIN, weight_decay=0.5, clipnorm=0.25, use_ema=True, seed=7), "mse")
    clone = keras.models.clone_model(model)
    clone.compile_from_config(model.get_compile_config())
    assert type(clone.optimizer) is KPSVD and clone.optimizer is not model.optimizer
    assert clone.optimizer.get_config() == model.optimizer.get_config()
    assert keras_kpsvd.KPSVD.from_config(model.optimizer.get_config()).get_config() == model.optimizer.get_config()
