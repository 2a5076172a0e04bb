"""Random networks, losses and options through random sequences of what a user does with a model.

After every action all weights and the whole state of the optimizer are finite; frozen layers, `evaluate` and `predict`
change nothing; a saved and loaded model is the same to the last bit.
"""

import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd import KPSVD, KPSVDConv1D, KPSVDConv2D, KPSVDDense
from keras_kpsvd.curvature.approximations import METHODS
from tests.networks import assert_same, state

pytestmark = pytest.mark.slow

SETTINGS = {"deadline": None, "derandomize": True}
CLASSES = 3
layers = keras.layers

# Name: output activation, loss, and the likelihood that has to be named where the loss stands for none.
LOSSES = {
    "mse": (None, lambda: "mse", "auto"),
    "huber": (None, lambda: "huber", "normal"),
    "mae": (None, lambda: keras.losses.MeanAbsoluteError(), "normal"),
    "sparse softmax": ("softmax", lambda: "sparse_categorical_crossentropy", "auto"),
    "sparse logits": (None, lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True), "auto"),
    "sigmoid": ("sigmoid", lambda: "binary_crossentropy", "auto"),
    "binary logits": (None, lambda: keras.losses.BinaryCrossentropy(from_logits=True), "auto"),
}


def _hidden(kind, width, activation):
    """Layers before the last, and the shape of one example."""
    if kind == "dense":
        return (4,), [KPSVDDense(width, activation=activation), KPSVDDense(2, activation=activation, use_bias=False)]
    if kind == "mixture":
        stock = [layers.Dense(width), layers.BatchNormalization(), layers.Activation(activation), layers.Dropout(0.3)]
        return (4,), [KPSVDDense(3), *stock]
    if kind == "convolution":
        first = KPSVDConv2D(2, 3, padding="same", activation=activation)
        return (5, 4, 2), [first, layers.MaxPooling2D(2), KPSVDConv2D(2, 2, groups=2), layers.Flatten()]
    return (5, 2), [KPSVDConv1D(width, 2), KPSVDDense(2, activation=activation), layers.GlobalAveragePooling1D()]


KINDS = ("dense", "mixture", "convolution", "sequence")


def _model(kind, width, activation, loss, seed):
    keras.utils.set_random_seed(seed)
    shape, hidden = _hidden(kind, width, activation)
    return keras.Sequential([keras.Input(shape), *hidden, KPSVDDense(CLASSES, activation=LOSSES[loss][0])])


def _batch(model, loss, rows, seed, scale):
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_t(3, size=(rows, *model.input_shape[1:]))
    x[rng.random(rows) < 0.2] = 0.0
    if loss.startswith("sparse"):
        y = rng.integers(0, CLASSES, rows)
    elif loss in ("sigmoid", "binary logits"):
        y = rng.integers(0, 2, (rows, CLASSES)).astype("float32")
    else:
        y = (scale * rng.normal(size=(rows, CLASSES))).astype("float32")
    return x.astype("float32"), y


@st.composite
def _options(draw):
    """Of `KPSVD`, less the likelihood."""
    options = {
        "method": draw(st.sampled_from(METHODS)),
        "damping_rule": draw(st.sampled_from(["sqrt", "factor"])),
        "indefinite": draw(st.sampled_from(["absolute", "reflect"])),
        "fisher": draw(st.sampled_from(["sampled", "sampled", "exact", "empirical"])),
        "damping": draw(st.sampled_from(["adaptive", 1e-4, 1.0])),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "factor_decay": draw(st.sampled_from([0.0, 0.85])),
        "fisher_batch_size": draw(st.sampled_from([None, 2])),
        "seed": draw(st.integers(0, 3)),
        **{f"{name}_interval": draw(st.integers(1, 3)) for name in ("curvature", "inverse")},
    }
    if draw(st.booleans()):
        options |= draw(st.sampled_from([{}, {"conjugate_steps": 2}, {"fit_interval": 1}, {"fit_interval": 3}]))
    else:
        rates = st.sampled_from([0.03, keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)])
        options |= {"learning_rate": draw(rates), "nesterov": draw(st.booleans())}
    of_keras = [
        {},
        {"weight_decay": 0.01},
        {"clipnorm": 1.0},
        {"clipvalue": 0.1, "weight_decay": 0.1},
        {"global_clipnorm": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 8.0},
    ]
    return options | draw(st.sampled_from(of_keras))


CHANGING = st.one_of(
    st.tuples(st.just("fit"), st.integers(1, 9), st.integers(2, 5)),
    st.tuples(st.just("train_on_batch"), st.integers(1, 9), st.booleans()),
    st.tuples(st.just("freeze"), st.integers(0, 5), st.booleans()),
)
KEEPING = st.sampled_from([("evaluate",), ("predict",), ("save",), ("spoilt",), ("abandoned",)])
# Every sequence trains first, else there is nothing to keep.
SEQUENCES = st.builds(
    lambda actions: [("fit", 6, 3), *actions], st.lists(st.one_of(CHANGING, KEEPING), min_size=2, max_size=4)
)
CASES = {
    "kind": st.sampled_from(KINDS),
    "width": st.integers(1, 4),
    "activation": st.sampled_from(["relu", "tanh"]),
    "loss": st.sampled_from(list(LOSSES)),
    "options": _options(),
    "actions": SEQUENCES,
    "scale": st.sampled_from([0.01, 1.0, 30.0]),
    "seed": st.integers(0, 2**16),
}


