"""Problems on which `defaults.py` compares KPSVD's defaults with Adam: data, network, loss, and how they are trained.

`PROBLEMS` names them. Keras is imported by what loads or builds, not by this module: listing problems and reading
results is quick.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

HELD_OUT = 1_000  # at most so many examples are held out: they are evaluated after every epoch
CURVES = (784, 400, 200, 100, 50, 25, 6)
MNIST = (784, 1000, 500, 250, 30)
FACES = (625, 2000, 1000, 500, 30)

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Recorder:
    """Loss and time of every epoch, and what the model is worth on the held-out examples after it.

    Attributes:
        losses, seconds: of every epoch: the running mean that `fit` reports, and the duration of its training.
        held_out_losses, held_out_accuracies: after every epoch; an accuracy is None where there is none. A loss that
            is not finite is None.
        setup_seconds: of `fit` before its first epoch, in which Keras builds the optimizer.
        reason: the first loss that was not finite, in words, or None.
    """

    losses: list[float | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out_losses: list[float | None] = field(default_factory=list)
    held_out_accuracies: list[float | None] = field(default_factory=list)
    setup_seconds: float | None = None
    reason: str | None = None
    _began: float = 0.0

    def start(self) -> None:
        """Starts the clock for what comes before the first epoch."""
        self._began = time.perf_counter()

    def begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        now = time.perf_counter()
        if self.setup_seconds is None:
            self.setup_seconds = now - self._began
        self._began = now

    def end(self, epoch: int, logs: dict[str, Any], evaluate: Callable[[], dict[str, float]]) -> None:
        """Stops the clock, then evaluates: `evaluate` gives the held-out examples' loss and metrics."""
        loss = float(logs["loss"])
        seconds = time.perf_counter() - self._began
        held_out = evaluate()
        self.seconds.append(seconds)
        self.losses.append(_finite(loss))
        self.held_out_losses.append(_finite(held_out["loss"]))
        self.held_out_accuracies.append(float(held_out["accuracy"]) if "accuracy" in held_out else None)
        # The training loss may look finite while hidden weights are NaN: compiled ReLUs may turn NaN into 0.
        for name, value in (("training", loss), ("held-out", float(held_out["loss"]))):
            if self.reason is None and not math.isfinite(value):
                self.reason = f"{name} loss is {value} in epoch {epoch + 1}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Problem:
    """One problem. Every optimizer trains the same model of KPSVD layers, in Keras's default initialisation.

    Attributes:
        name: as on the command line.
        samples: training examples by default.
        loader: makes the data from a seed and a number of training examples.
        builder: makes the model; its weights come from Keras's global seed.
        loss: Keras's name of the loss.
        epochs: by default.
        batch_sizes: by default.
        metrics: Keras's names; "accuracy" of classifiers.
    """

    name: str
    samples: int
    loader: Callable[[int, int], Data]
    builder: Callable[[], keras.Model]
    loss: str
    epochs: int
    batch_sizes: tuple[int, ...] = (64, 1024)
    metrics: tuple[str, ...] = ()

    def load(self, seed: int, samples: int | None = None) -> Data:
        """The data of `seed`.

        Returns:
            `(x_train, y_train, x_val, y_val)`: inputs and real-valued targets float32, labels int64; `samples`
            training examples (default: the attribute) and at most `HELD_OUT` others.
        """
        return self.loader(seed, samples or self.samples)

    def build(self, seed: int) -> keras.Model:
        """The uncompiled model. Sets Keras's global seed: equal seeds give equal weights."""
        import keras

        keras.utils.set_random_seed(seed)
        return self.builder()

    def train(
        self,
        make_optimizer: Callable[[], keras.optimizers.Optimizer],
        batch: int,
        seed: int,
        epochs: int,
        recorder: Recorder,
        samples: int | None = None,
        watch: Callable[[keras.Model, np.ndarray, int], None] | None = None,
    ) -> keras.Model:
        """Trains by stock `compile` and `fit`, until a loss is not finite; returns the model.

        Args:
            make_optimizer: called once Keras's global seed is set.
            batch: size.
            seed: of data, weights and batches.
            epochs: at most.
            recorder: filled in epoch by epoch.
            samples: see `load`.
            watch: is given the model, the training inputs and the number of epochs behind it, before the first epoch
                and after each one, off the clock.
        """
        import keras

        data = self.load(seed, samples)
        keras.backend.clear_session()
        model = self.build(seed)
        model.compile(optimizer=make_optimizer(), loss=self.loss, metrics=list(self.metrics))
        fit(model, data, batch, epochs, recorder, watch)
        return model


