"""Models saved before the first step, inside other optimizers, and weights loaded after `compile`."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD
from keras_kpsvd.optimizer import PLAIN_RATE
from tests import reference
from tests.contract.oracle import EVERY_STEP, PLAIN, assert_steps, moved, squared_error_directions
from tests.networks import compiled, matrices, problem, tanh_network, variable


@keras.saving.register_keras_serializable(package="tests")
def eighth():
    """A callable rate."""
    return 0.125


@pytest.mark.parametrize(
    ("rate", "values"),
    [
        (eighth, [0.125, 0.125]),
        (keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 0.25]), [0.5, 0.25]),
        (0.0625, [0.0625, 0.0625]),
    ],
    ids=["callable", "schedule", "number"],
)
def test_a_rate_of_every_kind_survives_saving_and_is_that_of_the_next_steps(tmp_path, rate, values):
    model = tanh_network()
    model.compile(KPSVD(**{**PLAIN, "learning_rate": rate}, **EVERY_STEP), "mse")
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    start = weights = matrices(loaded)
    batches = [problem(seed=number) for number in range(2)]
    for (x, y), value in zip(batches, values, strict=True):
        weights = moved(weights, squared_error_directions(weights, x, y), value)
        loaded.train_on_batch(x, y)
    assert_steps(matrices(loaded), weights, start, 1e-5)


def _wrapped(kind):
    inner = KPSVD(0.1, damping=0.1, curvature_interval=3, inverse_interval=2, seed=1)
    if kind == "LossScaleOptimizer":
        return keras.optimizers.LossScaleOptimizer(inner, dynamic_growth_steps=2)
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("MultiOptimizer came with a later Keras")
    chosen = keras.optimizers.OptimizerMap(keras.optimizers.Adam(0.01), {".*dense0/.*": inner})
    return keras.optimizers.MultiOptimizer(chosen)


@pytest.mark.parametrize("kind", ["LossScaleOptimizer", "MultiOptimizer"])
def test_a_run_inside_another_optimizer_goes_on_from_its_file_bit_for_bit(tmp_path, kind):
    """After four steps, between refreshes at 3 and 6; the other run is never interrupted."""
    model = compiled(tanh_network(dtype="float32"), _wrapped(kind))
    batches = [problem(seed=number, dtype="float32") for number in range(8)]
    for batch in batches[:4]:
        model.train_on_batch(*batch)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    at_four = matrices(model)
    for batch in batches[4:]:
        model.train_on_batch(*batch)
        loaded.train_on_batch(*batch)
    pairs = zip(
        [*model.variables, *model.optimizer.variables], [*loaded.variables, *loaded.optimizer.variables], strict=True
    )
    for one, other in pairs:
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)
    assert all(np.linalg.norm(now - then) > 0 for now, then in zip(matrices(model), at_four, strict=True))


def _loaded_after_compile(path, *, eager, built):
    """A model after three steps, and one compiled anew that its weights were loaded into."""
    x, y = problem()
    options = {"seed": 1, "curvature_interval": 2}
    trained = compiled(tanh_network(), KPSVD(**options), run_eagerly=eager)
    for _ in range(3):
        trained.train_on_batch(x, y)
    trained.save_weights(path)
    model = tanh_network()
    model.compile(KPSVD(**options), "mse", run_eagerly=eager)
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    return trained, model


@pytest.mark.slow
@pytest.mark.parametrize(("eager", "built"), [(False, False), (False, True), (True, True)])
def test_weights_loaded_after_compile_bring_the_state_for_the_first_step(tmp_path, eager, built):
    """Where Keras's own optimizers drop it: compile, `load_weights`, `fit` goes on bit for bit.

    Of an eager model the optimizer has to be built first; see the next test.
    """
    models = _loaded_after_compile(tmp_path / "m.weights.h5", eager=eager, built=built)
    x, y = problem()
    for one in models:
        one.fit(x, y, batch_size=5, shuffle=False, verbose=0)
    for one, other in zip(*([*model.variables, *model.optimizer.variables] for model in models), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


def test_eagerly_the_first_step_after_loading_is_the_loaded_preconditioners_at_the_plain_rate(tmp_path):
    """The first call of `apply` makes the state, after a pass that nobody recorded and no length can be found from."""
    trained, model = _loaded_after_compile(tmp_path / "m.weights.h5", eager=True, built=False)
    x, y = problem()
    start = matrices(model)
    velocities = [one.numpy() for one in trained.optimizer.momentums]
    gradients = reference.squared_error_gradients(start, x, y)
    expected = []
    for number, (block, gradient) in enumerate(zip(trained.optimizer._blocks, gradients, strict=True)):
        velocity = np.concatenate([velocities[2 * number], velocities[2 * number + 1][None]])
        direction = block.blocks[0].precondition(gradient).numpy()
        expected.append(start[number] + 0.9 * velocity - PLAIN_RATE * direction)
    for one in (trained, model):
        one.train_on_batch(x, y)
    assert_steps(matrices(model), expected, start)
    assert not np.allclose(matrices(model)[0], matrices(trained)[0])
    assert [variable(one.optimizer, "updates") for one in (trained, model)] == [4, 4]


def test_an_interrupted_fit_goes_on_from_its_backup_bit_for_bit(tmp_path):
    """`BackupAndRestore` around `fit`, in graphs, stopped at the start of the third of four epochs."""

    def fit(*callbacks):
        optimizer = KPSVD(0.1, damping=0.1, curvature_interval=3, seed=1)
        model = compiled(tanh_network(dtype="float32"), optimizer, run_eagerly=False)
        x, y = problem(rows=20, dtype="float32")
        try:
            model.fit(x, y, batch_size=4, epochs=4, shuffle=False, verbose=0, callbacks=list(callbacks))
        except KeyboardInterrupt:
            return None
        return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]

    def stop(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    whole = fit()
    assert fit(keras.callbacks.BackupAndRestore(tmp_path), keras.callbacks.LambdaCallback(on_epoch_begin=stop)) is None
    for one, other in zip(fit(keras.callbacks.BackupAndRestore(tmp_path)), whole, strict=True):
        np.testing.assert_array_equal(one, other)
