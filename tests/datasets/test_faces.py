"""Faces: the augmentation against simple cases that can be computed by hand, and the user's own files."""

import sys

import numpy as np
import pytest
import scipy.io
from skimage.data import lfw_subset

from keras_kpsvd.datasets import load_faces
from keras_kpsvd.datasets.faces import _bilinear, augment


def test_same_seed_same_faces_and_a_longer_draw_begins_with_the_shorter():
    longer = load_faces(50, seed=2).images
    for count in (1, 7, 50):
        np.testing.assert_array_equal(load_faces(count, seed=2).images, longer[:count])
    assert (load_faces(50, seed=3).images != longer).any(1).all()


def test_form_and_source():
    faces = load_faces(12, seed=4)
    assert faces.images.shape == (12, 625) and faces.images.dtype == np.float32 and faces.image_shape == (25, 25)
    assert faces.labels is None and faces.images.min() >= 0 and faces.images.max() <= 1
    for fact in ("12", "seed 4", "80", "lfw_subset", "train"):
        assert fact in faces.source


def test_splits_share_nobody_and_the_pictures_that_are_not_faces_are_left_out(monkeypatch):
    greys = np.concatenate([np.full(80, 0.2), np.full(20, 0.8), np.full(100, np.nan)])
    monkeypatch.setattr("skimage.data.lfw_subset", lambda: np.broadcast_to(greys[:, None, None], (200, 25, 25)))
    train, test = load_faces(500).images, load_faces(500, "test").images
    assert train.min() > 0.09 and train.max() < 0.31
    assert test.min() > 0.69 and test.max() < 0.91


def test_every_image_is_one_of_the_faces_altered():
    originals = lfw_subset()[:80]
    images = load_faces(300).images
    candidates = np.concatenate([originals, originals[:, :, ::-1]]).reshape(160, -1)
    standard = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (images, candidates)]
    most_alike = (standard[0] @ standard[1].T / 625).max(1)
    assert np.median(most_alike) > 0.7 and most_alike.max() < 1 - 1e-6


def test_both_orientations_occur_about_equally():
    ramp = np.tile(np.linspace(0.3, 0.7, 25), (1, 25, 1))
    images = augment(ramp, 1000, 0)
    rising = images[:, :, -1].mean(1) > images[:, :, 0].mean(1)
    assert 0.45 < rising.mean() < 0.55


def test_contrast_and_brightness_stay_within_their_stated_ranges():
    flat = augment(np.full((1, 25, 25), 0.5), 1000, 0)
    assert np.ptp(flat, axis=(1, 2)).max() < 1e-6
    level = flat.mean((1, 2))
    assert 0.4 <= level.min() < 0.41 and 0.59 < level.max() <= 0.6


def test_bilinear_interpolation_is_exact_for_linear_pictures_and_repeats_the_border():
    row, column = np.meshgrid(np.arange(25.0), np.arange(25.0), indexing="ij")
    picture = (2 * row - column)[None]
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(-3, 28, (2, 1, 25, 25))
    expected = 2 * rows.clip(0, 24) - columns.clip(0, 24)
    np.testing.assert_allclose(_bilinear(picture, rows, columns), expected, atol=1e-12)


@pytest.mark.parametrize("layout", ["flat.npy", "square.npz", "transposed.mat"])
def test_users_faces_come_back_in_order_whatever_the_layout(tmp_path, layout):
    faces = np.random.default_rng(0).integers(0, 256, (30, 625), np.uint8)
    path = tmp_path / layout
    if path.suffix == ".npy":
        np.save(path, faces)
    elif path.suffix == ".npz":
        np.savez(path, faces=faces.reshape(30, 25, 25), names=np.arange(30))
    else:
        scipy.io.savemat(path, {"newfaces_single": faces.T})
    loaded = load_faces(20, path=path)
    np.testing.assert_allclose(loaded.images, faces[:20] / 255, atol=1e-6)
    assert layout in loaded.source and len(load_faces(path=path)) == 30


def test_users_faces_in_other_units_are_rescaled_to_the_unit_interval(tmp_path):
    faces = np.random.default_rng(0).normal(10, 50, (9, 625))
    np.save(tmp_path / "faces.npy", faces)
    images = load_faces(path=tmp_path / "faces.npy").images
    np.testing.assert_allclose(images, (faces - faces.min()) / np.ptp(faces), atol=1e-6)


def test_users_faces_already_in_the_unit_interval_are_untouched(tmp_path):
    faces = np.random.default_rng(0).uniform(0.2, 0.6, (9, 625)).astype(np.float32)
    np.save(tmp_path / "faces.npy", faces)
    np.testing.assert_array_equal(load_faces(path=tmp_path / "faces.npy").images, faces)


def test_bad_files_are_refused(tmp_path):
    np.save(tmp_path / "wrong.npy", np.zeros((5, 784)))
    np.savez(tmp_path / "two.npz", a=np.zeros((5, 625)), b=np.zeros((6, 625)))
    np.save(tmp_path / "nan.npy", np.full((5, 625), np.nan))
    (tmp_path / "text.mat").write_text("text")
    (tmp_path / "faces.csv").write_text("1,2")
    for name in ("wrong.npy", "two.npz", "nan.npy", "text.mat", "faces.csv"):
        with pytest.raises(ValueError):
            load_faces(path=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="`path`"):
        load_faces(path=tmp_path / "absent.npy")


def test_more_of_the_users_faces_than_there_are_is_an_error(tmp_path):
    np.save(tmp_path / "faces.npy", np.zeros((5, 625)))
    with pytest.raises(ValueError, match=r"`count`.*at most 5.*Received: count=6"):
        load_faces(6, path=tmp_path / "faces.npy")


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("count", 1.0), ("seed", -1), ("split", "all")])
def test_bad_argument_is_named_with_what_was_received(name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: {name}={value!r}"):
        load_faces(**{name: value})


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"keras_kpsvd\[tutorials\]"):
        load_faces(1)