def fit(
    model: keras.Model,
    data: Data,
    batch: int,
    epochs: int,
    recorder: Recorder,
    watch: Callable[[keras.Model, np.ndarray, int], None] | None = None,
) -> None:
    """The `fit` of `Problem.train`, of a compiled model."""
    import keras

    x, y, x_val, y_val = data

    training, held_out = batches(x, y, batch, shuffle=True), batches(x_val, y_val, batch)

    def end(epoch: int, logs: dict[str, Any]) -> None:
        recorder.end(epoch, logs, lambda: model.evaluate(held_out, verbose=0, return_dict=True))
        if recorder.reason is not None:
            model.stop_training = True
        elif watch is not None:
            watch(model, x, epoch + 1)

    # Nothing is hooked to single batches: Keras would wait for each one's loss.
    callback = keras.callbacks.LambdaCallback(on_epoch_begin=recorder.begin, on_epoch_end=end)
    if watch is not None:
        watch(model, x, 0)
    recorder.start()
    model.fit(training, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])


def batches(x: np.ndarray, y: np.ndarray, batch: int, *, shuffle: bool = False) -> tf.data.Dataset:
    """What `fit` makes of two arrays, without `tf.data`'s tuning thread, and in a new order every epoch if asked.

    Keras deletes an epoch's iterator when the next begins, and TensorFlow then waits for that thread to end a sleep,
    which grows with the time the iterator was there: seconds of chance, more of them the longer something else, as an
    evaluation, happens between epochs.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    rows = tf.data.Dataset.range(len(x))
    if shuffle:
        rows = rows.shuffle(len(x), reshuffle_each_iteration=True)
    x, y = tf.constant(x), tf.constant(y)
    return rows.batch(batch).map(lambda of: (tf.gather(x, of), tf.gather(y, of))).prefetch(2).with_options(options)


def _autoencoder_data(name: str) -> Callable[[int, int], Data]:
    """Images as inputs and targets, as the tutorial loads them: pixels in [0, 1], faces standardised."""

    def load(seed: int, samples: int) -> Data:
        tutorials = str(Path(__file__).resolve().parents[1] / "tutorials")
        if tutorials not in sys.path:
            sys.path.append(tutorials)
        from autoencoder_problems import PROBLEM_FACTORIES

        data = PROBLEM_FACTORIES[name](samples, seed)
        held_out = data.test_images[:HELD_OUT]
        return data.train_images, data.train_images, held_out, held_out

    return load


def _digits(seed: int, samples: int) -> Data:
    """scikit-learn's 1,797 digits, 8 × 8 pixels in [0, 1], shuffled by the seed; what does not train is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    return x[:samples], y[:samples], x[samples:][:HELD_OUT], y[samples:][:HELD_OUT]


def _digit_rows(seed: int, samples: int) -> Data:
    """The same, as a sequence of 8 rows: 8 pixels, and a one for the row's place."""
    x, y, x_val, y_val = _digits(seed, samples)

    def placed(images: np.ndarray) -> np.ndarray:
        places = np.broadcast_to(np.eye(8, dtype=np.float32), (len(images), 8, 8))
        return np.concatenate([images.reshape(-1, 8, 8), places], axis=2)

    return placed(x), y, placed(x_val), y_val


