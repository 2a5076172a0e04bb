"""Curves: against densely sampled parabolas in float64, and the reproducibility that the docstring promises."""

import time

import numpy as np
import pytest

from keras_kpsvd.datasets import load_curves
from keras_kpsvd.datasets.curves import draw_curves, random_points


def _dense_curve(triple):
    """Lagrange's parabola through the triple, the second at its share of the chords' length, at 20,001 positions."""
    first, middle, last = triple
    before, after = np.linalg.norm(middle - first), np.linalg.norm(last - middle)
    h, t = before / (before + after), np.linspace(0, 1, 20_001)[:, None]
    return first * (t - h) * (t - 1) / h + middle * t * (t - 1) / (h * (h - 1)) + last * t * (t - h) / (1 - h)


def _centres(size):
    return np.stack(np.meshgrid(*[np.arange(size) + 0.5] * 2, indexing="ij"), -1).reshape(-1, 2)


def _dense_ink(triple, size):
    curve = _dense_curve(triple)
    distances = np.array([np.sqrt(((curve - centre) ** 2).sum(-1)).min() for centre in _centres(size)])
    return np.clip(1.5 - distances, 0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_ink_falls_off_with_the_distance_from_the_densely_sampled_parabola(seed):
    points = random_points(1, seed, 28)
    np.testing.assert_allclose(draw_curves(points, 28)[0], _dense_ink(points[0], 28), atol=1e-4)


@pytest.mark.parametrize(
    "triple",
    [
        [(14.0, 4.0), (14.0, 24.0), (14.0, 5.0)],  # doubles back on itself
        [(4.0, 4.0), (14.0, 14.0), (24.0, 24.0)],  # straight
        [(4.0, 4.0), (4.5, 4.0), (24.0, 24.0)],  # a sharp hook at the end
        [(10.0, 5.0), (20.0, 14.0), (10.0, 5.2)],  # two branches closer than the pen is wide
    ],
)
def test_hairpins_hooks_and_straight_lines_are_drawn_exactly(triple):
    points = np.array([triple])
    np.testing.assert_allclose(draw_curves(points, 28)[0], _dense_ink(points[0], 28), atol=1e-3)


def test_every_curve_passes_through_its_three_points():
    points = random_points(500, 3, 28)
    images = draw_curves(points, 28).reshape(-1, 28, 28)
    rows, columns = points.astype(int).transpose(2, 0, 1)
    ink = images[np.arange(500)[:, None], rows, columns]
    # A point is at most √½ pixels from its own pixel's centre, so at least 1.5 - √½ of the ink is there.
    assert ink.min() >= 1.5 - np.sqrt(0.5) - 1e-4


def test_coinciding_points_draw_a_dot_or_a_line_and_no_nan():
    images = draw_curves(np.array([[(9.0, 9.0)] * 3, [(9.0, 9.0), (9.0, 9.0), (9.0, 20.0)]]), 28)
    assert np.isfinite(images).all()
    assert 1 < images[0].sum() < 10 < images[1].sum()


def test_strokes_are_thin_grey_at_the_edges_and_inside_the_paper():
    pictures = load_curves(1000).images.reshape(-1, 28, 28)
    assert pictures.min() == 0 and pictures.max() == 1
    grey = ((pictures > 0) & (pictures < 1)).mean((1, 2))
    black = (pictures == 1).mean((1, 2))
    assert (grey > black).all() and (grey < 0.25).all()
    assert len(np.unique(pictures)) > 10_000
    border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], 1)
    assert (border.max(1) == 0).mean() > 0.95


def test_middle_point_is_opposite_the_longest_side():
    first, middle, last = random_points(1000, 0, 28).transpose(1, 0, 2)
    longest = np.linalg.norm(last - first, axis=-1)
    assert (longest >= np.linalg.norm(middle - first, axis=-1)).all()
    assert (longest >= np.linalg.norm(last - middle, axis=-1)).all()


def test_same_seed_same_images_and_a_longer_draw_begins_with_the_shorter():
    longer = load_curves(300, seed=5).images
    for count in (1, 127, 128, 129, 300):
        np.testing.assert_array_equal(load_curves(count, seed=5).images, longer[:count])


def test_another_seed_gives_other_curves_everywhere():
    assert (load_curves(200, seed=0).images != load_curves(200, seed=1).images).any(1).all()


def test_form_and_source():
    curves = load_curves(7, seed=11, size=16)
    assert curves.images.shape == (7, 256) and curves.images.dtype == np.float32 and len(curves) == 7
    assert curves.image_shape == (16, 16) and curves.labels is None
    assert "generated" in curves.source and "7" in curves.source and "11" in curves.source


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 0), ("count", -3), ("count", 2.5), ("count", True), ("count", None), ("seed", -1), ("size", 7)],
)
def test_bad_argument_is_named_with_what_was_received(name, value):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: {name}={value!r}"):
        load_curves(**{"count": 1, name: value})


def test_twenty_thousand_curves_take_less_than_ten_seconds_of_one_core():
    began = time.process_time()
    assert len(load_curves(20_000)) == 20_000
    assert time.process_time() - began < 10
