"""What the recorder records, what it leaves behind, and every way of running a model that it must survive."""

import gc
import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager.record import could_possibly_record

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.layers import Recorder, layers_of
from tests.networks import assert_same, compiled, matrices, problem, state, tanh_network

# One rate and no draws: what is compared is the wiring.
PLAIN = {"learning_rate": 0.25, "momentum": 0.0, "damping": 2.0**-7, "kl_clip": None, "fisher": "exact"}


def _recorded(model, **options):
    recorder = Recorder(**options)
    for layer in layers_of(model.variables):
        layer.attach(recorder)
    return recorder


def _data(**options):
    return problem(dtype="float32", **options)


@pytest.fixture(scope="module")
def expected():
    """The state after two stock eager steps from the same start."""
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    return state(model)


def test_only_training_calls_under_a_tape_are_recorded():
    model = tanh_network(dtype="float32")
    recorder = _recorded(model)
    x, _ = _data()
    model(x, training=True)
    assert recorder.take() is None
    for training in (False, None):
        with tf.GradientTape():
            model(x, training=training)
        assert recorder.take() is None
    with tf.GradientTape():
        model(x, training=True)
    assert [record.layer.name for record in recorder.take().records] == ["dense0", "out"]
    assert recorder.take() is None


def test_a_record_holds_inputs_and_preactivation_and_the_tape_reaches_it():
    """For `z = W₂ᵀ tanh(s)`: `∂(Σ z²/2)/∂s = z W₂ᵀ (1 − tanh² s)`, in NumPy."""
    model = tanh_network(dtype="float32")
    recorder = _recorded(model)
    x, _ = _data()
    with tf.GradientTape():
        output = model(x, training=True)
        with recorder.paused():
            model(2 * x, training=True)
    taken = recorder.take()
    hidden, last = taken.records
    (kernel, bias), (next_kernel, _) = (layer.get_weights() for layer in model.layers)
    np.testing.assert_array_equal(hidden.inputs, x)
    np.testing.assert_allclose(hidden.preactivation, x @ kernel + bias, rtol=1e-5, atol=1e-6)
    gradients = taken.tape.gradient(output, [hidden.preactivation, last.preactivation], output_gradients=output)
    slope = (output.numpy() @ next_kernel.T) * (1 - np.tanh(x @ kernel + bias) ** 2)
    np.testing.assert_allclose(gradients[0], slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], output, rtol=1e-6)


def test_symbolic_calls_are_not_recorded():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = tanh_network(dtype="float32")

        def call(self, inputs, training=None):
            return self.inner(inputs, training=training)

    model = Subclassed()
    recorder = _recorded(model.inner)
    with tf.GradientTape():
        model.inner(keras.Input((4,)), training=True)
        model(keras.Input((4,)), training=True)  # Traces `call` in a graph of its own to find the shapes.
    assert recorder.take() is None
    assert not could_possibly_record()


def test_a_layer_called_twice_is_recorded_twice_and_each_call_keeps_its_own_gradient():
    keras.utils.set_random_seed(0)
    shared = KPSVDDense(4)
    one, two = (tf.constant(_data(seed=seed)[0]) for seed in (0, 1))
    shared(one)
    recorder = Recorder()
    shared.attach(recorder)
    inputs = keras.Input((4,)), keras.Input((4,))
    model = keras.Model(inputs, 2.0 * shared(inputs[0]) + 3.0 * shared(inputs[1]))
    with tf.GradientTape():
        output = model([one, two], training=True)
    taken = recorder.take()
    assert [record.layer for record in taken.records] == [shared, shared]
    gradients = taken.tape.gradient(output, [record.preactivation for record in taken.records])
    slopes = {
        record.inputs.numpy().tobytes(): float(g[0, 0]) for record, g in zip(taken.records, gradients, strict=True)
    }
    assert slopes == {one.numpy().tobytes(): 2.0, two.numpy().tobytes(): 3.0}


