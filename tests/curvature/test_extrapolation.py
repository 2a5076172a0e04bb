"""The quadratic model between exact fits: exact where it can be, and not used where it may fail."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.curvature.extrapolation import (
    EXACT_UPDATES,
    FEWEST_EXAMPLES,
    GROWTH,
    OVERSHOOT,
    KeptModel,
    extrapolate,
    needs_exact_fit,
    next_step,
)
from keras_kpsvd.curvature.step_control import MAX_RELATIVE_CHANGE, QuadraticModel


def _positive(rng, d):
    rows = rng.standard_normal((2 * d, d))
    return rows.T @ rows / d


def _kept(curvature, changes, descent, coefficients):
    return KeptModel(*(tf.constant(value, tf.float32) for value in (curvature, changes, descent, coefficients)))


@pytest.mark.parametrize("growth", [0.25, 1.0, 9.0])
def test_it_is_exact_for_a_direction_that_only_grows(growth):
    """`Δ' = cΔ` has `c²` of the descent and of the curvature; the last step's is that of its two directions."""
    rng = np.random.default_rng(0)
    fisher, metric = _positive(rng, 6), _positive(rng, 6)
    direction, previous, gradient = rng.standard_normal((3, 6))
    gradient *= np.sign(gradient @ direction)
    coefficients = np.array([-0.7, 0.4])
    step = coefficients @ [direction, previous]
    directions = np.stack([direction, previous])
    kept = _kept(
        directions @ fisher @ directions.T, directions @ metric @ directions.T, gradient @ direction, coefficients
    )
    found = extrapolate(kept, tf.constant(growth * gradient @ direction, tf.float32))
    for matrix, whole in zip(found, (fisher, metric), strict=True):
        np.testing.assert_allclose(matrix[0, 0], growth * direction @ whole @ direction, rtol=1e-5)
        np.testing.assert_allclose(matrix[1, 1], step @ whole @ step, rtol=1e-5)
        cosine = direction @ whole @ previous
        cosine /= np.sqrt((direction @ whole @ direction) * (previous @ whole @ previous))
        np.testing.assert_allclose(matrix[0, 1] / np.sqrt(matrix[0, 0] * matrix[1, 1]), cosine, rtol=1e-4)
        np.testing.assert_array_equal(matrix[0, 1], matrix[1, 0])


def test_nothing_kept_gives_nothing():
    kept = KeptModel(*(tf.zeros(shape) for shape in ((2, 2), (2, 2), (), (2,))))
    for matrix in extrapolate(kept, tf.constant(1.0)):
        np.testing.assert_array_equal(matrix, np.zeros((2, 2)))


def test_when_a_fit_must_be_exact():
    kept = _kept(np.eye(2), np.eye(2), 2.0, [-1.0, 0.0])
    late, fall = EXACT_UPDATES + 5, -3.0

    def due(
        descent=2.0,
        slope_after=0.0,
        updates=late,
        next_fit=late + 1,
        expected=0.0,
        examples=FEWEST_EXAMPLES,
        rebuilt=False,
    ):
        last, *rest = (tf.constant(value, tf.float32) for value in ([expected, fall], descent, slope_after))
        counts = (tf.constant(updates, tf.int64), tf.constant(next_fit, tf.int64))
        return bool(needs_exact_fit(kept, last, *rest, *counts, tf.constant(rebuilt), tf.constant(examples)))

    assert not due()
    assert due(next_fit=late)
    assert due(rebuilt=True)
    assert due(examples=FEWEST_EXAMPLES - 1)
    assert due(updates=EXACT_UPDATES - 1, next_fit=10 * late)
    assert due(descent=2.0 * GROWTH * 1.01) and not due(descent=2.0 * GROWTH * 0.99)
    assert due(slope_after=-fall * OVERSHOOT * 1.01) and not due(slope_after=-fall * OVERSHOOT * 0.99)
    # A step that was cut short says little of the model, whatever slope it left.
    assert due(slope_after=-2.0, expected=-2.0)


def test_exact_products_are_taken_only_where_due_and_kept_as_taken():
    rng = np.random.default_rng(1)
    curvature, change = (tf.constant(_positive(rng, 2), tf.float32) for _ in range(2))
    slopes = tf.constant([1.0, -0.1])
    calls = []

    def exact():
        calls.append(1)
        return QuadraticModel(curvature, [change, change])

    unmoved = lambda step: tf.constant(0.0)  # noqa: E731
    nothing = KeptModel(*(tf.zeros(shape) for shape in ((2, 2), (2, 2), (), (2,))))
    step, trusted, kept = next_step(exact, tf.constant(True), nothing, slopes, 0.9, tf.constant(1.0), unmoved)
    assert len(calls) == 1
    np.testing.assert_array_equal(kept.curvature, curvature)
    np.testing.assert_array_equal(kept.logit_changes, 2 * change)
    np.testing.assert_allclose(kept.coefficients, [-step.rate, step.momentum])
    assert 0 < trusted <= 1
    short, part, _ = next_step(exact, True, nothing, slopes, 0.9, tf.constant(0.25), unmoved)
    np.testing.assert_allclose([*short, part], 0.25 * np.array([step.rate, step.momentum, trusted]), rtol=1e-6)
    far, part, _ = next_step(exact, True, nothing, slopes, 0.9, tf.constant(0.25), lambda one: 1000 * one.rate)
    assert float(part) == pytest.approx(0.25 * MAX_RELATIVE_CHANGE / (1000 * float(step.rate / trusted)), rel=1e-5)
    np.testing.assert_allclose([*far], part / trusted * np.array([*step]), rtol=1e-5)
    del calls[1:]
    again, _, further = next_step(exact, tf.constant(False), kept, slopes, 0.9, tf.constant(1.0), unmoved)
    assert len(calls) == 1
    np.testing.assert_array_equal(further.curvature, extrapolate(kept, slopes[0])[0])
    assert again.rate > 0
