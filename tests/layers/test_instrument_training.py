"""What a copy keeps of a compiled model, subclassed models in place, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.layers import Recorder, layers_of
from keras_kpsvd.layers.instrument import instrument, uninstrument
from tests.layers.instrument_models import (
    SUPPORTED,
    Derived,
    OwnStep,
    Subclassed,
    assert_equal_bits,
    batch_of,
    kinds_of,
    make_model,
    sequential,
    state_of,
    targets_of,
)


def test_a_compiled_model_and_its_copy_train_alike_to_the_last_bit():
    """Losses, metrics, the optimizer's state, dropout's seeds, batch statistics and the class's own `train_step`."""

    def own_loss(y, z):
        return keras.ops.mean(keras.ops.abs(y - z) ** 1.5, axis=-1)

    keras.utils.set_random_seed(0)
    model = OwnStep([*sequential().layers], name="own")
    model.build((None, 4, 4, 2))
    x, y = batch_of((None, 4, 4, 2), 16), batch_of((None, 2), 16)
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.9)
    metrics = ["mae", keras.metrics.MeanSquaredError("second"), own_loss]
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0), own_loss, metrics=metrics, steps_per_execution=2, loss_weights=2.0
    )
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for copy in (instrument(model), uninstrument(instrument(model))):
        assert type(copy) is OwnStep
        assert (copy.steps_per_execution, copy.run_eagerly) == (2, False)
        assert state_of(copy.optimizer)[0] == 4
        assert_equal_bits(state_of(copy.optimizer), state_of(model.optimizer))
        assert copy.optimizer is not model.optimizer
    original = instrument(model)  # Trained in its place, so that both copies above have the same start.
    results = [m.fit(x, y, batch_size=4, shuffle=False, epochs=2, verbose=0).history for m in (copy, original, model)]
    assert results[0] == results[1] == results[2] and "second" in results[0] and "own" in results[0]
    assert_equal_bits(state_of(copy), state_of(model))


def test_a_copy_keeps_the_state_of_a_kpsvd_optimizer_and_a_stock_one_gets_its_sgd():
    model, x = make_model("sequential")
    copy = instrument(model)
    copy.compile(KPSVD(0.01, momentum=0.8, seed=1), "mse", run_eagerly=True)
    y = targets_of(copy, x)
    copy.fit(x, y, verbose=0)
    second = instrument(copy)
    assert type(second.optimizer) is KPSVD
    assert_equal_bits(state_of(second.optimizer), state_of(copy.optimizer))
    assert second.fit(x, y, verbose=0).history == copy.fit(x, y, verbose=0).history
    assert_equal_bits(second.get_weights(), copy.get_weights())
    stock = uninstrument(copy)
    assert type(stock.optimizer) is keras.optimizers.SGD
    assert (float(stock.optimizer.learning_rate), stock.optimizer.momentum) == (np.float32(0.01), 0.8)
    assert stock.evaluate(x, y, verbose=0) == copy.evaluate(x, y, verbose=0)
    stock.fit(x, y, verbose=0)


