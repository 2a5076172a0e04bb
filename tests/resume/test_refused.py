"""Files whose variables do not match are refused, and the optimizer's live state keeps every bit."""

import shutil

import h5py
import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD
from tests.resume.runs import assert_bitwise, everything, network, policy

pytestmark = pytest.mark.filterwarnings("ignore:KPSVD trains by SGD with momentum")


def _filled(value, optimizer=None, **options):
    """A built model, every float of whose state is `value`."""
    model = network(optimizer or KPSVD(seed=5, **options))
    model.optimizer.build(model.trainable_variables)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign(np.full(variable.shape, value).astype(variable.dtype))
    return model


def _optimizer(model):
    return [(name, value) for name, value in everything(model)[len(model.variables) :]]


OTHERS = {
    "a method of one term": {"method": "kpsvd"},
    "a schedule": {"method": "lanczos", "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9)},
    "averages": {"method": "lanczos", "use_ema": True},
    "accumulators": {"method": "lanczos", "gradient_accumulation_steps": 2},
    "no momentum": {"method": "lanczos", "learning_rate": 0.1, "damping": 0.01, "momentum": 0.0},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_weights_file_of_other_optimizer_variables_is_refused_and_live_state_stays(tmp_path, other):
    _filled(1, **OTHERS[other]).save_weights(tmp_path / "other.weights.h5")
    live = _filled(2, method="lanczos")
    before = _optimizer(live)
    with pytest.raises(ValueError, match="saved state does not belong to optimizer") as refusal:
        live.load_weights(tmp_path / "other.weights.h5")
    assert_bitwise(_optimizer(live), before)
    # Keras loads layers before it asks the optimizer; the message says so.
    assert "weights of the model, which Keras loads first, are the file's" in str(refusal.value)
    assert all((variable.numpy() == 1).all() for variable in live.trainable_variables)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ({"use_ema": True}, {"gradient_accumulation_steps": 2}),
        ({"method": "lanczos"}, {"method": "kfac_corrected"}),
    ],
)
def test_a_weights_file_of_variables_of_the_same_shapes_but_another_meaning_is_refused(tmp_path, saved, loading):
    """Averages of weights are no accumulated gradients, and the second singular term no correction of KFAC's."""
    _filled(1, **saved).save_weights(tmp_path / "other.weights.h5")
    live = _filled(2, **loading)
    before = _optimizer(live)
    with pytest.raises(ValueError, match="saved state does not belong to optimizer"):
        live.load_weights(tmp_path / "other.weights.h5")
    assert_bitwise(_optimizer(live), before)


def test_a_file_of_other_variables_is_refused_inside_the_wrapper_for_float16_too(tmp_path):
    """Keras's own `LossScaleOptimizer` only warns of them, where they are of another number: else it assigns them."""
    with policy("mixed_float16"):
        _filled(1, method="kfac", eigenvalues="kronecker").save_weights(tmp_path / "other.weights.h5")
        live = _filled(2, method="lanczos")
        before = _optimizer(live)
        with (
            pytest.warns(UserWarning, match="Skipping variable loading"),
            pytest.raises(ValueError, match="saved state does not belong to optimizer"),
        ):
            live.load_weights(tmp_path / "other.weights.h5")
    assert hasattr(live.optimizer, "inner_optimizer")
    assert_bitwise(_optimizer(live), before)


@pytest.mark.parametrize("lost", ["0", "12", "last"])
def test_a_weights_file_that_lacks_a_variable_is_refused_and_live_state_stays(tmp_path, lost):
    _filled(1, method="lanczos").save_weights(tmp_path / "whole.weights.h5")
    shutil.copy(tmp_path / "whole.weights.h5", tmp_path / "lacking.weights.h5")
    with h5py.File(tmp_path / "lacking.weights.h5", "a") as file:
        variables = file["optimizer/vars"]
        del variables[max(filter(str.isdigit, variables), key=int) if lost == "last" else lost]
    live = _filled(2, method="lanczos")
    before = _optimizer(live)
    with pytest.raises(ValueError, match="could not be loaded"):
        live.load_weights(tmp_path / "lacking.weights.h5")
    assert_bitwise(_optimizer(live), before)


