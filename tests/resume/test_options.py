"""A run that is saved between refreshes and goes on from there ends in the same bits, for every method and option."""

import keras
import pytest

from keras_kpsvd import KPSVD
from keras_kpsvd.curvature import extrapolation
from tests.resume.runs import (
    BATCHES,
    INTERVALS,
    METHODS,
    SAVED_AT,
    At,
    assert_bitwise,
    counter,
    data,
    everything,
    fit,
    network,
    policy,
)

pytestmark = pytest.mark.filterwarnings("ignore:KPSVD trains by SGD with momentum")

GIVEN = {"learning_rate": 0.1}
HELD = {"damping": 0.01}
EMA = {"use_ema": True, "ema_momentum": 0.8}

# As many in one run as Keras lets be together.
COMBINED = {
    "weight_decay, clipnorm, use_ema": {"weight_decay": 0.01, "clipnorm": 0.1, **EMA, "ema_overwrite_frequency": 3},
    "global_clipnorm, accumulation, rate given": {**GIVEN, "global_clipnorm": 0.1, "gradient_accumulation_steps": 2},
    "clipvalue, loss_scale_factor, all given": {**GIVEN, **HELD, "clipvalue": 0.05, "loss_scale_factor": 64.0},
}

ALONE = {
    "all given": {**GIVEN, **HELD},
    "rate given": GIVEN,
    "damping given": HELD,
    "no momentum": {**GIVEN, **HELD, "momentum": 0.0},
    "nesterov": {**GIVEN, "nesterov": True},
    "weight_decay": {"weight_decay": 0.01},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.05},
    "use_ema": EMA,
    "ema_overwrite_frequency": {**EMA, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss_scale_factor": {"loss_scale_factor": 64.0},
    "exact fisher": {"fisher": "exact"},
    "empirical fisher": {"fisher": "empirical"},
}


def _decaying():
    return keras.optimizers.schedules.ExponentialDecay(0.2, 3, 0.8)


def _goes_on_in_the_same_bits(optimizer, path):
    """Trains to the end, saving on the way; then back to what was saved, and to the end again.

    It is the same model, so that whatever a file does not hold is at its last value and shows.
    """
    x, y = data()
    model = network(optimizer)
    saved = []

    def save(model):
        model.save_weights(path)
        saved.append(everything(model))

    fit(model, x, y, 0, BATCHES, callbacks=[At(SAVED_AT, save)])
    uninterrupted = everything(model)
    model.load_weights(path)
    assert_bitwise(everything(model), saved[0])
    fit(model, x, y, SAVED_AT, BATCHES)
    assert_bitwise(everything(model), uninterrupted)
    moved = [one.tobytes() != other.tobytes() for (_, one), (_, other) in zip(saved[0], uninterrupted, strict=True)]
    assert sum(moved) >= len(moved) // 2  # There was something to do between.
    return model


@pytest.mark.slow
@pytest.mark.parametrize("names", COMBINED)
def test_a_run_with_these_options_goes_on_in_the_same_bits(tmp_path, names):
    options = COMBINED[names]
    model = _goes_on_in_the_same_bits(KPSVD(method="kfac", **options, **INTERVALS), tmp_path / "state.weights.h5")
    assert counter(model.optimizer, "updates") == BATCHES // options.get("gradient_accumulation_steps", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_run_with_this_option_alone_goes_on_in_the_same_bits(tmp_path, name):
    _goes_on_in_the_same_bits(KPSVD(method="kfac", **ALONE[name], **INTERVALS), tmp_path / "state.weights.h5")


def test_a_run_with_a_schedule_goes_on_in_the_same_bits(tmp_path):
    _goes_on_in_the_same_bits(KPSVD(_decaying(), method="kfac", **INTERVALS), tmp_path / "state.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_a_run_in_mixed_precision_goes_on_in_the_same_bits(tmp_path, name):
    with policy(name):
        model = _goes_on_in_the_same_bits(KPSVD(method="kfac", **INTERVALS), tmp_path / "state.weights.h5")
    assert hasattr(model.optimizer, "inner_optimizer") == (name == "mixed_float16")


def test_a_dynamic_loss_scale_that_grows_between_goes_on_in_the_same_bits(tmp_path):
    """It doubles after each third good step: at 6 and 9, saved at 7."""
    scaled = keras.optimizers.LossScaleOptimizer(
        KPSVD(method="kfac", **INTERVALS), initial_scale=8.0, dynamic_growth_steps=3
    )
    model = _goes_on_in_the_same_bits(scaled, tmp_path / "state.weights.h5")
    assert float(scaled.dynamic_scale.numpy()) > 8.0
    assert counter(model.optimizer, "updates") == BATCHES


def _extrapolated_run(method, path, monkeypatch):
    """The step after the save is extrapolated from what was saved."""
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 10)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 16)
    intervals = {"curvature_interval": 6, "inverse_interval": 9, "fit_interval": 7}
    batch, saved_at, batches = 16, 13, 30
    x, y = data(batches, batch)
    model = network(KPSVD(method=method, **intervals))
    saved, next_fits = [], []

    def save(model):
        model.save_weights(path)
        saved.append(everything(model))

    def look(model):
        next_fits.append(counter(model.optimizer, "next_fit"))

    fit(model, x, y, 0, batches, batch, callbacks=[At(saved_at, save), At(saved_at, look), At(saved_at + 1, look)])
    assert next_fits[0] == next_fits[1] > saved_at + 1
    uninterrupted = everything(model)
    model.load_weights(path)
    assert saved_at % intervals["curvature_interval"] and saved_at % intervals["inverse_interval"]
    fit(model, x, y, saved_at, batches, batch)
    assert_bitwise(everything(model), uninterrupted)


def test_a_run_saved_between_exact_fits_goes_on_in_the_same_bits(tmp_path, monkeypatch):
    _extrapolated_run("kfac", tmp_path / "state.weights.h5", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_run_of_any_method_saved_between_exact_fits_goes_on_in_the_same_bits(tmp_path, monkeypatch, method):
    _extrapolated_run(method, tmp_path / "state.weights.h5", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("options", COMBINED)
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_run_of_any_method_with_these_options_goes_on_in_the_same_bits(tmp_path, method, options):
    optimizer = KPSVD(method=method, **COMBINED[options], **INTERVALS)
    _goes_on_in_the_same_bits(optimizer, tmp_path / "state.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_run_of_any_method_in_mixed_precision_goes_on_in_the_same_bits(tmp_path, method, name):
    with policy(name):
        _goes_on_in_the_same_bits(KPSVD(_decaying(), method=method, **INTERVALS), tmp_path / "state.weights.h5")
