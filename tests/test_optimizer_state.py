"""What `KPSVD` keeps between steps: its schedule, its saved state, its configuration, its random numbers."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from tests.networks import assert_same, compiled, problem, state, tanh_network, variable

FIXED = {"learning_rate": 0.1, "damping": 0.01}


@keras.saving.register_keras_serializable(package="tests")
def unit_normal(outputs):
    """A likelihood of the user's own."""
    from tensorflow_probability import distributions as tfd

    return tfd.Normal(outputs, tf.ones_like(outputs))


def _data(rows=10, seed=0):
    return problem(rows=rows, dtype="float32", seed=seed)


class _Watch(keras.callbacks.Callback):
    """The number of refreshes, and the preconditioner, after every execution."""

    def __init__(self, optimizer):
        super().__init__()
        self.block = next(block for block in optimizer._blocks if block.layer.name == "dense0")
        self.counts, self.preconditioners = [], [self.block.preconditioner[0].numpy()]

    def note(self):
        self.counts.append(int(self.block.blocks[0].count.numpy()))
        self.preconditioners.append(self.block.preconditioner[0].numpy())

    def on_train_batch_end(self, batch, logs=None):
        self.note()

    @property
    def inverted(self):
        pairs = zip(self.preconditioners, self.preconditioners[1:], strict=False)
        return [not np.array_equal(before, after) for before, after in pairs]


def test_refreshes_and_inversions_come_exactly_at_their_updates():
    """Updates 0, 2, 4, … and 0, 3, 6, …."""
    optimizer = KPSVD(method="kfac", **FIXED, curvature_interval=2, inverse_interval=3)
    model = compiled(tanh_network(dtype="float32"), optimizer)
    watch = _Watch(optimizer)
    for seed in range(8):
        model.train_on_batch(*_data(seed=seed))
        watch.note()
    assert watch.counts == [1, 1, 2, 2, 3, 3, 4, 4]
    assert watch.inverted == [True, False, False, True, False, False, True, False]


def test_under_accumulation_the_schedule_counts_updates():
    """Two batches an update; a refresh every second update is one at batches 2, 6, 10."""
    options = {"curvature_interval": 2, "inverse_interval": 4, "gradient_accumulation_steps": 2}
    optimizer = KPSVD(method="kfac", **FIXED, **options)
    model = compiled(tanh_network(dtype="float32"), optimizer, run_eagerly=False)
    watch = _Watch(optimizer)
    model.fit(*_data(rows=48), batch_size=4, shuffle=False, verbose=0, callbacks=[watch])
    assert watch.counts == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert watch.inverted == [batch in (1, 9) for batch in range(12)]


def test_with_several_steps_in_one_execution_the_schedule_is_the_same():
    optimizer = KPSVD(method="kfac", **FIXED, curvature_interval=2, inverse_interval=8)
    model = compiled(tanh_network(dtype="float32"), optimizer, run_eagerly=False, steps_per_execution=3)
    watch = _Watch(optimizer)
    model.fit(*_data(rows=48), batch_size=4, shuffle=False, verbose=0, callbacks=[watch])
    assert watch.counts == [2, 3, 5, 6]  # After 3, 6, 9 and 12 updates.
    assert watch.inverted == [True, False, True, False]


def test_the_interval_goes_on_after_a_skipped_step():
    """A skipped step is no update: what was due stays due."""
    optimizer = KPSVD(method="kfac", **FIXED, curvature_interval=2, inverse_interval=2)
    model = compiled(tanh_network(dtype="float32"), optimizer)
    watch = _Watch(optimizer)
    x, y = _data()
    for number in range(5):
        if number == 2:
            with pytest.warns(RuntimeWarning, match="skipped"):
                model.train_on_batch(np.full_like(x, np.nan), y)
        else:
            model.train_on_batch(x, y)
        watch.note()
    assert watch.counts == [1, 1, 1, 2, 2]
    assert variable(optimizer, "updates") == 4


@pytest.mark.parametrize(
    ("eager", "options"),
    [
        (True, {"method": "kfac_corrected"}),
        (True, {"method": "kpsvd", **FIXED, "nesterov": True, "weight_decay": 0.01, "use_ema": True}),
        (False, {"method": "kfac", "clipnorm": 1.0}),
    ],
)
def test_a_saved_run_goes_on_bit_for_bit(tmp_path, eager, options):
    """Saved after five updates, between refreshes at 4 and 6 and inversions at 3 and 6."""
    x, y = _data(rows=20)
    fit = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model = compiled(
        tanh_network(dtype="float32"), KPSVD(**options, curvature_interval=2, inverse_interval=3), run_eagerly=eager
    )
    model.fit(x, y, **fit)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.run_eagerly == eager and type(loaded.optimizer) is KPSVD
    assert_same(state(loaded, but=()), state(model, but=()))
    for one in (model, loaded):
        one.fit(x, y, **fit)
    assert variable(loaded.optimizer, "updates") == 10
    assert_same(state(loaded, but=()), state(model, but=()))


@pytest.mark.parametrize(
    "other",
    [
        lambda: (tanh_network(dtype="float32"), KPSVD(method="kfac_corrected", **FIXED)),
        lambda: (tanh_network((4, 5, 2), dtype="float32"), KPSVD(method="kfac", **FIXED)),
        lambda: (tanh_network((4, 3, 3, 2), dtype="float32"), KPSVD(method="kfac", **FIXED)),
    ],
)
def test_state_of_another_model_or_method_is_refused_and_nothing_changes(other):
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **FIXED))
    model.train_on_batch(*_data())
    store = {}
    model.optimizer.save_own_variables(store)
    different, optimizer = other()
    compiled(different, optimizer)
    different.train_on_batch(*_data(seed=1))
    before = state(different, but=())
    with pytest.raises(ValueError, match="saved state does not belong"):
        optimizer.load_own_variables(store)
    assert_same(state(different, but=()), before)
    optimizer.save_own_variables(own := {})
    optimizer.load_own_variables(own)
    assert_same(state(different, but=()), before)


