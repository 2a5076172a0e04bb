"""`instrument` changes what reports to the recorder, and nothing else."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.layers import Recorder, layers_of
from keras_kpsvd.layers.attention import KPSVDMultiHeadAttention
from keras_kpsvd.layers.instrument import instrument, uninstrument

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


def _sequential():
    convolutions = [layers.Conv2D(3, 2, activation="relu"), layers.BatchNormalization(), layers.Flatten()]
    return keras.Sequential([keras.Input((4, 4, 2)), *convolutions, layers.Dropout(0.2), layers.Dense(2)], name="s")


def _branches():
    inputs = {"a": keras.Input((6, 3), name="a"), "b": keras.Input((4,), name="b")}
    one = layers.GlobalAveragePooling1D()(layers.Conv1D(4, 3, padding="causal")(inputs["a"]))
    two = layers.Dense(4, activation="tanh", use_bias=False)(inputs["b"])
    merged = keras.ops.relu(one + 2.0 * two)[:, :3]
    return keras.Model(inputs, {"x": layers.Dense(2, name="x")(merged), "y": layers.Dense(1, name="y")(one)}, name="m")


def _nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="relu")], name="inner")
    inputs = keras.Input((4,))
    middle = keras.Model(inputs, layers.Dense(4)(inner(inputs)), name="middle")
    return keras.Sequential([keras.Input((4,)), middle, layers.Dense(2)], name="outer")


def _shared():
    encoder = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="encoder")
    dense = layers.Dense(3)
    one, two = keras.Input((4,)), keras.Input((4,))
    sides = [dense(encoder(side)) + dense(encoder(side * 2.0)) for side in (one, two)]
    return keras.Model([one, two], layers.Dense(1)(layers.Concatenate()(sides)))


def _regularized():
    options = {
        "kernel_regularizer": keras.regularizers.L1L2(0.01, 0.02),
        "activity_regularizer": "l2",
        "kernel_constraint": keras.constraints.MaxNorm(0.5),
        "kernel_initializer": keras.initializers.HeNormal(seed=3),
    }
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, **options), layers.Dense(2, trainable=False)])


def _attention():
    inputs = keras.Input((5, 4))
    hidden = layers.MultiHeadAttention(2, 3, dropout=0.1)(inputs, inputs)
    hidden = layers.GroupQueryAttention(2, 4, 2)(hidden, hidden)
    hidden = layers.TimeDistributed(layers.Dense(3, activation=lambda x: tf.nn.tanh(x)))(hidden)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.EinsumDense("abc,cd->abd", (5, 4))(hidden))))


def _lambdas():
    factor, inputs = 3.0, keras.Input((4,))
    hidden = layers.Lambda(lambda x: np.float32(factor) * x)(layers.Dense(3, activation=lambda x: tf.nn.elu(x))(inputs))
    return keras.Model(inputs, layers.Dense(2)(Block(3, activation=lambda x: tf.nn.relu(x))(hidden)))


def _recurrent():
    inputs = keras.Input((5, 4))
    hidden = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(layers.Masking()(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.RNN(Cell(3))(hidden)))


def _policies():
    inputs = keras.Input((4,), dtype="float32")
    hidden = layers.Dense(4, activation="relu", dtype="mixed_bfloat16")(inputs)
    return keras.Model(inputs, layers.Dense(2, dtype="float64")(layers.Dense(3, dtype="bfloat16")(hidden)))


MODELS = {
    "sequential": _sequential,
    "branches": _branches,
    "nested": _nested,
    "shared": _shared,
    "regularized": _regularized,
    "attention": _attention,
    "lambdas": _lambdas,
    "recurrent": _recurrent,
    "policies": _policies,
}


def _batch(shapes, rows=6):
    rng = np.random.default_rng(0)
    return keras.tree.map_shape_structure(lambda s: rng.normal(size=(rows, *s[1:])).astype("float32"), shapes)


def _made(name, settle=True):
    """A model whose every variable has moved, and a batch."""
    keras.utils.set_random_seed(1)
    model = MODELS[name]()
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    x = _batch(keras.tree.map_structure(lambda tensor: tensor.shape, inputs))
    if settle:
        model(x, training=True)
    for number, weight in enumerate(model.weights):
        weight.assign(weight + 0.01 * (number + 1))
    return model, x


def _targets(model, x):
    return keras.tree.map_structure(lambda output: np.cos(np.array(output, "float32")), model(x))


def _equal(one, other):
    keras.tree.map_structure(np.testing.assert_array_equal, one, other)


def _kinds(model):
    return [type(layer) for layer in model._flatten_layers()]


def _state(model):
    return [variable.numpy() for variable in model.variables]


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_the_model_to_the_last_bit_and_every_supported_layer_is_swapped(name):
    model, x = _made(name)
    kinds, configuration = _kinds(model), model.get_config() if name != "lambdas" else None
    copy = instrument(model)
    assert type(copy) is type(model) and copy.name == model.name
    _equal(copy(x), model(x))
    _equal(copy(x, training=True), model(x, training=True))  # Seeds and statistics too.
    _equal(_state(copy), _state(model))
    originals, copies = model._flatten_layers(), copy._flatten_layers()
    assert [layer.name for layer in copies] == [layer.name for layer in originals]
    assert [v.path for v in copy.weights] == [v.path for v in model.weights] or name in ("lambdas", "recurrent")
    assert not {id(layer) for layer in originals} & {id(layer) for layer in copies}
    if not isinstance(model, keras.Sequential):  # `a + b` is an operation without being a layer.
        assert not {id(one) for one in model.operations} & {id(one) for one in copy.operations}
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}
    for one, other in zip(originals, copies, strict=True):
        assert type(other).__name__ == type(one).__name__ and isinstance(other, type(one))
        assert (one.trainable, one.dtype_policy.get_config()) == (other.trainable, other.dtype_policy.get_config())
    assert {type(layer) for layer in copies}.isdisjoint(SUPPORTED)
    assert _kinds(model) == kinds
    assert configuration is None or model.get_config() == configuration


@pytest.mark.parametrize("name", MODELS)
def test_uninstrument_undoes_instrument(name):
    model, x = _made(name)
    again = uninstrument(instrument(model))
    assert _kinds(again) == _kinds(model)
    _equal(again(x), model(x))
    if name not in ("lambdas", "shared"):  # Keras has no stable configuration of lambdas, nor order of shared calls.
        assert again.get_config() == model.get_config()
    assert layers_of(again.variables) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_swapped_layer_trains_with_curvature(name):
    model, x = _made(name)
    copy = instrument(model)
    swapped = [layer.name for layer in copy._flatten_layers() if hasattr(layer, "claim") and layer.trainable]
    y, before, untouched = _targets(copy, x), [v.numpy() for v in copy.trainable_variables], _state(model)
    copy.compile(KPSVD(0.01, damping=0.1), "mse", run_eagerly=name != "recurrent")  # Loops are loops in a graph only.
    copy.optimizer.build(copy.trainable_variables)
    blank = [[v.numpy() for v in block.refresh_targets] for block in copy.optimizer._blocks]
    copy.fit(x, y, verbose=0)
    for block, old in zip(copy.optimizer._blocks, blank, strict=True):
        now, in_loop = [v.numpy() for v in block.refresh_targets], "rnn" in block.layer.path
        assert in_loop != any((one != other).any() for one, other in zip(now, old, strict=True))
    after = [v.numpy() for v in copy.trainable_variables]
    assert all(np.isfinite(value.astype("float32")).all() for value in after)
    moving = zip(copy.trainable_variables, before, after, strict=True)
    assert all((one != other).any() for v, one, other in moving if v.name == "kernel")
    assert sorted(block.layer.name for block in copy.optimizer._blocks) == sorted(swapped)
    _equal(_state(model), untouched)


@pytest.mark.parametrize("name", MODELS)
def test_weights_files_move_both_ways(name, tmp_path):
    (model, x), path = _made(name), tmp_path / "m.weights.h5"
    copy = instrument(model)
    for source, target in ((model, copy), (copy, model)):
        for weight in source.weights:
            weight.assign(weight * 1.5)
        source.save_weights(path)
        target.load_weights(path)
        _equal(target.get_weights(), source.get_weights())
        _equal(target(x), source(x))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"lambdas", "recurrent"}))
def test_keras_files_of_copies_reload(name, tmp_path):
    model, x = _made(name)
    if name == "attention":  # Keras can't save the lambda.
        inputs = keras.Input((5, 4))
        hidden = layers.MultiHeadAttention(2, 3)(inputs, inputs)
        model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(3))(hidden))
    copy = instrument(model)
    copy.compile(KPSVD(0.01), "mse", run_eagerly=True)
    copy.fit(x, _targets(copy, x), verbose=0)
    copy.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    _equal(again(x), copy(x))
    assert _kinds(again) == _kinds(copy)
    _equal(_state(again.optimizer), _state(copy.optimizer))


def test_names_in_files_and_of_classes():
    layer = KPSVDDense(2)
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "keras_kpsvd>KPSVDDense"
    assert type(keras.saving.deserialize_keras_object(config)) is KPSVDDense
    assert repr(KPSVDDense) == "<class 'keras_kpsvd.layers.dense.KPSVDDense'>"
    assert keras.saving.get_registered_object("keras_kpsvd>KPSVDMultiHeadAttention") is KPSVDMultiHeadAttention


def test_frozen_layers_and_variables_stay_frozen():
    model, x = _made("nested")
    model.layers[0].trainable = False
    model.get_layer("middle").trainable = True
    model.get_layer("middle").get_layer("inner").trainable = False
    model.layers[-1].bias.trainable = False
    copy = instrument(model)
    assert [v.path for v in copy.trainable_variables] == [v.path for v in model.trainable_variables]
    copy.compile(KPSVD(0.1), "mse", run_eagerly=True)
    before = copy.get_weights()
    copy.fit(x, _targets(model, x) + 1, verbose=0)
    moved = [(one != other).any() for one, other in zip(before, copy.get_weights(), strict=True)]
    assert moved == [v.trainable and v.path in {t.path for t in copy.trainable_variables} for v in copy.weights]
    copy.get_layer("middle").get_layer("inner").trainable = True
    model.get_layer("middle").get_layer("inner").trainable = True
    assert len(copy.trainable_variables) == len(model.trainable_variables)


def test_classes_of_the_users_own_are_left_alone():
    model = keras.Sequential([keras.Input((3,)), Derived(4), layers.Dense(2)])
    assert [type(layer) for layer in instrument(model).layers] == [Derived, KPSVDDense]


def test_a_compiled_model_and_its_copy_train_alike_to_the_last_bit():
    """Losses, metrics, the optimizer's state, dropout's seeds, batch statistics and the class's own `train_step`."""

    def own_loss(y, z):
        return keras.ops.mean(keras.ops.abs(y - z) ** 1.5, axis=-1)

    keras.utils.set_random_seed(0)
    model = OwnStep([*_sequential().layers], name="own")
    model.build((None, 4, 4, 2))
    x, y = _batch((None, 4, 4, 2), 16), _batch((None, 2), 16)
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.9)
    metrics = ["mae", keras.metrics.MeanSquaredError("second"), own_loss]
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0), own_loss, metrics=metrics, steps_per_execution=2, loss_weights=2.0
    )
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    for copy in (instrument(model), uninstrument(instrument(model))):
        assert type(copy) is OwnStep
        assert (copy.steps_per_execution, copy.run_eagerly) == (2, False)
        assert _state(copy.optimizer)[0] == 4
        _equal(_state(copy.optimizer), _state(model.optimizer))
        assert copy.optimizer is not model.optimizer
    original = instrument(model)  # Trained in its place, so that both copies above have the same start.
    results = [m.fit(x, y, batch_size=4, shuffle=False, epochs=2, verbose=0).history for m in (copy, original, model)]
    assert results[0] == results[1] == results[2] and "second" in results[0] and "own" in results[0]
    _equal(_state(copy), _state(model))