def test_training_the_copy_leaves_the_original_to_its_own_training():
    results = []
    for instrumenting in (False, True):
        model, x = make_model("sequential")
        model.compile("sgd", "mse")
        y = targets_of(model, x)
        if instrumenting:
            copy = instrument(model)
            copy.compile(KPSVD(0.01), "mse", run_eagerly=True)
            copy.fit(x, y, verbose=0)
        results.append([model.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"], state_of(model)])
    assert_equal_bits(*results)


@pytest.mark.parametrize("built", [True, False])
def test_a_subclassed_model_is_instrumented_in_place(built):
    keras.utils.set_random_seed(0)
    model, x = Subclassed(), batch_of((None, 5, 4))
    if built:
        expected = model(x)
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(x, np.ones((6, 5, 1)), verbose=0)
        expected = model(x)
    assert instrument(model) is model
    if built:
        assert model.train_function is None
        assert_equal_bits(model(x), expected)
    model.compile(KPSVD(0.01), "mse", run_eagerly=True)
    model.fit(x, np.ones((6, 5, 1)), verbose=0)
    names = [block.layer.name for block in model.optimizer._blocks]
    assert sorted(names)[:4] == ["attention_output", *sorted(layer.name for layer in (*model.hidden, model.out))]
    assert len(names) == 7
    assert all(type(layer) is KPSVDDense for layer in (*model.hidden, model.out))
    with pytest.warns(UserWarning, match=r"call `model\.compile` again"):
        expected = instrument(model)(x)
    with pytest.warns(UserWarning, match=r"call `model\.compile` again"):
        assert uninstrument(model) is model
    assert {type(layer) for layer in (*model.hidden, model.out)} == {layers.Dense}
    assert layers_of(model.variables) == []
    assert_equal_bits(model(x), expected)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(x, np.ones((6, 5, 1)), verbose=0)


@pytest.mark.parametrize("built", [True, False])
def test_a_layer_swapped_in_place_hears_that_it_trains(built):
    """Keras asks once, when a layer is made, whether its `call` wants to know; that of the stock Conv2D does not."""

    class Convolutions(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Conv2D(2, 2), layers.Flatten(), layers.Dense(1)]

        def call(self, inputs, training=None):
            for layer in self.parts:
                inputs = layer(inputs)
            return inputs

    model, x = Convolutions(), tf.ones((2, 3, 3, 1))
    if built:
        model(x)
    instrument(model)
    model(x)
    recorder = Recorder()
    for layer in layers_of(model.variables):
        layer.attach(recorder)
    with tf.GradientTape():
        model(x, training=True)
    assert [record.layer for record in recorder.take().records] == [model.parts[0], model.parts[2]]
    assert not model.parts[0].supports_jit and not model.parts[2].supports_jit
    uninstrument(model)
    assert model.parts[0].supports_jit and not model.parts[0]._call_has_training_arg


def test_an_unbuilt_subclassed_model_can_be_taken_back():
    model, x = Subclassed(), batch_of((None, 5, 4))
    uninstrument(instrument(model))
    model(x)
    assert {type(layer) for layer in (*model.hidden, model.out)} == {layers.Dense}


def test_layers_that_an_unbuilt_subclassed_model_was_written_with_cannot_be_taken_back_before_it_is_built():
    class Written(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = KPSVDDense(2)

        def call(self, inputs):
            return self.dense(inputs)

    model = Written()
    with pytest.raises(ValueError, match=r"before it is built.*keras\.layers\.Dense"):
        uninstrument(model)
    expected = model(np.ones((2, 3), "float32"))
    assert_equal_bits(uninstrument(model)(np.ones((2, 3), "float32")), expected)
    assert type(model.dense) is layers.Dense


def test_an_unbuilt_sequential_model_is_copied_unbuilt():
    model = keras.Sequential([layers.Dense(3), layers.Dense(1)])
    model.compile("sgd", "mse")
    copy = instrument(model)
    assert not copy.built and copy.compiled
    copy.compile(KPSVD(0.01), "mse", run_eagerly=True)
    copy.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    assert len(copy.optimizer._blocks) == 2
    assert not model.built


def test_an_instrumented_model_is_copied():
    model, x = make_model("nested")
    one = instrument(model)
    two = instrument(one)
    assert two is not one and kinds_of(two) == kinds_of(one)
    assert_equal_bits(two(x), one(x))


@pytest.mark.parametrize("call", [instrument, uninstrument])
@pytest.mark.parametrize("wrong", [None, "model", layers.Dense(2), [keras.Sequential()]])
def test_what_is_no_model_is_refused(call, wrong):
    with pytest.raises(TypeError, match=rf"{call.__name__}\(model\) expects `model` to be a keras\.Model.*Received"):
        call(wrong)


def test_a_model_without_supported_layers_is_refused_by_name_with_what_it_holds():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), Derived(2)], name="bare")
    with pytest.raises(ValueError, match=r"'bare'.*keras\.layers\.Conv2D.*'BatchNormalization', 'Derived'"):
        instrument(model)


def test_a_layer_that_cannot_be_copied_is_named():
    class Careless(layers.Layer):
        def __init__(self, factor):
            super().__init__(name="careless")
            self.factor = factor

        def get_config(self):
            return {}

    model = keras.Sequential([keras.Input((3,)), Careless(2), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"(?s)could not copy layer 'careless'.*factor.*get_config"):
        instrument(model)


def test_weights_outside_the_graph_are_not_lost_silently():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.extra = layers.Dense(3)
    model.extra.build((None, 2))
    if model.extra not in model._flatten_layers():
        pytest.skip("This release of Keras does not count the layer among the model's.")
    with pytest.raises(ValueError, match=r"could not copy these weights.*kernel"):
        instrument(model)


def test_a_mixed_float16_model_gets_its_loss_scaling():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
        model.compile("sgd", "mse")
    finally:
        keras.config.set_dtype_policy("float32")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    copy = instrument(model)
    assert copy.dtype_policy.name == "mixed_float16"
    assert isinstance(copy.optimizer, keras.optimizers.LossScaleOptimizer)
    assert_equal_bits(state_of(copy.optimizer), state_of(model.optimizer))


def test_what_preprocessing_layers_have_adapted_to_is_kept():
    words, numbers = keras.Input((2,), dtype="string"), keras.Input((3,))
    lookup, scale = layers.StringLookup(output_mode="multi_hot"), layers.Normalization()
    lookup.adapt(np.array([["a", "b"], ["c", "a"]]))
    scale.adapt(np.arange(12.0).reshape(4, 3))
    model = keras.Model([words, numbers], layers.Dense(2)(layers.Concatenate()([lookup(words), scale(numbers)])))
    x = [tf.constant([["a", "c"], ["b", "z"]]), tf.ones((2, 3))]
    assert_equal_bits(instrument(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50", "VGG16", "MobileNetV2", "EfficientNetB0"])
def test_applications(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=10)
    copy = instrument(model)
    x = batch_of((None, 32, 32, 3), 2)
    assert_equal_bits(copy(x), model(x))
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    swapped = sum(type(layer) in SUPPORTED for layer in model.layers)
    assert len(layers_of(copy.variables)) == swapped
    assert kinds_of(uninstrument(copy)) == kinds_of(model)


def test_the_repr_of_a_layer_tells_that_it_is_instrumented():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="one")])
    assert repr(instrument(model).layers[0]) == "<KPSVDDense name=one, built=True>"
    assert repr(uninstrument(instrument(model)).layers[0]) == repr(model.layers[0])