class _Session:
    """A model in somebody's hands."""

    def __init__(self, kind, width, activation, loss, options, scale, seed, eager):
        self.loss, self.options, self.scale, self.seed, self.eager = loss, options, scale, seed, eager
        self.model = _model(kind, width, activation, loss, seed)
        # Batch statistics take what a forward pass gives them, and accumulators what Keras adds to them.
        self.forgiving = kind != "mixture" and "gradient_accumulation_steps" not in options
        self.compile(KPSVD(**options, likelihood=LOSSES[loss][2]))

    def compile(self, optimizer):
        self.model.compile(optimizer, LOSSES[self.loss][1](), run_eagerly=self.eager)

    def batch(self, rows):
        self.seed += 1
        return _batch(self.model, self.loss, rows, self.seed, self.scale)

    def fit(self, rows, size):
        self.model.fit(*self.batch(rows), batch_size=size, verbose=0)

    def train_on_batch(self, rows, weighted):
        weight = np.arange(rows, dtype="float32") if weighted and rows > 1 else None
        self.model.train_on_batch(*self.batch(rows), sample_weight=weight)

    def freeze(self, index, same):
        """Or thaws; with the optimizer at hand, or one that starts anew."""
        layer = self.model.layers[index % (len(self.model.layers) - 1)]
        layer.trainable = not layer.trainable
        optimizer = self.model.optimizer
        known = {variable.path for variable in getattr(optimizer, "_trainable_variables", [])}
        # Keras refuses variables that an optimizer was not built for, and with fewer mistakes whose averages are whose.
        same = same and all(variable.path in known for variable in self.model.trainable_variables)
        same = same and not optimizer.use_ema
        self.compile(optimizer if same else type(optimizer).from_config(optimizer.get_config()))

    def evaluate(self):
        self.model.evaluate(*self.batch(5), batch_size=2, verbose=0)

    def predict(self):
        self.model.predict(self.batch(5)[0], verbose=0)

    def abandoned(self):
        """A forward pass in training mode, under a tape, that no step follows."""
        if self.forgiving:
            with tf.GradientTape():
                self.model(self.batch(3)[0], training=True)

    def spoilt(self):
        """A batch that is not finite."""
        if self.forgiving:
            x, y = self.batch(4)
            x[1] = np.nan
            self.model.train_on_batch(x, y)

    def save(self):
        optimizer = self.model.optimizer
        trained = {variable.path for variable in self.model.trainable_variables}
        # An optimizer that was built for more than is trainable now is loaded into one that was not: it refuses.
        whole = trained == {variable.path for variable in optimizer._trainable_variables}
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(Path(folder) / "m.keras")
            loaded = keras.models.load_model(Path(folder) / "m.keras", compile=whole)
        if whole:
            assert loaded.optimizer.get_config() == optimizer.get_config()
            for option, value in self.options.items():
                assert option == "learning_rate" or getattr(loaded.optimizer, option) == value, option
            loaded.run_eagerly = self.eager
            self.model = loaded
        else:
            for one, other in zip(loaded.get_weights(), self.model.get_weights(), strict=True):
                np.testing.assert_array_equal(one, other)

    def variables(self):
        return [*self.model.weights, *self.model.optimizer.variables]

    def frozen(self):
        return [w.numpy() for layer in self.model.layers if not layer.trainable for w in layer.weights]

    def do(self, name, *arguments):
        """One action, and what it must not do."""
        before, frozen = [variable.numpy() for variable in self.variables()], self.frozen()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(self, name)(*arguments)
        for variable in self.variables():
            assert np.isfinite(variable.numpy()).all(), variable.path
        if name in ("evaluate", "predict", "save", "abandoned", "spoilt"):
            for variable, old in zip(self.variables(), before, strict=True):
                if name != "spoilt" or variable.name not in ("iteration", "skipped_steps"):
                    np.testing.assert_array_equal(variable.numpy(), old, err_msg=variable.path)
        elif name != "freeze":
            for one, other in zip(self.frozen(), frozen, strict=True):
                np.testing.assert_array_equal(one, other)
            assert int(self.model.optimizer._iterations) > 0  # Batches: `iterations` counts updates.


def _run(actions, **case):
    session = _Session(**case)
    for action in actions:
        session.do(*action)


@settings(max_examples=15, **SETTINGS)
@given(**CASES)
def test_whatever_is_done_in_whatever_order_all_variables_stay_finite(actions, **case):
    tf.config.run_functions_eagerly(True)  # Tracing would take most of the time.
    try:
        _run(actions, eager=True, **case)
    finally:
        tf.config.run_functions_eagerly(False)


@settings(max_examples=20, **SETTINGS)
@given(**CASES)
def test_whatever_is_done_in_whatever_order_all_variables_stay_finite_in_graphs(actions, **case):
    _run(actions, eager=False, **case)


@pytest.mark.parametrize("loss", [name for name, (*_, likelihood) in LOSSES.items() if likelihood != "auto"])
def test_a_loss_that_stands_for_no_density_is_refused_unless_a_likelihood_is_named(loss):
    model = _model("dense", 3, "tanh", loss, 0)
    x, y = _batch(model, loss, 4, 0, 1.0)
    optimizer = KPSVD()
    model.compile(optimizer, LOSSES[loss][1](), run_eagerly=True)
    optimizer.build(model.trainable_variables)
    before = state(model)
    with pytest.raises(ValueError, match="likelihood"):
        model.train_on_batch(x, y)
    assert_same(state(model), before)