def test_a_copy_keeps_the_state_of_a_kpsvd_optimizer_and_a_stock_one_gets_its_sgd():
    model, x = _made("sequential")
    copy = instrument(model)
    copy.compile(KPSVD(0.01, momentum=0.8, seed=1), "mse", run_eagerly=True)
    y = _targets(copy, x)
    copy.fit(x, y, verbose=0)
    second = instrument(copy)
    assert type(second.optimizer) is KPSVD
    _equal(_state(second.optimizer), _state(copy.optimizer))
    assert second.fit(x, y, verbose=0).history == copy.fit(x, y, verbose=0).history
    _equal(second.get_weights(), copy.get_weights())
    stock = uninstrument(copy)
    assert type(stock.optimizer) is keras.optimizers.SGD
    assert (float(stock.optimizer.learning_rate), stock.optimizer.momentum) == (np.float32(0.01), 0.8)
    assert stock.evaluate(x, y, verbose=0) == copy.evaluate(x, y, verbose=0)
    stock.fit(x, y, verbose=0)


def test_training_the_copy_leaves_the_original_to_its_own_training():
    results = []
    for instrumenting in (False, True):
        model, x = _made("sequential")
        model.compile("sgd", "mse")
        y = _targets(model, x)
        if instrumenting:
            copy = instrument(model)
            copy.compile(KPSVD(0.01), "mse", run_eagerly=True)
            copy.fit(x, y, verbose=0)
        results.append([model.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"], _state(model)])
    _equal(*results)


@pytest.mark.parametrize("built", [True, False])
def test_a_subclassed_model_is_instrumented_in_place(built):
    keras.utils.set_random_seed(0)
    model, x = Subclassed(), _batch((None, 5, 4))
    if built:
        expected = model(x)
        model.compile("sgd", "mse", run_eagerly=True)
        model.fit(x, np.ones((6, 5, 1)), verbose=0)
        expected = model(x)
    assert instrument(model) is model
    if built:
        assert model.train_function is None
        _equal(model(x), expected)
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
    _equal(model(x), expected)
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
    model, x = Subclassed(), _batch((None, 5, 4))
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
    _equal(uninstrument(model)(np.ones((2, 3), "float32")), expected)
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
    model, x = _made("nested")
    one = instrument(model)
    two = instrument(one)
    assert two is not one and _kinds(two) == _kinds(one)
    _equal(two(x), one(x))


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
    _equal(_state(copy.optimizer), _state(model.optimizer))


def test_what_preprocessing_layers_have_adapted_to_is_kept():
    words, numbers = keras.Input((2,), dtype="string"), keras.Input((3,))
    lookup, scale = layers.StringLookup(output_mode="multi_hot"), layers.Normalization()
    lookup.adapt(np.array([["a", "b"], ["c", "a"]]))
    scale.adapt(np.arange(12.0).reshape(4, 3))
    model = keras.Model([words, numbers], layers.Dense(2)(layers.Concatenate()([lookup(words), scale(numbers)])))
    x = [tf.constant([["a", "c"], ["b", "z"]]), tf.ones((2, 3))]
    _equal(instrument(model)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet50", "VGG16", "MobileNetV2", "EfficientNetB0"])
def test_applications(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=10)
    copy = instrument(model)
    x = _batch((None, 32, 32, 3), 2)
    _equal(copy(x), model(x))
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    swapped = sum(type(layer) in SUPPORTED for layer in model.layers)
    assert len(layers_of(copy.variables)) == swapped
    assert _kinds(uninstrument(copy)) == _kinds(model)


def test_the_repr_of_a_layer_tells_that_it_is_instrumented():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="one")])
    assert repr(instrument(model).layers[0]) == "<KPSVDDense name=one, built=True>"
    assert repr(uninstrument(instrument(model)).layers[0]) == repr(model.layers[0])
