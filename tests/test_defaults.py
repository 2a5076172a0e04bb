"""`KPSVD()` and nothing else, on the paper's networks and a digits classifier."""

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.datasets import load_curves, load_faces, load_mnist

PROBLEMS = {
    "curves": (lambda: load_curves(1500).images, (784, 400, 200, 100, 50, 25, 6), "bce"),
    "mnist": (lambda: load_mnist(1500).images, (784, 1000, 500, 250, 30), "bce"),
    "faces": (lambda: load_faces(1500).images, (625, 2000, 1000, 500, 30), "mse"),
}


def _mean_predictor_loss(images, loss):
    """The loss of the best constant output, which is where training stalls when it stalls."""
    mean = np.clip(images.mean(0), 1e-7, 1 - 1e-7)
    if loss == "mse":
        return np.square(images - mean).mean()
    return -(images * np.log(mean) + (1 - images) * np.log1p(-mean)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_defaults_train_the_papers_autoencoders_past_the_mean_predictor(problem):
    load, widths, loss = PROBLEMS[problem]
    images = load()
    keras.utils.set_random_seed(0)
    units = widths[1:] + widths[-2::-1]
    layers = [KPSVDDense(n, activation=None if n in (widths[-1], widths[0]) else "relu") for n in units]
    model = keras.Sequential([keras.Input((widths[0],)), *layers])
    model.compile(optimizer=KPSVD(), loss=keras.losses.BinaryCrossentropy(from_logits=True) if loss == "bce" else "mse")
    history = model.fit(images, images, batch_size=128, epochs=8, verbose=0).history["loss"]
    assert np.all(np.isfinite(history))
    assert history[-1] < 0.85 * _mean_predictor_loss(images, loss)


def test_the_defaults_learn_to_read_digits():
    digits = load_digits()
    x, y = digits.data.astype("float32") / 16, digits.target
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), KPSVDDense(64, activation="relu"), KPSVDDense(10, activation="softmax")]
    )
    model.compile(optimizer=KPSVD(), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x[:1500], y[:1500], batch_size=128, epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.05
    assert model.evaluate(x[1500:], y[1500:], verbose=0)[1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_small_batches_of_a_classifier_do_not_diverge(batch):
    """Most of such a batch is soon predicted with certainty, and its Fisher matrix is nearly zero."""
    digits = load_digits()
    x, y = digits.data[: 50 * batch].astype("float32") / 16, digits.target[: 50 * batch]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), KPSVDDense(32, activation="relu"), KPSVDDense(10, activation="softmax")]
    )
    model.compile(optimizer=KPSVD(method="kfac"), loss="sparse_categorical_crossentropy")
    history = model.fit(x, y, batch_size=batch, epochs=6, verbose=0).history["loss"]
    assert max(history) < 4 and history[-1] < 0.3