def _tumours(seed: int, samples: int) -> Data:
    """scikit-learn's 569 breast tumours: 30 standardised measurements, and labels 0 and 1 `[count, 1]`."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order, None].astype(np.float32)
    x = ((x - x[:samples].mean(0)) / x[:samples].std(0)).astype(np.float32)
    return x[:samples], y[:samples], x[samples:][:HELD_OUT], y[samples:][:HELD_OUT]


def _mnist_labels(seed: int, samples: int) -> Data:
    """MNIST digits `[count, 28, 28, 1]` in [0, 1], the same for every seed, and their labels."""
    from keras_kpsvd.datasets import load_mnist

    train, test = load_mnist(samples), load_mnist(HELD_OUT, "test")
    x, x_val = (data.images.reshape(-1, 28, 28, 1) for data in (train, test))
    return x, train.labels, x_val, test.labels


def _heavy_tailed(seed: int, samples: int) -> Data:
    """A smooth function of 20 normal inputs, of variance about 1, plus noise: 0.3 times Student's t of 2 degrees.

    The noise has no variance: a few targets lie far outside. Held-out targets have no noise, or a handful of them
    would be the whole held-out loss.
    """
    weights = np.random.default_rng(0).normal(size=(20, 3)) / 20**0.5  # the function is the same for every seed
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples + HELD_OUT, 20))
    first, second, third = (x @ weights).T
    y = np.sin(2 * first) + second * third + 0.5 * np.tanh(2 * second)
    y[:samples] += 0.3 * rng.standard_t(2, size=samples)
    x, y = x.astype(np.float32), y[:, None].astype(np.float32)
    return x[:samples], y[:samples], x[samples:], y[samples:]


def _dense(inputs: int, *units: int, output: str | None, linear: int | None = None) -> keras.Model:
    """Dense layers of `units`, ReLU but for the activation of the output and the hidden layer number `linear`."""
    import keras

    from keras_kpsvd import KPSVDDense

    activations: list[str | None] = ["relu"] * (len(units) - 1) + [output]
    if linear is not None:
        activations[linear] = None
    layers = [KPSVDDense(width, activation=kind) for width, kind in zip(units, activations, strict=True)]
    return keras.Sequential([keras.Input((inputs,)), *layers])


def _autoencoder(widths: tuple[int, ...], output: str | None) -> keras.Model:
    """The encoder of `widths` and its mirror image, the code linear as in the tutorial."""
    return _dense(widths[0], *widths[1:], *widths[-2::-1], output=output, linear=len(widths) - 2)


def _convolutional() -> keras.Model:
    """Four 3 × 3 convolutions of 8, 16, 16 and 32 channels, two of them strided, each with batch normalisation."""
    import keras

    from keras_kpsvd import KPSVDConv2D, KPSVDDense

    model = keras.Sequential([keras.Input((28, 28, 1))])
    for filters, strides in ((8, 1), (16, 2), (16, 1), (32, 2)):
        model.add(KPSVDConv2D(filters, 3, strides=strides, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(KPSVDDense(10, activation="softmax"))
    return model


def _attention() -> keras.Model:
    """Two blocks of pre-normalised attention and dense layers, the mean over rows, and a dense layer."""
    import keras

    from keras_kpsvd import instrument

    rows = keras.Input((8, 16))
    x = keras.layers.Dense(32)(rows)
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, 8)(y, y)
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(32)(keras.layers.Dense(64, activation="gelu")(y))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    return instrument(keras.Model(rows, keras.layers.Dense(10, activation="softmax")(x)))


def _classifier(
    name: str, samples: int, loader: Callable[[int, int], Data], builder: Callable[[], keras.Model], epochs: int
) -> Problem:
    return Problem(name, samples, loader, builder, "sparse_categorical_crossentropy", epochs, metrics=("accuracy",))


_ALL = (
    # Koroko et al. 2023. Fewer images than theirs, so that five rates of Adam and three seeds are an hour's work.
    Problem(
        "curves",
        10_000,
        _autoencoder_data("curves"),
        lambda: _autoencoder(CURVES, "sigmoid"),
        "binary_crossentropy",
        30,
        (256,),
    ),
    Problem(
        "mnist",
        4_000,
        _autoencoder_data("mnist"),
        lambda: _autoencoder(MNIST, "sigmoid"),
        "binary_crossentropy",
        20,
        (512,),
    ),
    Problem(
        "faces",
        4_000,
        _autoencoder_data("faces"),
        lambda: _autoencoder(FACES, None),
        "mean_squared_error",
        30,
        (1024,),
    ),
    _classifier("digits", 1_437, _digits, lambda: _dense(64, 256, 128, 10, output="softmax"), 30),
    _classifier("conv", 4_000, _mnist_labels, _convolutional, 10),
    Problem(
        "regression",
        4_000,
        _heavy_tailed,
        lambda: _dense(20, 128, 128, 1, output=None),
        "mean_squared_error",
        30,
    ),
    _classifier("narrow", 1_437, _digits, lambda: _dense(64, *[8] * 6, 10, output="softmax"), 50),
    _classifier("deep", 1_437, _digits, lambda: _dense(64, *[64] * 30, 10, output="softmax"), 30),
    # Looked at only once the defaults were what they are: nothing was chosen on these two.
    _classifier("attention", 1_437, _digit_rows, _attention, 30),
    Problem(
        "tumours",
        455,
        _tumours,
        lambda: _dense(30, 64, 64, 1, output="sigmoid"),
        "binary_crossentropy",
        30,
        metrics=("accuracy",),
    ),
)
PROBLEMS = {problem.name: problem for problem in _ALL}
