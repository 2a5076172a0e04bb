"""Samples against per-example gradients and Gauss–Newton matrices taken by `tf.GradientTape` alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd
from keras_kpsvd import KPSVDDense, fisher_samples
from keras_kpsvd.curvature.samples import layer_samples, pass_heads, preactivation_gradients
from keras_kpsvd.layers import Recorder, RecordingLayer
from tests import reference


def _binary(rng, shape):
    return rng.integers(0, 2, shape).astype("float32")


def _one_hot(rng, shape):
    return np.eye(shape[-1], dtype="float32")[rng.integers(0, shape[-1], shape[:-1])]


def _model(activation, *, sequence=False, bias=True, units=3):
    keras.utils.set_random_seed(0)
    shape = (4, 5) if sequence else (5,)
    return keras.Sequential(
        [
            keras.Input(shape),
            KPSVDDense(4, activation="tanh", use_bias=bias, name="hidden"),
            KPSVDDense(units, activation=activation, use_bias=bias, name="out"),
        ]
    )


# name: (output activation, loss, targets)
LOSSES = {
    "bce": ("sigmoid", "binary_crossentropy", _binary),
    "bce_logits": (None, keras.losses.BinaryCrossentropy(from_logits=True), _binary),
    "bce_sum": ("sigmoid", keras.losses.BinaryCrossentropy(reduction="sum"), _binary),
    "categorical": ("softmax", "categorical_crossentropy", _one_hot),
    "categorical_logits_sum": (
        None,
        keras.losses.CategoricalCrossentropy(from_logits=True, reduction="sum"),
        _one_hot,
    ),
    "sparse": ("softmax", "sparse_categorical_crossentropy", lambda rng, shape: rng.integers(0, shape[-1], shape[:-1])),
    "sparse_logits": (
        None,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        lambda rng, shape: rng.integers(0, shape[-1], shape[:-1]),
    ),
    "mse": (None, "mse", lambda rng, shape: rng.normal(size=shape).astype("float32")),
    "mse_sum": (
        None,
        keras.losses.MeanSquaredError(reduction="sum"),
        lambda rng, shape: rng.normal(size=shape).astype("float32"),
    ),
}


def _problem(name, *, sequence=False, bias=True, batch=6):
    activation, loss, targets = LOSSES[name]
    model = _model(activation, sequence=sequence, bias=bias)
    model.compile(loss=loss)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")
    y = targets(rng, (batch, *model.output_shape[1:]))
    return model, x, y


def _layer_matrix(layer, kernel, bias=None):
    return np.concatenate([kernel, bias[None]], 0) if layer.use_bias else kernel


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_samples_at_targets_are_the_per_example_gradients(name, bias, sequence):
    model, x, y = _problem(name, sequence=sequence, bias=bias)
    samples = fisher_samples(model, x, y)
    summed = "sum" in name
    for layer in model.layers:
        activations, gradients = (part.numpy() for part in samples[layer.name])
        per_example = np.einsum("nti,nto->nio", activations, gradients)
        for n in range(len(x)):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x=x[n : n + 1], y=tf.constant(y[n : n + 1]), y_pred=model(x[n : n + 1]))
            expected = _layer_matrix(layer, *(g.numpy() for g in tape.gradient(loss, layer.trainable_variables)))
            # With a summed loss the batch mean of D_n is the sum of the examples' gradients.
            expected = expected * (len(x) if summed else 1)
            np.testing.assert_allclose(per_example[n], expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_mean_of_samples_is_the_gradient_of_the_compiled_loss(name):
    model, x, y = _problem(name)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x=x, y=tf.constant(y), y_pred=model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    samples = fisher_samples(model, x, y)
    for index, layer in enumerate(model.layers):
        a, g = (part.numpy() for part in samples[layer.name])
        expected = _layer_matrix(layer, gradients[2 * index].numpy(), gradients[2 * index + 1].numpy())
        mean = np.einsum("nti,nto->io", a, g) / len(x)
        assert np.linalg.norm(mean - expected) <= 1e-5 * np.linalg.norm(expected)


def _logits(model):
    """The same network without its output activation, which the Hessian oracle differentiates by hand."""
    bare = keras.models.clone_model(model)
    bare.layers[-1].activation = keras.activations.linear
    bare.set_weights(model.get_weights())
    return bare


def _gauss_newton(model, x, y, sample_weight=None):
    """Dense Gauss–Newton blocks `Jᵀ H J` of the compiled loss, the Hessian by differentiating the loss twice."""
    bare, activation = _logits(model), model.layers[-1].activation
    z = tf.Variable(bare(x))
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y_pred = activation(tf.convert_to_tensor(z))
            loss = model.compute_loss(x=x, y=tf.constant(y), y_pred=y_pred, sample_weight=sample_weight)
        slope = inner.gradient(loss, z)
    size = int(tf.size(z))
    hessian = tf.reshape(outer.jacobian(slope, z), [size, size]).numpy().astype("float64")
    blocks = {}
    for layer, source in zip(bare.layers, model.layers, strict=True):
        with tf.GradientTape() as tape:
            output = bare(x)
        parts = tape.jacobian(output, layer.trainable_variables)
        jacobian = np.concatenate([tf.reshape(part, [size, -1]).numpy() for part in parts], axis=1).astype("float64")
        blocks[source.name] = jacobian.T @ hessian @ jacobian
    return blocks


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_exact_samples_give_the_gauss_newton_matrix_of_the_compiled_loss(name, sequence):
    model, x, y = _problem(name, sequence=sequence)
    expected = _gauss_newton(model, x, y)
    samples = fisher_samples(model, x, fisher="exact")
    for layer, (a, g) in samples.items():
        fisher = reference.fisher(a.numpy(), g.numpy())
        assert np.linalg.norm(fisher - expected[layer]) <= 1e-4 * np.linalg.norm(expected[layer])


@pytest.mark.parametrize("name", ["bce", "bce_sum", "categorical", "sparse_logits", "mse"])
def test_sampled_fisher_is_the_gauss_newton_matrix_on_average(name):
    model, x, y = _problem(name, batch=3)
    expected = _gauss_newton(model, x, y)
    repeats = 1500
    # One example many times over: one pass draws targets for all of them.
    samples = fisher_samples(model, np.tile(x, (repeats, 1)), seed=3)
    scale = repeats if "sum" in name else 1  # a summed loss of `repeats` times the batch is that much steeper
    for layer, (a, g) in samples.items():
        fisher = reference.fisher(a.numpy(), g.numpy()) / scale
        assert np.linalg.norm(fisher - expected[layer]) <= 0.12 * np.linalg.norm(expected[layer])


def test_duplicated_outputs_and_examples_scale_as_the_mean_does():
    """MSE over twice the same outputs is the same function of the hidden layer, and so is a batch with repeats."""
    model, x, _ = _problem("mse")
    wide = _model(None, units=6)
    wide.compile(loss="mse")
    kernel, bias = model.layers[1].get_weights()
    wide.layers[0].set_weights(model.layers[0].get_weights())
    wide.layers[1].set_weights([np.tile(kernel, (1, 2)), np.tile(bias, 2)])
    narrow = fisher_samples(model, x, fisher="exact")["hidden"]
    doubled = fisher_samples(wide, x, fisher="exact")["hidden"]
    repeated = fisher_samples(model, np.concatenate([x, x]), fisher="exact")["hidden"]
    expected = reference.fisher(*(part.numpy() for part in narrow))
    for other in (doubled, repeated):
        fisher = reference.fisher(*(part.numpy() for part in other))
        np.testing.assert_allclose(fisher, expected, rtol=1e-4, atol=1e-6)


def test_a_layer_called_twice_has_both_calls_side_by_side():
    keras.utils.set_random_seed(0)
    shared = KPSVDDense(3, activation="tanh", name="shared")
    one, two = keras.Input((4,)), keras.Input((4,))
    output = KPSVDDense(2, name="out")(keras.layers.Add()([shared(one), shared(two)]))
    model = keras.Model([one, two], output)
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(5, 4)).astype("float32") for _ in range(2)]
    y = rng.normal(size=(5, 2)).astype("float32")
    a, g = (part.numpy() for part in fisher_samples(model, x, y)["shared"])
    assert a.shape[1] == 2
    for n in range(5):
        with tf.GradientTape() as tape:
            rows = [part[n : n + 1] for part in x]
            loss = model.compute_loss(x=rows, y=y[n : n + 1], y_pred=model(rows))
        kernel, bias = tape.gradient(loss, shared.trainable_variables)
        expected = np.concatenate([kernel.numpy(), bias.numpy()[None]])
        np.testing.assert_allclose(a[n].T @ g[n], expected, rtol=1e-4, atol=1e-6)


def test_the_activation_before_a_reshape_is_found():
    keras.utils.set_random_seed(0)
    body = [keras.Input((5,)), KPSVDDense(4, activation="relu"), KPSVDDense(6, activation="sigmoid", name="out")]
    plain, shaped = keras.Sequential(body), keras.Sequential([*body, keras.layers.Reshape((2, 3))])
    x = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    for model in (plain, shaped):
        model.compile(loss="binary_crossentropy")
    expected = reference.fisher(*(part.numpy() for part in fisher_samples(plain, x, fisher="exact")["out"]))
    fisher = reference.fisher(*(part.numpy() for part in fisher_samples(shaped, x, fisher="exact")["out"]))
    np.testing.assert_allclose(fisher, expected, rtol=1e-4, atol=1e-7)


def test_the_model_is_left_as_it_was():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), KPSVDDense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), KPSVDDense(2)]
    )
    model.compile(optimizer=keras_kpsvd.KPSVD(), loss="mse", metrics=["mae"])
    x, y = np.random.default_rng(0).normal(size=(8, 5)).astype("float32"), np.ones((8, 2), "float32")
    model.fit(x, y, verbose=0)
    before = [value.numpy() for value in [*model.variables, *model.optimizer.variables, *model.metrics_variables]]
    fisher_samples(model, x, y)
    fisher_samples(model, x)
    after = [value.numpy() for value in [*model.variables, *model.optimizer.variables, *model.metrics_variables]]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    model.fit(x, y, verbose=0)


def test_the_same_seed_draws_the_same_targets_and_another_seed_others():
    model, x, _ = _problem("bce")
    first, again, other = (fisher_samples(model, x, seed=seed)["out"][1].numpy() for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_several_outputs_add_their_curvatures_with_their_weights():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = KPSVDDense(4, activation="tanh", name="hidden")(inputs)
    a, b = KPSVDDense(2, name="a")(hidden), KPSVDDense(3, activation="softmax", name="b")(hidden)
    both = keras.Model(inputs, [a, b])
    losses = ["mse", "sparse_categorical_crossentropy"]
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    expected = 0
    for output, loss, weight in zip((a, b), losses, (0.5, 2.0), strict=True):
        single = keras.Model(inputs, output)
        single.compile(loss=loss)
        samples = fisher_samples(single, x, fisher="exact")["hidden"]
        expected = expected + weight * reference.fisher(*(part.numpy() for part in samples))
    both.compile(loss=losses, loss_weights=[0.5, 2.0])
    samples = fisher_samples(both, x, fisher="exact")["hidden"]
    np.testing.assert_allclose(reference.fisher(*(p.numpy() for p in samples)), expected, rtol=1e-4, atol=1e-7)


def _recorded(model, x, y, sample_weight=None, **recorder):
    """A pass as `train_step` leaves it behind, with `compute_loss` called on the outputs."""
    recorder = Recorder(**recorder)
    for layer in model.layers:
        if isinstance(layer, RecordingLayer):
            layer.attach(recorder)
    with tf.GradientTape():
        outputs = model(x, training=True)
        model.compute_loss(x=x, y=tf.constant(y), y_pred=outputs, sample_weight=sample_weight)
    return recorder.take()


def _samples_of(forward_pass, fisher, rows=None):
    heads = pass_heads(forward_pass, "auto")
    gradients = preactivation_gradients(forward_pass, heads, fisher, tf.constant([0, 0]))
    return {layer.name: samples for layer, (samples,) in layer_samples(forward_pass, gradients, rows).items()}


@pytest.mark.parametrize("name", ["bce", "categorical", "categorical_logits_sum", "mse", "mse_sum"])
@pytest.mark.parametrize("sequence", [False, True])
def test_sample_weights_weigh_the_curvature_as_they_weigh_the_loss(name, sequence):
    model, x, y = _problem(name, sequence=sequence)
    weights = np.random.default_rng(5).uniform(0, 2, (6, 4) if sequence else (6,)).astype("float32")
    forward_pass = _recorded(model, x, y, weights, persistent=True)
    expected = _gauss_newton(model, x, y, weights)
    for layer, (a, g) in _samples_of(forward_pass, "exact").items():
        fisher = reference.fisher(a.numpy(), g.numpy())
        assert np.linalg.norm(fisher - expected[layer]) <= 1e-4 * np.linalg.norm(expected[layer])


def test_masked_positions_have_no_curvature_and_the_others_the_more():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4, 5)), KPSVDDense(4, activation="tanh", name="hidden"), KPSVDDense(3, name="out")]
    model = keras.Sequential([layers[0], keras.layers.Masking(0.0), *layers[1:]])
    model.compile(loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4, 5)).astype("float32"), rng.normal(size=(6, 4, 3)).astype("float32")
    kept = rng.random((6, 4)) < 0.6
    x[~kept] = 0
    plain = keras.Sequential(layers)
    plain.compile(loss="mse")
    # Keras divides by the number of positions that are left.
    expected = _gauss_newton(plain, x, y, (kept * kept.size / kept.sum()).astype("float32"))
    for layer, (a, g) in fisher_samples(model, x, fisher="exact").items():
        fisher = reference.fisher(a.numpy(), g.numpy())
        assert np.linalg.norm(fisher - expected[layer]) <= 1e-4 * np.linalg.norm(expected[layer])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "averaged"), [("bce", 3), ("categorical", 1), ("mse", 3), ("mse_sum", 3)])
def test_empirical_samples_are_the_scores_at_the_actual_targets(name, averaged, weighted):
    """`E[vec(D) vec(D)ᵀ]` is the mean of `κ ∇(−log p) ∇(−log p)ᵀ`; a loss is `−log p` over what it averages."""
    model, x, y = _problem(name)
    weights = np.random.default_rng(5).uniform(0, 2, 6).astype("float32") if weighted else np.ones(6, "float32")
    weights[2] = 0 if weighted else 1
    forward_pass = _recorded(model, x, y, weights if weighted else None, keep_loss=True)
    expected = {layer.name: 0.0 for layer in model.layers}
    for n in range(6):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x[n : n + 1], y=tf.constant(y[n : n + 1]), y_pred=model(x[n : n + 1]))
        gradients = tape.gradient(loss, [layer.trainable_variables for layer in model.layers])
        for layer, parts in zip(model.layers, gradients, strict=True):
            score = averaged * _layer_matrix(layer, *(part.numpy() for part in parts)).reshape(-1)
            kappa = weights[n] / averaged * (6 if "sum" in name else 1)
            expected[layer.name] = expected[layer.name] + kappa * np.outer(score, score) / 6
    for layer, (a, g) in _samples_of(forward_pass, "empirical").items():
        np.testing.assert_allclose(reference.fisher(a.numpy(), g.numpy()), expected[layer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_the_first_rows_of_a_batch_are_those_of_all_of_them(fisher):
    model, x, y = _problem("mse")
    forward_pass = _recorded(model, x, y, persistent=True, keep_loss=True)
    whole, part = (_samples_of(forward_pass, fisher, rows) for rows in (None, 4))
    for layer in whole:
        for every, first in zip(whole[layer], part[layer], strict=True):
            blocks = every.numpy().reshape(-1, 6, *every.shape[1:])[:, :4]
            np.testing.assert_array_equal(first, blocks.reshape(-1, *every.shape[1:]))


def test_empirical_samples_need_the_loss_and_one_output():
    model, x, _ = _problem("mse")
    recorder = Recorder(always=True, persistent=True)
    for layer in model.layers:
        layer.attach(recorder)
    model(x, training=True)
    forward_pass = recorder.take()
    heads = pass_heads(forward_pass, "auto")
    with pytest.raises(ValueError, match=r"`fisher`='empirical' needs the loss"):
        preactivation_gradients(forward_pass, heads, "empirical", tf.constant([0, 0]))
    forward_pass.loss = tf.constant(1.0)
    with pytest.raises(ValueError, match=r"one output. Received 2"):
        preactivation_gradients(forward_pass, heads * 2, "empirical", tf.constant([0, 0]))


def test_errors_say_what_is_missing():
    model = _model("sigmoid")
    x = np.zeros((2, 5), "float32")
    with pytest.raises(ValueError, match="compile"):
        fisher_samples(model, x)
    model.compile(loss="mae")
    with pytest.raises(ValueError, match="likelihood"):
        fisher_samples(model, x)
    plain = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    plain.compile(loss="mse")
    with pytest.raises(ValueError, match="instrumented layer"):
        fisher_samples(plain, x)
    with pytest.raises(ValueError, match="`fisher` must be one of"):
        fisher_samples(model, x, fisher="true")
    with pytest.raises(ValueError, match=r"`fisher`='empirical' needs targets"):
        fisher_samples(model, x, fisher="empirical")
    with pytest.raises(ValueError, match="`likelihood` must be one of"):
        fisher_samples(model, x, likelihood="gaussian")
