"""Small face pictures: the ones scikit-image ships, augmented, or the user's own."""

import os
from pathlib import Path

import numpy as np

from keras_kpsvd.datasets.image_set import ImageSet, check_available, check_integer, check_split

_SIDE = 25
_FACES_IN_LFW_SUBSET = 100  # the other 100 pictures of the subset show no faces
_TRAIN_FACES = 80


def load_faces(
    count: int | None = None, split: str = "train", seed: int = 0, path: str | os.PathLike | None = None
) -> ImageSet:
    """Loads 25x25 faces, the 625 inputs of the FACES autoencoder, without a download.

    The papers' FACES are 165,600 patches made from the Olivetti faces by rotating, scaling and cropping. At hand are
    the 100 faces of `skimage.data.lfw_subset()` (Labeled Faces in the Wild, 25x25). Any number is made of them, each
    one a face picked at random and then: mirrored or not, turned by up to 10 degrees, scaled by 0.9 to 1.1, shifted by
    up to 1.5 pixels in each direction (bilinear, the border repeated), its contrast multiplied by 0.8 to 1.2 about its
    mean and its brightness moved by up to 0.1, then clipped to [0, 1]; all uniform. "train" is made of 80 of the
    people, "test" of the other 20, so a test loss speaks of unseen faces.

    With `path` the file's own faces are returned as they are, rescaled only: uint8 divided by 255, float within
    [0, 1] untouched, anything else from its own smallest and largest value to [0, 1].

    Args:
        count: number of images. None for 10,000, or with `path` for all of the file's.
        split: "train" or "test"; with `path` the file is one split, and "test" is an error.
        seed: non-negative integer, of the augmentation. The first n images of a longer draw are those of a shorter
            one, bit for bit.
        path: an `.npy`, `.npz` or `.mat` file holding one array `[n, 625]`, `[n, 25, 25]` or, as in the papers' own
            `newfaces_rot_single.mat`, `[625, n]`. Arrays of other shapes in the file are ignored.

    Returns:
        An `ImageSet` with `images` `[count, 625]`, float32 in [0, 1], and no labels. Not standardised: the FACES
        autoencoder has linear outputs, so subtract the mean and divide by the standard deviation before training it.

    Raises:
        ValueError: an argument out of range, or a file without exactly one array of faces.
        FileNotFoundError: there is no file at `path`.
        ImportError: scikit-image (or, for `.mat`, SciPy) is not installed.
    """
    check_split(split)
    seed = check_integer("seed", seed, 0)
    if path is not None:
        if split == "test":
            raise ValueError("`split` must be 'train' with `path`: the file is one split. Received: split='test'")
        return _own_faces(Path(path), count)
    count = 10_000 if count is None else check_integer("count", count, 1)
    faces = _lfw_faces()
    faces = faces[:_TRAIN_FACES] if split == "train" else faces[_TRAIN_FACES:]
    images = augment(faces, count, seed)
    source = f"{count:,} faces augmented with seed {seed} from {len(faces)} of scikit-image's lfw_subset, {split} split"
    return ImageSet(images.reshape(count, -1), (_SIDE, _SIDE), source)