def test_weights_without_an_optimizers_state_are_loaded_and_the_state_stays(tmp_path):
    bare = tanh_network(dtype="float32")
    bare.save_weights(tmp_path / "bare.weights.h5")
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **FIXED))
    model.train_on_batch(*_data())
    before = [v.numpy() for v in model.optimizer.variables]
    with pytest.warns(UserWarning, match="no state of optimizer"):
        model.load_weights(tmp_path / "bare.weights.h5")
    for one, other in zip(model.get_weights(), bare.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


ALL = {
    "learning_rate": 0.3,
    "method": "lanczos",
    "momentum": 0.5,
    "nesterov": True,
    "damping": 0.02,
    "damping_rule": "factor",
    "kl_clip": None,
    "factor_decay": 0.8,
    "curvature_interval": 3,
    "inverse_interval": 6,
    "fisher": "exact",
    "likelihood": "normal",
    "fisher_batch_size": 7,
    "indefinite": "reflect",
    "seed": 11,
    "name": "own",
    "weight_decay": 0.1,
    "clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("arguments", [{}, ALL, {**ALL, "learning_rate": "adaptive", "nesterov": False}])
def test_a_configuration_holds_every_argument_and_survives_the_round_trip(arguments):
    optimizer = KPSVD(**arguments)
    config = optimizer.get_config()
    for name, value in arguments.items():
        assert config[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is KPSVD and again.get_config() == config
    assert KPSVD.from_config(config).get_config() == config
    assert again.adaptive == (config["learning_rate"] == "adaptive")


def test_a_callable_likelihood_and_a_schedule_survive_the_round_trip(tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    optimizer = KPSVD(schedule, method="kfac", likelihood=unit_normal, seed=3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert again.likelihood is unit_normal
    assert again.get_config() == optimizer.get_config()
    model = compiled(tanh_network(dtype="float32"), optimizer)
    model.train_on_batch(*_data())
    model.save(tmp_path / "m.keras")
    assert keras.models.load_model(tmp_path / "m.keras").optimizer.likelihood is unit_normal


def test_a_callable_likelihood_trains_in_graphs():
    x, y = _data(rows=32)
    model = tanh_network(dtype="float32")
    model.compile(KPSVD(likelihood=unit_normal, seed=0), "mse")
    losses = model.fit(x, y, batch_size=16, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_making_an_optimizer_moves_nobodys_random_numbers():
    keras.utils.set_random_seed(4)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = KPSVD()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    keras.utils.set_random_seed(4)
    assert KPSVD().seed == first.seed
    keras.utils.set_random_seed(5)
    assert KPSVD().seed != first.seed


def test_training_moves_nobodys_random_numbers():
    """Dropout draws the masks it draws under SGD, and so do global generators."""
    results = []
    for optimizer in (KPSVD(method="kfac"), keras.optimizers.SGD(0.01)):
        keras.utils.set_random_seed(4)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), KPSVDDense(2)])
        compiled(model, optimizer)
        for _ in range(3):
            model.train_on_batch(*_data())
        seeds = [v.numpy() for v in model.non_trainable_variables]
        mask = model.layers[0](np.ones((5, 4), "float32"), training=True)
        results.append([*seeds, mask.numpy(), tf.random.uniform([3]).numpy(), np.random.random(3), random.random()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


class Subclassed(keras.Model):
    """As most are written: `call` without an argument `training`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = KPSVDDense(8, activation="tanh"), KPSVDDense(2)

    def call(self, inputs):
        return self.out(self.hidden(inputs))


def _functional():
    inputs = keras.Input((4,))
    hidden = KPSVDDense(8, activation="tanh")(inputs)
    return keras.Model(inputs, KPSVDDense(2)(keras.layers.concatenate([hidden, inputs])))


MODELS = {
    "sequential": lambda: keras.Sequential(
        [KPSVDDense(8, activation="tanh"), KPSVDDense(2)]
    ),  # Built by the first batch.
    "functional": _functional,
    "subclassed": Subclassed,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_stock_fit_with_the_defaults_ends_far_below_what_sgd_reaches(kind):
    x, y = _data(rows=64)
    losses = []
    for optimizer in (KPSVD(method="kfac", seed=0), keras.optimizers.SGD(0.01, momentum=0.9)):
        keras.utils.set_random_seed(0)
        model = MODELS[kind]()
        model.compile(optimizer, "mse")
        losses.append(model.fit(x, y, batch_size=32, epochs=15, verbose=0).history["loss"])
    assert losses[0][-1] < 0.5 * losses[1][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_with_curvature_on_schedule(policy):
    """Keras wraps the optimizer for float16, scales the loss, and applies the step inside a branch."""
    x, y = _data(rows=20)
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), KPSVDDense(8, activation="tanh"), KPSVDDense(2, dtype="float32")])
        optimizer = KPSVD(method="kfac", seed=0, curvature_interval=4)
        model.compile(optimizer, "mse")
        losses = model.fit(x, y, batch_size=20, epochs=20, verbose=0).history["loss"]
    finally:
        keras.config.set_dtype_policy("float32")
    assert losses[-1] < 0.1 * losses[0]
    assert [int(v.numpy()) for v in optimizer.variables if v.name.endswith("_refreshes")] == [5, 5]
