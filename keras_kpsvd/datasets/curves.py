"""The CURVES data: smooth pen strokes through three random points, drawn here rather than downloaded."""

import numpy as np

from keras_kpsvd.datasets.image_set import ImageSet, check_integer

_CHUNK = 128  # images drawn at a time: the [chunk, pixels, samples] distances stay in the cache
_POSITIONS = 17  # on each side of a curve's vertex, searched for the one nearest to a pixel
_NEWTON_STEPS = 4
_HALF_WIDTH = 0.5  # of the stroke, in pixels; beyond it the ink falls off over one pixel


def load_curves(count: int = 20_000, seed: int = 0, size: int = 28) -> ImageSet:
    """Draws images of smooth curves, the CURVES problem of deep autoencoder papers.

    Each curve is the parabola through three random points, drawn with a pen about two pixels wide. The middle one is
    the point opposite the longest side of their triangle and is passed at the time proportional to the distance
    covered, so that strokes bend but do not double back. The data are six-dimensional by construction, hence the six
    units in the middle of the autoencoders trained on them. They are made in the manner of Hinton and Salakhutdinov
    (2006), whose own file of 20,000 training and 10,000 test images is not copied; take another `seed` for held-out
    curves.

    Args:
        count: number of images, at least 1.
        seed: non-negative integer. The first n images of a longer draw are those of a shorter one, bit for bit.
        size: height and width in pixels, at least 8.

    Returns:
        An `ImageSet` with `images` `[count, size * size]`, float32 in [0, 1], ink 1 on paper 0, and no labels.

    Raises:
        ValueError: an argument that is not an integer or is too small.
    """
    count = check_integer("count", count, 1)
    seed = check_integer("seed", seed, 0)
    size = check_integer("size", size, 8)
    images = draw_curves(random_points(count, seed, size), size)
    return ImageSet(images, (size, size), f"CURVES, {count:,} images generated with seed {seed}")


def random_points(count: int, seed: int, size: int) -> np.ndarray:
    """Three points for each curve, `[count, 3, 2]`, as (row, column) in pixels, curve after curve from one stream.

    The second is the one opposite the longest side. The margin leaves room for the bulge of the parabola and the pen.
    """
    margin = size * 3 / 28
    points = np.random.default_rng(seed).uniform(margin, size - margin, (count, 3, 2))
    opposite_sides = np.linalg.norm(np.roll(points, -1, 1) - np.roll(points, -2, 1), axis=-1)  # [count, 3]
    middle = opposite_sides.argmax(1)
    order = (middle[:, None] + np.array([-1, 0, 1])) % 3
    return np.take_along_axis(points, order[..., None], 1)


def draw_curves(points: np.ndarray, size: int) -> np.ndarray:
    """Draws the parabola through each triple of points, the second passed in proportion to the chords' lengths.

    The ink of a pixel is 1 up to half the pen's width from the curve and falls linearly to 0 over the next pixel,
    measured from the pixel's centre.

    Args:
        points: `[count, 3, 2]`, (row, column) in pixels; pixel (i, j) has its centre at (i + 1/2, j + 1/2).
        size: height and width of the images.

    Returns:
        `[count, size * size]`, float32 in [0, 1].
    """
    coefficients = _coefficients(np.asarray(points, np.float64)).astype(np.float32)
    centres = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float32) + 0.5] * 2, indexing="ij"), -1).reshape(-1, 2)
    images = np.empty((len(coefficients), size * size), np.float32)
    for start in range(0, len(coefficients), _CHUNK):
        distances = _distances(coefficients[start : start + _CHUNK], centres)
        images[start : start + _CHUNK] = np.clip(_HALF_WIDTH + 1 - distances, 0, 1)
    return images


def _coefficients(points: np.ndarray) -> np.ndarray:
    """`[count, 3, 2]`: c0, c1, c2 of the curve c0 + c1 t + c2 t² through the points, the second at its chord length."""
    to_middle, to_last = points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    before = np.linalg.norm(to_middle, axis=-1)
    after = np.linalg.norm(points[:, 2] - points[:, 1], axis=-1)
    # Kept off 0 and 1, where coinciding points would divide by zero.
    t = np.clip((before + 1e-6) / (before + after + 2e-6), 1e-3, 1 - 1e-3)[:, None]
    quadratic = (to_middle - t * to_last) / (t * (t - 1))
    return np.stack([points[:, 0], to_last - quadratic, quadratic], 1)


def _distances(coefficients: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Distance of each pixel's centre from each curve, `[count, pixels]`; exact where it is below two pixels.

    Along a parabola the distance from a point has at most one minimum on either side of the vertex, so each side is
    searched on its own and the smaller result kept.
    """
    c1, c2 = coefficients[:, 1], coefficients[:, 2]
    vertex = np.clip(-(c1 * c2).sum(-1) / np.maximum(2 * (c2**2).sum(-1), 1e-12), 0, 1)
    start, end = np.zeros_like(vertex), np.ones_like(vertex)
    return np.minimum(
        _distances_between(coefficients, centres, start, vertex), _distances_between(coefficients, centres, vertex, end)
    )


def _distances_between(coefficients: np.ndarray, centres: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The same for the part of each curve from parameter `start` to `end`, `[count]` each.

    The nearest of a few positions comes first; where that is near enough for ink, Newton steps on the squared
    distance move it to the foot of the perpendicular, or to the end of the curve.
    """
    t = start[:, None] + (end - start)[:, None] * np.linspace(0, 1, _POSITIONS, dtype=np.float32)  # [count, positions]
    c0, c1, c2 = (coefficients[:, k, None, :] for k in range(3))
    along = c0 + t[..., None] * (c1 + t[..., None] * c2)  # [count, positions, 2]
    # |x - p|² = |x|² - 2 x·p + |p|²; |x|² is the same for every position and joins after the search.
    lifted = np.concatenate([-2 * along, (along**2).sum(-1, keepdims=True)], -1)
    squared = np.matmul(np.concatenate([centres, np.ones_like(centres[:, :1])], -1), lifted.transpose(0, 2, 1))
    nearest = squared.argmin(-1)  # [count, pixels]
    offsets = np.take_along_axis(along, nearest[..., None], 1) - centres
    distances = np.sqrt((offsets**2).sum(-1))

    longest_gap = np.sqrt((np.diff(along, axis=1) ** 2).sum(-1)).max(-1, keepdims=True)
    curve, pixel = np.nonzero(distances < 2 + longest_gap)
    c0, c1, c2 = (coefficients[curve, k] for k in range(3))
    x, found = centres[pixel], t[curve, nearest[curve, pixel]]
    step = (end - start)[curve] / (_POSITIONS - 1)
    low, high = np.maximum(found - step, start[curve]), np.minimum(found + step, end[curve])
    foot = found
    for _ in range(_NEWTON_STEPS):
        offset = c0 + foot[:, None] * (c1 + foot[:, None] * c2) - x
        velocity = c1 + 2 * foot[:, None] * c2
        speed = (velocity**2).sum(-1)
        bend = speed + 2 * (offset * c2).sum(-1)
        # Where the squared distance is not convex, Gauss-Newton's denominator still leads downhill.
        foot = foot - (offset * velocity).sum(-1) / np.maximum(np.where(bend > 0.1 * speed, bend, speed), 1e-12)
        foot = np.clip(foot, low, high)
    offset = c0 + foot[:, None] * (c1 + foot[:, None] * c2) - x
    distances[curve, pixel] = np.minimum(distances[curve, pixel], np.sqrt((offset**2).sum(-1)))
    return distances