def test_an_optimizer_that_is_not_built_takes_the_state_when_it_is(tmp_path):
    """Stock optimizers warn and start afresh."""
    _filled(1, method="lanczos").save_weights(tmp_path / "full.weights.h5")
    fresh = network(KPSVD(method="lanczos", seed=5))
    fresh.load_weights(tmp_path / "full.weights.h5")
    fresh.optimizer.build(fresh.trainable_variables)
    assert_bitwise(everything(fresh), everything(_filled(1, method="lanczos")))
    another = network(KPSVD(method="kfac", seed=5))
    with pytest.raises(
        ValueError, match=r"expected that of method 'kfac', corrected.* received that of method 'lanczos'"
    ):
        another.load_weights(tmp_path / "full.weights.h5")


def test_a_waiting_state_is_saved_again_and_a_later_file_replaces_it(tmp_path):
    _filled(1, method="lanczos").save_weights(tmp_path / "full.weights.h5")
    passing = network(KPSVD(method="lanczos", seed=5))
    passing.load_weights(tmp_path / "full.weights.h5")
    passing.save_weights(tmp_path / "again.weights.h5")
    fresh = network(KPSVD(method="lanczos", seed=5))
    fresh.load_weights(tmp_path / "again.weights.h5")
    assert int(fresh.optimizer.iterations.numpy()) == 1
    fresh.optimizer.learning_rate = 0.25
    fresh.optimizer.build(fresh.trainable_variables)
    assert float(fresh.optimizer.learning_rate.numpy()) == 0.25
    for variable in fresh.optimizer.variables[2:]:
        np.testing.assert_array_equal(variable.numpy(), 1)

    network(KPSVD(method="lanczos", seed=5)).save_weights(tmp_path / "new.weights.h5")
    passing.load_weights(tmp_path / "new.weights.h5")
    passing.optimizer.build(passing.trainable_variables)
    assert not np.array_equal(passing.optimizer.momentums[0].numpy(), np.ones(passing.optimizer.momentums[0].shape))
    assert int(passing.optimizer.iterations.numpy()) == 0


def test_a_waiting_state_that_does_not_fit_is_refused_at_every_step_and_a_given_damping_stays(tmp_path):
    _filled(1, learning_rate=0.1, damping=0.01).save_weights(tmp_path / "full.weights.h5")
    fresh = network(KPSVD(seed=5, learning_rate=0.1, damping=0.01, momentum=0.0))
    fresh.load_weights(tmp_path / "full.weights.h5")
    gradients = [np.zeros(variable.shape, "float32") for variable in fresh.trainable_variables]
    for _ in range(2):
        with pytest.raises(ValueError, match="saved state does not belong to optimizer"):
            fresh.optimizer.apply(gradients, fresh.trainable_variables)
    other = network(KPSVD(seed=5, learning_rate=0.1, damping=5.0))
    other.load_weights(tmp_path / "full.weights.h5")
    other.optimizer.build(other.trainable_variables)
    damping, of_layers, _ = other.optimizer._natural.dampings(other.optimizer._blocks)
    assert of_layers and all(float(one) == 5.0 for one in (damping, *of_layers.values()))


def test_weights_of_a_model_that_another_optimizer_trained_are_loaded_and_its_state_is_left(tmp_path):
    trained = _filled(1, optimizer=keras.optimizers.Adam())
    trained.save_weights(tmp_path / "adam.weights.h5")
    fresh = network(KPSVD(seed=5))
    with pytest.warns(UserWarning, match="state of another optimizer"):
        fresh.load_weights(tmp_path / "adam.weights.h5")
    fresh.optimizer.build(fresh.trainable_variables)
    assert int(fresh.optimizer.iterations.numpy()) == 0
    for one, other in zip(fresh.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_torn_keras_file_is_refused(tmp_path):
    _filled(1, method="lanczos").save(tmp_path / "model.keras")
    content = (tmp_path / "model.keras").read_bytes()
    for part in (0, len(content) // 2, len(content) - 1):
        (tmp_path / "torn.keras").write_bytes(content[:part])
        with pytest.raises(Exception, match=r"zip|File is not"):
            keras.models.load_model(tmp_path / "torn.keras")
