"""The paper's three autoencoder problems: images, network, loss."""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_kpsvd.datasets import ImageSet, load_curves, load_faces, load_mnist

_DEFAULT_SAMPLES = 10_000
_HELD_OUT = 1_000

INITIALIZERS = {"glorot_uniform": keras.initializers.GlorotUniform, "he_normal": keras.initializers.HeNormal}


@dataclass(frozen=True)
class Problem:
    """One autoencoder problem.

    Attributes:
        name: "curves", "mnist" or "faces".
        source: which data this is.
        train_images, test_images: `[count, features]`, float32, as the network takes and should give them.
        image_shape: `(height, width)`.
        widths: units of each layer from the input to the code; the decoder mirrors them.
        loss: a Keras loss of targets and the network's raw outputs.
        to_pixels: turns raw outputs, or standardised images, into pixels in [0, 1].
        images_to_pixels: the same for the images themselves.
        lowest_loss: what a perfect reconstruction of the training images would give.
        learning_rates: of Adam and of SGD (with Nesterov momentum 0.9), the best of a few tried, so that the
            comparison is with a tuned baseline.
    """

    name: str
    source: str
    train_images: np.ndarray
    test_images: np.ndarray
    image_shape: tuple[int, int]
    widths: tuple[int, ...]
    loss: keras.losses.Loss
    to_pixels: Callable[[np.ndarray], np.ndarray]
    images_to_pixels: Callable[[np.ndarray], np.ndarray]
    lowest_loss: float
    learning_rates: dict[str, float]


def curves(samples: int | None, seed: int) -> Problem:
    """CURVES: 784-400-200-100-50-25-6 and back, binary cross-entropy."""
    train = load_curves(samples or _DEFAULT_SAMPLES, seed)
    test = load_curves(_HELD_OUT, seed + 1)
    return _binary("curves", train, test, (784, 400, 200, 100, 50, 25, 6), adam_learning_rate=5e-3)


def mnist(samples: int | None, seed: int) -> Problem:
    """MNIST: 784-1000-500-250-30 and back, binary cross-entropy. The digits don't depend on the seed."""
    train = load_mnist(samples) if samples else load_mnist()
    if not samples and len(train) > _DEFAULT_SAMPLES:
        train = load_mnist(_DEFAULT_SAMPLES)
    return _binary("mnist", train, load_mnist(_HELD_OUT, "test"), (784, 1000, 500, 250, 30), adam_learning_rate=1e-3)


def faces(samples: int | None, seed: int) -> Problem:
    """FACES: 625-2000-1000-500-30 and back, mean squared error of standardised pixels.

    Every pixel loses its mean over the training images, and all are divided by one standard deviation: a loss of 0.02
    leaves 2 % of the training images' variance unexplained.
    """
    train = load_faces(samples or _DEFAULT_SAMPLES, seed=seed)
    test = load_faces(_HELD_OUT, "test", seed=seed)
    mean = train.images.mean(0)
    scale = (train.images - mean).std()

    def to_pixels(images: np.ndarray) -> np.ndarray:
        return np.clip(images * scale + mean, 0, 1)

    return Problem(
        name="faces",
        source=train.source,
        train_images=(train.images - mean) / scale,
        test_images=(test.images - mean) / scale,
        image_shape=train.image_shape,
        widths=(625, 2000, 1000, 500, 30),
        loss=keras.losses.MeanSquaredError(),
        to_pixels=to_pixels,
        images_to_pixels=to_pixels,
        lowest_loss=0.0,
        learning_rates={"adam": 1e-3, "sgd": 0.01},
    )


PROBLEM_FACTORIES = {"curves": curves, "mnist": mnist, "faces": faces}


def _binary(name: str, train: ImageSet, test: ImageSet, widths: tuple[int, ...], adam_learning_rate: float) -> Problem:
    return Problem(
        name=name,
        source=train.source,
        train_images=train.images,
        test_images=test.images,
        image_shape=train.image_shape,
        widths=widths,
        # From logits: a saturated sigmoid would lose its gradient to rounding.
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        to_pixels=lambda logits: 1 / (1 + np.exp(-np.clip(logits, -60, 60))),
        images_to_pixels=lambda images: images,
        lowest_loss=pixel_entropy(train.images),
        learning_rates={"adam": adam_learning_rate, "sgd": 1.0},
    )


def pixel_entropy(images: np.ndarray) -> float:
    """Mean of -x log x - (1 - x) log(1 - x): the binary cross-entropy that grey pixels leave even to a perfect copy."""
    x = np.clip(images.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(-(x * np.log(x) + (1 - x) * np.log1p(-x)).mean())


def build_autoencoder(
    widths: tuple[int, ...], dense: type[keras.layers.Dense], seed: int, initializer: str = "glorot_uniform"
) -> keras.Sequential:
    """The autoencoder of `widths` and back, of `dense` layers; equal seeds give equal weights.

    Hidden layers are ReLU. The weights start as Keras starts them unless told otherwise (Glorot), which is what a
    user's model does; He's, which suits Adam better here, is `--initializer he_normal`. The code and the output are
    linear: the code as in Martens (2010) and the papers since, because ReLU would let the few units there die; the
        output because the losses
    take logits or real values.
    """
    units = widths[1:] + widths[-2::-1]
    linear = (len(widths) - 2, len(units) - 1)
    layers = [
        dense(
            width,
            activation=None if position in linear else "relu",
            kernel_initializer=INITIALIZERS[initializer](seed=seed * 1000 + position),
            name=f"dense_{position + 1}",
        )
        for position, width in enumerate(units)
    ]
    return keras.Sequential([keras.Input((widths[0],)), *layers])