def augment(faces: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws `count` altered copies of `faces` `[n, side, side]` in [0, 1], as `load_faces` says; float32."""
    side = faces.shape[1]
    draws = np.random.default_rng(seed).uniform(-1, 1, (count, 8))  # one row an image: a longer draw begins alike
    pick, mirror, turn, scale, down, right, contrast, brightness = draws.T
    chosen = faces[np.minimum(((pick + 1) / 2 * len(faces)).astype(int), len(faces) - 1)]
    angle, zoom = np.deg2rad(10) * turn, 1 / (1 + 0.1 * scale)
    centre = (side - 1) / 2
    row, column = np.meshgrid(*[np.arange(side) - centre] * 2, indexing="ij")
    column = column * np.where(mirror < 0, -1, 1)[:, None, None]
    cosine, sine = (zoom * np.cos(angle))[:, None, None], (zoom * np.sin(angle))[:, None, None]
    rows = centre + cosine * row - sine * column + 1.5 * down[:, None, None]
    columns = centre + sine * row + cosine * column + 1.5 * right[:, None, None]
    moved = _bilinear(chosen, rows, columns)
    mean = moved.mean((1, 2), keepdims=True)
    altered = mean + (moved - mean) * (1 + 0.2 * contrast)[:, None, None] + 0.1 * brightness[:, None, None]
    return np.clip(altered, 0, 1).astype(np.float32)


def _bilinear(pictures: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixels of `pictures` `[n, side, side]` at fractional positions `[n, side, side]`, the border repeated."""
    last = pictures.shape[1] - 1
    rows, columns = np.clip(rows, 0, last), np.clip(columns, 0, last)
    top, left = np.minimum(rows.astype(int), last - 1), np.minimum(columns.astype(int), last - 1)
    down, right = rows - top, columns - left
    n = np.arange(len(pictures))[:, None, None]
    upper = pictures[n, top, left] * (1 - right) + pictures[n, top, left + 1] * right
    lower = pictures[n, top + 1, left] * (1 - right) + pictures[n, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def _lfw_faces() -> np.ndarray:
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise ImportError(
            "load_faces needs scikit-image for its 100 faces: pip install 'keras_kpsvd[tutorials]', or give `path`."
        ) from error
    return lfw_subset()[:_FACES_IN_LFW_SUBSET]


def _own_faces(path: Path, count: int | None) -> ImageSet:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of faces at `path`. Received: path={str(path)!r}")
    candidates = [faces for array in _read_arrays(path) if (faces := _as_faces(array)) is not None]
    if len(candidates) != 1:
        raise ValueError(
            "`path` must hold exactly one array [n, 625], [n, 25, 25] or [625, n]. "
            f"Received: {len(candidates)} of them in {path}"
        )
    source = f"{len(candidates[0]):,} faces from {path}"
    count = check_available(count, len(candidates[0]), source)
    return ImageSet(_to_unit_interval(candidates[0])[:count], (_SIDE, _SIDE), source)


def _read_arrays(path: Path) -> list[np.ndarray]:
    if path.suffix not in (".npy", ".npz", ".mat"):
        raise ValueError(f"`path` must end in .npy, .npz or .mat. Received: path={str(path)!r}")
    try:
        if path.suffix == ".npy":
            return [np.load(path)]
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return list(arrays.values())
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("A .mat file of faces needs SciPy: pip install 'keras_kpsvd[tutorials]'.") from error
    except Exception as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    try:
        return [array for name, array in loadmat(path).items() if not name.startswith("__")]
    except Exception as error:  # SciPy raises many kinds: one for MATLAB's HDF5 files, others for broken ones
        raise ValueError(f"{path} could not be read: {error}. MATLAB files must be of version 7 or older.") from error


def _as_faces(array: np.ndarray) -> np.ndarray | None:
    """`[n, 625]`, or None for an array that can't be faces."""
    features = _SIDE * _SIDE
    if not isinstance(array, np.ndarray) or array.size == 0 or array.dtype.kind not in "uif":
        return None
    if array.ndim == 3 and array.shape[1:] == (_SIDE, _SIDE):
        return array.reshape(-1, features)
    if array.ndim == 2 and array.shape[1] == features:
        return array
    if array.ndim == 2 and array.shape[0] == features:
        return array.T
    return None


def _to_unit_interval(faces: np.ndarray) -> np.ndarray:
    if faces.dtype == np.uint8:
        return faces.astype(np.float32) / 255
    if not np.isfinite(faces).all():
        raise ValueError("The faces at `path` must be finite. Received: NaN or infinite pixels")
    low, high = float(faces.min()), float(faces.max())
    if low >= 0 and high <= 1:
        return faces.astype(np.float32)
    return np.clip((faces - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
