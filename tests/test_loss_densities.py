"""Which density, and with which weight, a compiled loss stands for."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_probability import distributions as tfd

from keras_kpsvd import likelihoods
from keras_kpsvd.likelihoods import Head, exact_cotangents, sampled_cotangent
from keras_kpsvd.loss_densities import heads
from tests.test_likelihoods import SEED, WIDTH, normal_pair


def _model(loss, activation=None, *, shape=(5,), units=WIDTH, **compiled):
    model = keras.Sequential([keras.Input(shape), keras.layers.Dense(units, activation=activation)])
    model.compile(loss=loss, **compiled)
    return model


def _found(loss, activation=None, likelihood="auto"):
    model = _model(loss, activation)
    outputs = model(np.ones((2, 5), "float32"), training=True)
    (head,) = heads(likelihood, model, outputs)
    return head, outputs


@pytest.mark.parametrize(
    ("loss", "activation", "family", "logits"),
    [
        ("binary_crossentropy", "sigmoid", "bernoulli", True),
        ("bce", "sigmoid", "bernoulli", True),
        (keras.losses.binary_crossentropy, "sigmoid", "bernoulli", True),
        (keras.losses.BinaryCrossentropy(), "sigmoid", "bernoulli", True),
        (keras.losses.BinaryCrossentropy(from_logits=True), None, "bernoulli", True),
        ("categorical_crossentropy", "softmax", "categorical", True),
        ("CategoricalCrossentropy", "softmax", "categorical", True),
        (keras.losses.categorical_crossentropy, "softmax", "categorical", True),
        (keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), None, "categorical", True),
        ("sparse_categorical_crossentropy", "softmax", "categorical", True),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), None, "categorical", True),
        # Activations that Keras can't trace back to logits: the outputs are probabilities.
        ("binary_crossentropy", tf.nn.sigmoid, "bernoulli", False),
        ("categorical_crossentropy", tf.nn.softmax, "categorical", False),
        ("mse", None, "normal", False),
        ("mean_squared_error", "relu", "normal", False),
        ("MeanSquaredError", None, "normal", False),
        (keras.losses.mean_squared_error, None, "normal", False),
        (keras.losses.MeanSquaredError(reduction="sum"), None, "normal", False),
    ],
)
def test_the_density_is_known_from_the_loss_and_the_output(loss, activation, family, logits):
    head, outputs = _found(loss, activation)
    assert head.family == family
    if family != "normal":
        assert head.logits is logits
    expected = outputs._keras_logits if logits and activation is not None else outputs
    assert head.outputs is expected


def custom_loss(y_true, y_pred):
    """Anything."""
    return keras.ops.mean(keras.ops.abs(y_true - y_pred))


UNKNOWN = [
    "mae",
    custom_loss,
    keras.losses.Huber(),
    keras.losses.BinaryCrossentropy(reduction="none"),
    keras.losses.MeanSquaredError(reduction=None),
    keras.losses.CategoricalCrossentropy(axis=1),
    keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
]


@pytest.mark.parametrize("loss", UNKNOWN)
def test_a_loss_of_no_known_density_is_an_error_that_names_likelihood(loss):
    with pytest.raises(ValueError, match="`likelihood`='auto'"):
        _found(loss)


def test_no_loss_at_all_is_an_error_that_names_likelihood():
    with pytest.raises(ValueError, match=r"`likelihood`='auto'.*no compiled loss"):
        heads("auto", None, tf.ones([2, 3]))


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "normal", normal_pair])
def test_a_likelihood_that_is_given_overrides_the_loss(likelihood):
    head, _ = _found("mae", likelihood=likelihood)
    assert head.family is likelihood
    likelihoods.check(likelihood)


@pytest.mark.parametrize("likelihood", ["gaussian", None, 3])
def test_an_unknown_likelihood_is_refused_by_name(likelihood):
    with pytest.raises(ValueError, match=r"`likelihood` must be one of 'auto'.*Received"):
        likelihoods.check(likelihood)


def test_the_exact_expectation_is_refused_for_callables_and_for_many_outputs():
    with pytest.raises(ValueError, match=r"`fisher`='exact'.*likelihood="):
        exact_cotangents(Head(tf.ones([2, 4]), normal_pair, False, 1.0))
    with pytest.raises(ValueError, match=r"`fisher`='exact'.*256"):
        exact_cotangents(Head(tf.ones([2, 257]), "normal", False, 1.0))


def test_a_distribution_that_ignores_the_outputs_is_an_error_that_names_likelihood():
    def constant(z):
        return tfd.Normal(tf.zeros_like(z), 1.0)

    with pytest.raises(ValueError, match="`likelihood`"):
        sampled_cotangent(Head(tf.ones([2, 4]), constant, False, 1.0), SEED)


LOSSES = {
    "bernoulli": lambda reduction: keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction),
    "categorical": lambda reduction: keras.losses.CategoricalCrossentropy(from_logits=True, reduction=reduction),
    "normal": lambda reduction: keras.losses.MeanSquaredError(reduction=reduction),
}
REDUCTIONS = ["sum_over_batch_size", "sum", "mean_with_sample_weight"]


def _targets_at(family, shape):
    rng = np.random.default_rng(4)
    if family == "categorical":
        return np.eye(shape[-1], dtype="float32")[rng.integers(0, shape[-1], shape[:-1])]
    return rng.integers(0, 2, shape).astype("float32")


def _density(head, z):
    """The predictive distribution, by the book."""
    if head.family == "normal":
        return tfd.Normal(z, tf.constant(0.5**0.5, z.dtype))
    kind = tfd.Bernoulli if head.family == "bernoulli" else tfd.Categorical
    return kind(logits=z) if head.logits else kind(probs=z)


@pytest.mark.parametrize("weighting", ["none", "examples", "column", "positions", "mask", "mask and positions"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", LOSSES)
def test_the_weight_turns_negative_log_densities_into_the_compiled_loss(family, reduction, weighting):
    """`∂loss/∂z_n = κ_n ∂(−log p_n)/∂z_n / batch`, with Keras's own loss on one side and tfp's density on the other."""
    sequence = weighting in ("positions", "mask", "mask and positions")
    rng = np.random.default_rng(3)
    shape = (6, 4, WIDTH) if sequence else (6, WIDTH)
    model = _model(LOSSES[family](reduction), shape=(4, 5) if sequence else (5,), loss_weights=1.7)
    z = tf.constant(rng.normal(size=shape), tf.float32)
    if "mask" in weighting:
        z._keras_mask = tf.constant(rng.random((6, 4)) < 0.6)
    sample_weight = {
        "examples": rng.uniform(0.2, 2, 6).astype("float32"),
        "column": rng.uniform(0.2, 2, (6, 1)).astype("float32"),
    }.get(weighting)
    if "positions" in weighting:
        sample_weight = rng.uniform(0.2, 2, (6, 4)).astype("float32")
    y = tf.constant(_targets_at(family, shape))
    with tf.GradientTape() as tape:
        tape.watch(z)
        loss = model.compute_loss(y=y, y_pred=z, sample_weight=sample_weight)
    expected = tape.gradient(loss, z).numpy()

    (head,) = heads("auto", model, z, sample_weight)
    kappa = np.asarray(head.weight)
    kappa = kappa.reshape(kappa.shape + (1,) * (len(shape) - kappa.ndim))
    with tf.GradientTape() as tape:
        tape.watch(z)
        targets = tf.argmax(y, axis=-1) if family == "categorical" else y
        density = _density(head, z).log_prob(targets)
    gradient = -kappa * tape.gradient(density, z).numpy() / shape[0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_each_output_gets_its_own_loss_and_weights(structure):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    # Flattening sorts the keys of dicts; here that is not the order in which they stand.
    outputs = {
        "z": keras.layers.Dense(2, activation="sigmoid", name="z")(inputs),
        "silent": keras.layers.Dense(2, name="silent")(inputs),
        "a": keras.layers.Dense(4, name="a")(inputs),
    }
    losses = {"z": "binary_crossentropy", "a": "mse"}
    weights = {"z": 2.0, "a": 0.5}
    if structure == "list":
        outputs = list(outputs.values())
        losses, weights = ["binary_crossentropy", None, "mse"], [2.0, 1.0, 0.5]
    model = keras.Model(inputs, outputs)
    model.compile(loss=losses, loss_weights=weights)
    found = heads("auto", model, model(np.ones((3, 5), "float32"), training=True))
    by_family = {head.family: head for head in found}
    assert len(found) == 2
    assert by_family["bernoulli"].outputs.shape == (3, 2)
    assert by_family["normal"].outputs.shape == (3, 4)
    assert float(by_family["bernoulli"].weight) == pytest.approx(2.0 / 2)
    assert float(by_family["normal"].weight) == pytest.approx(0.5 / 4)


def test_losses_that_do_not_fit_the_outputs_are_an_error_that_names_likelihood():
    model = _model(["mse", "mse"])
    with pytest.raises(ValueError, match=r"`likelihood`.*2 losses"):
        heads("auto", model, model(np.ones((2, 5), "float32"), training=True))


def test_importing_the_package_does_not_import_tensorflow_probability():
    code = "import sys, keras_kpsvd; print('tensorflow_probability' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")