def _growth(action, repeats):
    """Objects, tensors and bytes that `repeats` more runs of `action` leave behind, and the tapes alive after them."""

    def counts():
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(isinstance(thing, tf.Tensor) for thing in objects)
        tapes = sum(isinstance(thing, tf.GradientTape) for thing in objects)
        return len(objects), tensors, tapes, tracemalloc.get_traced_memory()[0]

    gc.collect()
    gc.freeze()  # What was there before is not looked at again, which makes each collection fast.
    for _ in range(20):
        action()
    tracemalloc.start()
    try:
        before = counts()
        for _ in range(repeats):
            action()
        after = counts()
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    return [b - a for a, b in zip(before, after, strict=True)], after[2]


@pytest.mark.slow
def test_a_thousand_abandoned_passes_leave_nothing_and_do_not_poison_the_next_step(expected):
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    other = tf.constant(5 * _data(seed=9)[0])

    def abandon():
        with tf.GradientTape():
            model(other, training=True)

    (objects, tensors, _, size), tapes = _growth(abandon, 1000)
    assert objects < 200 and tensors <= 2
    assert size < 300_000  # A model of plain `Dense` layers keeps some 120,000 bytes, once for all.
    assert tapes <= 1  # The last pass, until the next one closes it.
    for seed in (0, 1):
        abandon()
        model.train_on_batch(*_data(seed=seed))
    assert_same(state(model), expected)
    assert not could_possibly_record()
    assert "compute_loss" not in model.__dict__


def test_a_thousand_abandoned_passes_in_a_graph_leave_nothing(expected):
    """Their tensors stay with the graph that was traced once."""
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))

    @tf.function
    def abandon(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True))
        return tape.gradient(loss, model.trainable_variables[0].value)

    other = tf.constant(5 * _data(seed=9)[0])
    abandon(other)
    (objects, tensors, _, _), tapes = _growth(lambda: abandon(other), 1000)
    assert objects < 100 and tensors <= 2 and tapes <= 1
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    assert_same(state(model), expected)


def test_ordinary_steps_leave_nothing():
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    batch = _data()
    (objects, tensors, _, _), tapes = _growth(lambda: model.train_on_batch(*batch), 30)
    assert objects < 100 and tensors <= 2 and tapes == 0


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_no_tape_is_open_after_a_step_and_the_hook_is_gone(fisher):
    """Also where the tape has to stay open until the loss is known."""
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **{**PLAIN, "fisher": fisher}))
    model.train_on_batch(*_data())
    assert not could_possibly_record()
    assert "compute_loss" not in model.__dict__


def test_a_compute_loss_set_on_the_instance_is_called_and_put_back(expected):
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    calls, stock = [], model.compute_loss

    def own(*arguments, **keywords):
        calls.append(1)
        return stock(*arguments, **keywords)

    model.compute_loss = own
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    assert model.__dict__["compute_loss"] is own
    assert len(calls) == 2
    assert_same(state(model), expected)


