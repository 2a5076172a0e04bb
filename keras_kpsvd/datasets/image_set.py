"""What every loader returns, and the checks that every loader makes."""

from dataclasses import dataclass
from numbers import Integral

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images as an autoencoder takes them, with a note of where they came from.

    Attributes:
        images: `[count, height * width]`, float32, every value in [0, 1], rows in C order. `images.reshape(-1,
            *image_shape)` gives pictures, one more axis of size 1 gives input for `Conv2D`.
        image_shape: `(height, width)`.
        source: a sentence fragment saying which data this is, meant to be printed beside every result.
        labels: `[count]`, int64, or None for data without classes.
    """

    images: np.ndarray
    image_shape: tuple[int, int]
    source: str
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


def check_integer(name: str, value: object, minimum: int) -> int:
    """Returns `value` as an int; raises ValueError naming the argument unless it is an integer >= `minimum`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}")
    return int(value)


def check_split(split: object) -> None:
    """Raises ValueError unless `split` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test'. Received: split={split!r}")


def check_available(count: int | None, available: int, source: str) -> int:
    """How many images to return from a source that holds `available`: all for None, never more than there are."""
    if count is None:
        return available
    count = check_integer("count", count, 1)
    if count > available:
        raise ValueError(f"`count` must be at most {available}, the images in {source}. Received: count={count}")
    return count
