"""λ: what it is measured in, and how it follows the slopes along the steps."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.curvature import damping as module
from keras_kpsvd.curvature.damping import bounded_damping, control_after, follow_damping, holds_on_other_batches
from keras_kpsvd.linalg import curvature_moments


def _bounded(damping, initial, traces, along, sizes):
    layers = [
        (tf.constant([trace, one], tf.float32), size) for trace, one, size in zip(traces, along, sizes, strict=True)
    ]
    whole, of_layers, first = bounded_damping(*(tf.constant(x, tf.float32) for x in (damping, initial)), layers)
    return float(whole), np.array([float(one) for one in of_layers]), float(first)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_bounds_and_start_are_in_units_of_the_curvature_that_gradients_see(scale):
    """However the loss is scaled; a layer of nearly the mean curvature is no exception."""
    traces, along, sizes = np.array([3.0, 40.0, 0.5]) * scale, np.array([2.0, 7.0, 30.0]) * scale, [10, 20, 70]
    unit = traces @ along / traces.sum()
    whole, of_layers, first = _bounded(0.0, 0.0, traces, along, sizes)
    np.testing.assert_allclose([whole, *of_layers, first], [2e-3 * unit] * 4 + [unit], rtol=1e-5)
    # A hundred times the curvature there was at first: the floor is ten times what it was.
    for before, expected in {0.0: 2e-4, 1.9e-4: 2e-4, 0.7: 0.7, 2e4: 1e4}.items():
        whole, of_layers, first = _bounded(before * unit, unit / 100, traces, along, sizes)
        np.testing.assert_allclose([whole, *of_layers, first], [expected * unit] * 4 + [unit / 100], rtol=1e-5)


def test_a_layer_that_the_signal_hardly_reaches_is_damped_by_its_own_curvature():
    traces, sizes = np.array([2.0, 1e-6, 0.0, 8.0]), np.array([10, 50, 20, 20])
    mean = traces.sum() / 100
    whole, of_layers, _ = _bounded(5.0, 1.0, traces, [1.0, 1.0, 0.0, 1.0], sizes)
    assert whole == pytest.approx(5)
    np.testing.assert_allclose(of_layers, [5, 5 * 100 * 1e-6 / 50 / mean, 5e-10, 5], rtol=1e-5)


def test_without_any_curvature_it_is_positive_and_nothing_is_kept():
    whole, of_layers, first = _bounded(0.0, 0.0, [0.0, 0.0], [0.0, 0.0], [3, 4])
    np.testing.assert_allclose([whole, *of_layers, first], [module.LOWEST] * 3 + [0.0])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_moments_are_those_of_the_dense_kronecker_product(scale):
    rng = np.random.default_rng(0)
    a, g = (rng.normal(size=(size + 2, size)) for size in (5, 3))
    a, g = scale * a.T @ a, g.T @ g / scale**0.5
    dense = np.kron(a, g)
    expected = [np.trace(dense), np.trace(dense @ dense) / np.trace(dense)]
    np.testing.assert_allclose(
        curvature_moments(tf.constant(a, tf.float32), tf.constant(g, tf.float32)), expected, 1e-5
    )
    np.testing.assert_array_equal(curvature_moments(tf.zeros([3, 3]), tf.eye(2)), 0)


@pytest.mark.parametrize(
    ("after", "factor"),
    [
        pytest.param(0.0, 0.8, id="the model was right"),
        pytest.param(-0.5, 0.8, id="the step was short"),
        pytest.param(0.2, 0.8, id="ratio 0.8"),
        pytest.param(0.5, 1.0, id="ratio 0.5"),
        pytest.param(0.8, 1.0, id="ratio 0.2"),
        pytest.param(1.1, 1 / 0.8, id="ratio -0.1"),
        pytest.param(3.0, 1 / 0.8, id="overshot"),
    ],
)
def test_damping_follows_the_ratio_of_the_averaged_slopes(after, factor):
    damping, averages = tf.constant(10.0), tf.constant([0.0, 0.0])
    before_sum, after_sum = 0.0, 0.0
    for step in range(5):
        damping, averages = follow_damping(damping, averages, tf.constant(-1.0), tf.constant(after))
        assert float(damping) == pytest.approx(10 * factor ** (step + 1), rel=1e-5)
        before_sum, after_sum = 0.8 * before_sum - 0.2, 0.8 * after_sum + 0.2 * after
        np.testing.assert_allclose(averages, [before_sum, after_sum], rtol=1e-5, atol=1e-7)


def test_damping_stays_where_there_was_no_step_yet():
    damping, averages = follow_damping(tf.constant(10.0), tf.zeros(2), tf.constant(0.0), tf.constant(0.0))
    assert float(damping) == pytest.approx(10)
    np.testing.assert_array_equal(averages, 0)


@pytest.mark.parametrize("trusted", [1.0, 0.25])
@pytest.mark.parametrize("curvature", [1.0, 2.5, 0.5])
def test_steps_cut_short_judge_the_model_as_whole_ones_do(trusted, curvature):
    """On `½ c w²` with a model of curvature 1 from w = 1 the ratio is 2 − c, however far the step went."""
    slope = -trusted  # ∇ᵀδ with ∇ = c w = c; in units of c.
    nothing = tf.zeros([2])
    last, _, averages = control_after(nothing, tf.constant(1.0), nothing, tf.constant(0.0), tf.constant(slope), trusted)
    after = slope * (1 - curvature * trusted)
    _, damping, averages = control_after(last, tf.constant(1.0), averages, tf.constant(after), tf.constant(0.0), 1.0)
    assert float(1 + averages[1] / averages[0]) == pytest.approx(2 - curvature, abs=1e-5)
    assert float(damping) == pytest.approx({1.0: 0.8, 2.5: 1.25, 0.5: 0.8}[curvature])


def test_conjugate_gradients_go_on_while_half_of_a_step_holds_on_the_next_batch():
    for after, expected in ((0.49, True), (0.51, False), (-1.0, True)):
        assert bool(holds_on_other_batches(tf.constant([-1.0, after]))) == expected
    assert bool(holds_on_other_batches(tf.zeros(2)))
