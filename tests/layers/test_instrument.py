"""`instrument` changes what reports to the recorder, and nothing else."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.layers import layers_of
from keras_kpsvd.layers.attention import KPSVDMultiHeadAttention
from keras_kpsvd.layers.instrument import instrument, uninstrument
from tests.layers.instrument_models import (
    MODELS,
    SUPPORTED,
    Derived,
    assert_equal_bits,
    kinds_of,
    make_model,
    state_of,
    targets_of,
)


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_the_model_to_the_last_bit_and_every_supported_layer_is_swapped(name):
    model, x = make_model(name)
    kinds, configuration = kinds_of(model), model.get_config() if name != "lambdas" else None
    copy = instrument(model)
    assert type(copy) is type(model) and copy.name == model.name
    assert_equal_bits(copy(x), model(x))
    assert_equal_bits(copy(x, training=True), model(x, training=True))  # Seeds and statistics too.
    assert_equal_bits(state_of(copy), state_of(model))
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
    assert kinds_of(model) == kinds
    assert configuration is None or model.get_config() == configuration


@pytest.mark.parametrize("name", MODELS)
def test_uninstrument_undoes_instrument(name):
    model, x = make_model(name)
    again = uninstrument(instrument(model))
    assert kinds_of(again) == kinds_of(model)
    assert_equal_bits(again(x), model(x))
    if name not in ("lambdas", "shared"):  # Keras has no stable configuration of lambdas, nor order of shared calls.
        assert again.get_config() == model.get_config()
    assert layers_of(again.variables) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_swapped_layer_trains_with_curvature(name):
    model, x = make_model(name)
    copy = instrument(model)
    swapped = [layer.name for layer in copy._flatten_layers() if hasattr(layer, "claim") and layer.trainable]
    y, before, untouched = targets_of(copy, x), [v.numpy() for v in copy.trainable_variables], state_of(model)
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
    assert_equal_bits(state_of(model), untouched)


@pytest.mark.parametrize("name", MODELS)
def test_weights_files_move_both_ways(name, tmp_path):
    (model, x), path = make_model(name), tmp_path / "m.weights.h5"
    copy = instrument(model)
    for source, target in ((model, copy), (copy, model)):
        for weight in source.weights:
            weight.assign(weight * 1.5)
        source.save_weights(path)
        target.load_weights(path)
        assert_equal_bits(target.get_weights(), source.get_weights())
        assert_equal_bits(target(x), source(x))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"lambdas", "recurrent"}))
def test_keras_files_of_copies_reload(name, tmp_path):
    model, x = make_model(name)
    if name == "attention":  # Keras can't save the lambda.
        inputs = keras.Input((5, 4))
        hidden = layers.MultiHeadAttention(2, 3)(inputs, inputs)
        model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(3))(hidden))
    copy = instrument(model)
    copy.compile(KPSVD(0.01), "mse", run_eagerly=True)
    copy.fit(x, targets_of(copy, x), verbose=0)
    copy.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert_equal_bits(again(x), copy(x))
    assert kinds_of(again) == kinds_of(copy)
    assert_equal_bits(state_of(again.optimizer), state_of(copy.optimizer))


def test_names_in_files_and_of_classes():
    layer = KPSVDDense(2)
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "keras_kpsvd>KPSVDDense"
    assert type(keras.saving.deserialize_keras_object(config)) is KPSVDDense
    assert repr(KPSVDDense) == "<class 'keras_kpsvd.layers.dense.KPSVDDense'>"
    assert keras.saving.get_registered_object("keras_kpsvd>KPSVDMultiHeadAttention") is KPSVDMultiHeadAttention


def test_frozen_layers_and_variables_stay_frozen():
    model, x = make_model("nested")
    model.layers[0].trainable = False
    model.get_layer("middle").trainable = True
    model.get_layer("middle").get_layer("inner").trainable = False
    model.layers[-1].bias.trainable = False
    copy = instrument(model)
    assert [v.path for v in copy.trainable_variables] == [v.path for v in model.trainable_variables]
    copy.compile(KPSVD(0.1), "mse", run_eagerly=True)
    before = copy.get_weights()
    copy.fit(x, targets_of(model, x) + 1, verbose=0)
    moved = [(one != other).any() for one, other in zip(before, copy.get_weights(), strict=True)]
    assert moved == [v.trainable and v.path in {t.path for t in copy.trainable_variables} for v in copy.weights]
    copy.get_layer("middle").get_layer("inner").trainable = True
    model.get_layer("middle").get_layer("inner").trainable = True
    assert len(copy.trainable_variables) == len(model.trainable_variables)


def test_classes_of_the_users_own_are_left_alone():
    model = keras.Sequential([keras.Input((3,)), Derived(4), layers.Dense(2)])
    assert [type(layer) for layer in instrument(model).layers] == [Derived, KPSVDDense]
