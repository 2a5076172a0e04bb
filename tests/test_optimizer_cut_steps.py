"""Steps that stop short of the model's minimum, against dense float64 models: by how much, and that they do."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD
from keras_kpsvd.curvature import step_control
from tests import reference
from tests.contract.oracle import (
    DAMPING,
    EVERY_STEP,
    assert_steps,
    cross_entropy,
    gradients_at,
    samples_at,
    solved,
    squared_error,
)
from tests.networks import compiled, matrices, problem, tanh_network

# Without momentum a step is `−(∇ᵀΔ / ΔᵀMΔ) Δ`.
OPTIONS = {"eigenvalues": "kronecker", "damping": DAMPING, "momentum": 0.0, "fisher": "exact", **EVERY_STEP}


def _whole_step(weights, x, slopes, roots):
    """To the minimum of the model along the preconditioned gradient, and how it changes the outputs `[N, outputs]`."""
    gradients = gradients_at(weights, x, slopes)
    directions = solved(samples_at(weights, x, roots), gradients)
    inputs, _ = reference.forward(weights, x)
    jacobians = reference.output_jacobians(weights, x)
    tangents = sum(np.einsum("ni,nco,io->nc", a, j, d) for a, j, d in zip(inputs, jacobians, directions, strict=True))
    images = np.einsum("nkc,nc->nk", roots, tangents)
    curvature = np.sum(images**2) / len(x) + DAMPING * sum(np.sum(d**2) for d in directions)
    rate = sum(np.sum(g * d) for g, d in zip(gradients, directions, strict=True)) / curvature
    return [-rate * d for d in directions], -rate * tangents


def test_a_batch_smaller_than_the_usual_takes_that_part_of_its_step(monkeypatch):
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", 1e9)
    model = compiled(tanh_network(), KPSVD(**OPTIONS))
    usual = 12.0
    for number, rows in enumerate((12, 12, 3, 12, 11)):
        x, y = problem(rows=rows, seed=number)
        start = matrices(model)
        steps, _ = _whole_step(start, x, *squared_error(reference.forward(start, x)[1], y, np.ones(rows)))
        share = min(1.0, rows / usual)
        if number < 4:
            assert share == pytest.approx(0.25 if number == 2 else 1.0)
        usual = 0.95 * usual + 0.05 * rows
        model.train_on_batch(x, y)
        assert_steps(matrices(model), [w + share * s for w, s in zip(start, steps, strict=True)], start, 1e-4)
    assert 0.9 < share < 1


def test_a_step_moves_logits_by_no_more_than_they_are_trusted(monkeypatch):
    """Root mean square over examples, summed over classes, less what all classes share."""
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", 1e9)
    monkeypatch.setattr(step_control, "MAX_LOGIT_CHANGE", 0.5)
    model = compiled(tanh_network((4, 3, 3)), KPSVD(**OPTIONS), keras.losses.SparseCategoricalCrossentropy(True))
    parts = []
    for number in range(6):
        x, _ = problem(rows=12, seed=number % 2)
        classes = np.argmax(x[:, :3], axis=1)
        start = matrices(model)
        logits = reference.forward(start, x)[1]
        steps, change = _whole_step(start, x, *cross_entropy(logits, classes, np.ones(12)))
        change -= change.mean(1, keepdims=True)
        parts.append(min(1.0, 0.5 / np.sqrt(np.mean(np.sum(change**2, 1)))))
        model.train_on_batch(x, classes)
        assert_steps(matrices(model), [w + parts[-1] * s for w, s in zip(start, steps, strict=True)], start, 1e-4)
    assert min(parts) < 0.9
