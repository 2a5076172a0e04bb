"""A new model, restored from each of Keras's files, ends in the bits of the run that was never interrupted."""

import functools
import json

import keras
import pytest

from keras_kpsvd import KPSVD
from tests.resume.runs import (
    BATCHES,
    INTERVALS,
    METHODS,
    SAVED_AT,
    At,
    InterruptError,
    assert_bitwise,
    batches_left,
    counter,
    data,
    everything,
    fit,
    interrupt,
    network,
    policy,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:KPSVD trains by SGD with momentum"),
    pytest.mark.filterwarnings("ignore:.*shuffle=True. was passed, but will be ignored"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
]

EMA_AND_ACCUMULATION = {"use_ema": True, "ema_momentum": 0.8, "gradient_accumulation_steps": 2, "weight_decay": 0.01}


def _goes_on_from_a_keras_file(path, method, deep=False):
    x, y = data()
    model = network(KPSVD(method=method, seed=5, **INTERVALS), deep)
    fit(model, x, y, 0, BATCHES, callbacks=[At(SAVED_AT, lambda model: model.save(path))])
    loaded = keras.models.load_model(path)
    assert type(loaded.optimizer) is KPSVD
    assert counter(loaded.optimizer, "updates") == SAVED_AT
    fit(loaded, x, y, SAVED_AT, BATCHES)
    assert_bitwise(everything(loaded), everything(model))


@pytest.mark.parametrize(
    "method", [one if one == "kfac" else pytest.param(one, marks=pytest.mark.slow) for one in METHODS]
)
def test_a_model_loaded_from_a_keras_file_goes_on_in_the_same_bits(tmp_path, method):
    _goes_on_from_a_keras_file(tmp_path / "half.keras", method)


@pytest.mark.parametrize("excluded", ["by name", "by variable"])
def test_what_is_excluded_from_weight_decay_still_is_once_loaded_from_a_keras_file(tmp_path, excluded):
    """Twice: what was loaded can be saved and loaded again."""
    x, y = data()
    model = network(KPSVD(seed=5, weight_decay=0.1, **INTERVALS))
    variables = model.trainable_variables[:1]
    model.optimizer.exclude_from_weight_decay(
        **({"var_names": ["bias"]} if excluded == "by name" else {"var_list": variables})
    )
    fit(model, x, y, 0, BATCHES, callbacks=[At(SAVED_AT, lambda model: model.save(tmp_path / "once.keras"))])
    keras.models.load_model(tmp_path / "once.keras").save(tmp_path / "twice.keras")
    loaded = keras.models.load_model(tmp_path / "twice.keras")
    fit(loaded, x, y, SAVED_AT, BATCHES)
    assert_bitwise(everything(loaded), everything(model))
    never_built = network(KPSVD(seed=5, weight_decay=0.1, **INTERVALS))
    never_built.optimizer.exclude_from_weight_decay(var_list=never_built.trainable_variables[2:3])
    never_built.save(tmp_path / "never.keras")
    optimizer = keras.models.load_model(tmp_path / "never.keras").optimizer
    assert optimizer.get_config()["excluded_from_weight_decay"]["places"] == [2]
    anew = keras.models.load_model(tmp_path / "once.keras", compile=False)
    anew.compile(KPSVD(seed=5, weight_decay=0.1, **INTERVALS), "mse")
    assert "excluded_from_weight_decay" not in anew.optimizer.get_config()


def test_of_variables_whose_paths_end_alike_only_the_excluded_ones_are(tmp_path):
    """Found again in whatever order they were given, live and loaded."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="out")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(2, name="out")], name="outer")
    optimizer = KPSVD(seed=5, weight_decay=0.1)
    excluded = model.layers[-1].trainable_variables
    optimizer.exclude_from_weight_decay(var_list=excluded[::-1])
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    model.save(tmp_path / "built.keras")
    for one in (model, keras.models.load_model(tmp_path / "built.keras")):
        assert one.optimizer.get_config()["excluded_from_weight_decay"]["places"] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_deeper_model_loaded_from_a_keras_file_goes_on_in_the_same_bits(tmp_path, method):
    _goes_on_from_a_keras_file(tmp_path / "half.keras", method, deep=True)


def test_a_half_precision_model_loaded_from_a_keras_file_goes_on_in_the_same_bits(tmp_path):
    x, y = data()
    with policy("mixed_float16"):
        model = network(KPSVD(method="kfac", seed=5, **INTERVALS))
        fit(model, x, y, 0, BATCHES, callbacks=[At(SAVED_AT, lambda model: model.save(tmp_path / "half.keras"))])
        loaded = keras.models.load_model(tmp_path / "half.keras")
    assert type(loaded.optimizer.inner_optimizer) is KPSVD
    fit(loaded, x, y, SAVED_AT, BATCHES)
    assert_bitwise(everything(loaded), everything(model))


@pytest.mark.slow
def test_a_new_model_goes_on_from_what_model_checkpoint_saved_in_the_middle_of_an_epoch(tmp_path):
    """From the whole model, and from its weights once the new optimizer is built."""
    x, y = data()
    new = functools.partial(KPSVD, method="kfac_corrected", seed=5, **EMA_AND_ACCUMULATION, **INTERVALS)
    model = network(new(), deep=True)
    checkpoint = keras.callbacks.ModelCheckpoint
    callbacks = [
        checkpoint(str(tmp_path / "{batch}.keras"), save_freq=SAVED_AT),
        checkpoint(str(tmp_path / "{batch}.weights.h5"), save_freq=SAVED_AT, save_weights_only=True),
    ]
    fit(model, x, y, 0, BATCHES, callbacks=callbacks)
    from_weights = network(new(), deep=True)
    from_weights.optimizer.build(from_weights.trainable_variables)
    from_weights.load_weights(tmp_path / f"{SAVED_AT}.weights.h5")
    from_model = keras.models.load_model(tmp_path / f"{SAVED_AT}.keras")
    for restored in (from_weights, from_model):
        assert counter(restored.optimizer, "iteration") == SAVED_AT
        assert counter(restored.optimizer, "updates") == SAVED_AT // 2
        fit(restored, x, y, SAVED_AT, BATCHES)
        assert_bitwise(everything(restored), everything(model))


def test_backup_and_restore_goes_on_from_the_middle_of_an_epoch_and_of_an_accumulation(tmp_path):
    """Saved after batch 7, interrupted after 9; the optimizer of the new model is not built before `fit`."""
    x, y = data()
    new = functools.partial(KPSVD, method="kfac", seed=5, **EMA_AND_ACCUMULATION, **INTERVALS)
    model = network(new())
    fit(model, x, y, 0, BATCHES)

    def run(*callbacks):
        fresh = network(new())
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=SAVED_AT)
        fresh.fit(batches_left(fresh, x, y), verbose=0, callbacks=[backup, *callbacks])
        return fresh

    with pytest.raises(InterruptError):
        run(At(SAVED_AT + 2, interrupt))
    assert (tmp_path / "backup" / "latest.weights.h5").exists()
    assert_bitwise(everything(run()), everything(model))
    assert not (tmp_path / "backup").exists()


def test_backup_and_restore_goes_on_from_the_end_of_an_epoch_with_nothing_else_to_do(tmp_path):
    """Epochs of seven batches, interrupted in the second: a refresh is due in the middle of each."""
    x, y = data(7)
    new = functools.partial(KPSVD, method="kfac", seed=5, **INTERVALS)
    stock = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}
    model = network(new())
    model.fit(x, y, **stock)

    class InSecondEpoch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.armed = epoch == 1

        def on_train_batch_end(self, batch, logs=None):
            if self.armed and batch == 3:
                raise InterruptError

    def run(*callbacks):
        fresh = network(new())
        fresh.fit(x, y, **stock, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup"), *callbacks])
        return fresh

    with pytest.raises(InterruptError):
        run(InSecondEpoch())
    assert json.loads((tmp_path / "backup" / "training_metadata.json").read_text())["epoch"] == 1
    assert_bitwise(everything(run()), everything(model))