class OwnStep(keras.Sequential):
    """A `train_step` as Keras's guide writes it."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_a_custom_train_step_trains_as_the_stock_one(expected):
    model = OwnStep(tanh_network(dtype="float32").layers, name="network")
    compiled(model, KPSVD(method="kfac", **PLAIN))
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    assert_same(state(model), expected)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("in_graph", [True, False])
def test_hand_written_loops_train_as_fit_does(expected, in_graph, scaled):
    """Without `compute_loss` the last recorded call is the output; its likelihood has to be named."""
    model = tanh_network(dtype="float32")
    optimizer = KPSVD(method="kfac", likelihood="normal", **PLAIN)
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            if scaled:
                loss = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    if in_graph:
        step = tf.function(step)
    for seed in (0, 1):
        step(*(tf.constant(part) for part in _data(seed=seed)))
    model.optimizer = optimizer
    for name, values in state(model).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_recompiling_starts_afresh_and_the_old_optimizer_hears_nothing_more(expected):
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    start = model.get_weights()
    old = model.optimizer
    model.train_on_batch(*_data(seed=5))
    model.set_weights(start)
    compiled(model, KPSVD(method="kfac", **PLAIN))
    before = [v.numpy() for v in old.variables]
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    assert_same(state(model), expected)
    for one, other in zip(before, old.variables, strict=True):
        np.testing.assert_array_equal(one, other.numpy())
    assert not could_possibly_record()
    del old
    gc.collect()
    model.train_on_batch(*_data())
    for layer in model.layers:  # Recorders live as long as their optimizers.
        layer.attach(model.optimizer._recorder)
        assert len(layer._recorders) == 1


def test_two_models_with_an_optimizer_each_may_take_turns(expected):
    models = [compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN)) for _ in range(2)]
    for seed in (0, 1):
        for model in models:
            model.train_on_batch(*_data(seed=seed))
    for model in models:
        assert_same(state(model), expected)


@pytest.mark.parametrize("outer", ["sequential", "functional", "subclassed"])
def test_a_model_inside_a_model_trains_as_it_does_alone(expected, outer):
    inner = tanh_network(dtype="float32")
    if outer == "sequential":
        model = keras.Sequential([keras.Input((4,)), inner])
    elif outer == "functional":
        inputs = keras.Input((4,))
        model = keras.Model(inputs, inner(inputs))
    else:

        class Outer(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def call(self, inputs):
                return self.inner(inputs)

        model = Outer()
        model.build((None, 4))
    compiled(model, KPSVD(method="kfac", **PLAIN))
    for seed in (0, 1):
        model.train_on_batch(*_data(seed=seed))
    for now, name in zip(inner.weights, list(expected), strict=False):
        np.testing.assert_array_equal(now.numpy(), expected[name])


class Looping(keras.Model):
    """Calls its layer inside `tf.while_loop`, where no tensor may leave the body."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=None):
        def body(index, total):
            return index + 1, total + self.layer(inputs[:, index], training=training)

        start = (0, tf.zeros([tf.shape(inputs)[0], self.layer.units]))
        shapes = (tf.TensorShape([]), tf.TensorShape([None, self.layer.units]))
        return tf.while_loop(lambda index, _: index < 3, body, start, shape_invariants=shapes)[1]


def test_a_layer_called_in_a_loop_trains_by_plain_gradient():
    x = np.random.default_rng(0).normal(size=(6, 3, 4)).astype("float32")
    results = []
    for optimizer, kind in (
        (KPSVD(method="kfac", **PLAIN), KPSVDDense),
        (keras.optimizers.SGD(0.25), keras.layers.Dense),
    ):
        keras.utils.set_random_seed(0)
        model = Looping(kind(2))
        model.layer.build((None, 4))
        model.built = True
        model.compile(optimizer, "mse", jit_compile=False)
        for _ in range(2):
            model.train_on_batch(x, np.zeros((6, 2), "float32"))
        results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert "compute_loss" not in model.__dict__ and not could_possibly_record()


def test_time_distributed_layers_train_as_layers_on_sequences_do():
    """Keras calls the layer once for each time step: the calls stand side by side along `shared`."""
    x = np.random.default_rng(0).normal(size=(6, 3, 4)).astype("float32")
    results = []
    for wrap in (lambda layer: layer, keras.layers.TimeDistributed):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3, 4)), wrap(KPSVDDense(2))])
        compiled(model, KPSVD(method="kfac", **PLAIN))
        for _ in range(2):
            model.train_on_batch(x, np.zeros((6, 3, 2), "float32"))
        results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_an_open_pass_ends_with_its_optimizer():
    gc.collect()
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **PLAIN))
    with tf.GradientTape():
        model(tf.constant(_data()[0]), training=True)
    assert could_possibly_record()
    del model
    gc.collect()
    assert not could_possibly_record()


@pytest.mark.parametrize("loss", ["mae", "kl_divergence", keras.losses.Huber(), lambda y, z: (y - z) ** 2])
def test_a_loss_of_unknown_density_is_an_error_that_names_the_argument(loss):
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac"), loss=loss)
    before = matrices(model)
    with pytest.raises(ValueError, match="likelihood"):
        model.train_on_batch(*_data())
    for one, other in zip(matrices(model), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not could_possibly_record()
    compiled(model, KPSVD(method="kfac", likelihood="normal"), loss=loss)
    model.train_on_batch(*_data())
    assert all(not np.array_equal(one, other) for one, other in zip(matrices(model), before, strict=True))
