"""Steps between exact fits: against a float64 oracle, resumed bit for bit, and safe where extrapolation is not."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature import extrapolation, natural_gradient, step_control
from tests import reference
from tests.networks import assert_same, compiled, matrices, problem, state, tanh_network, variable

DAMPING = 2.0**-7


def _minimiser(matrix, slopes):
    """Of `½ cᵀMc + slopesᵀc` over `c = (−rate, momentum)`, momentum in [0, 0.9]."""
    c = np.linalg.lstsq(matrix, -slopes, rcond=1e-12)[0]
    if not 0 <= c[1] <= 0.9:
        c[1] = np.clip(c[1], 0, 0.9)
        c[0] = -(slopes[0] + matrix[0, 1] * c[1]) / matrix[0, 0]
    return c


def test_steps_between_exact_fits_minimise_the_extrapolated_model(monkeypatch):
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", 1e9)
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 2)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 1)
    exact_products, sound = [], natural_gradient.quadratic_model
    monkeypatch.setattr(natural_gradient, "quadratic_model", lambda *a: exact_products.append(number) or sound(*a))
    options = {
        "curvature_interval": 1,
        "inverse_interval": 5,
        "factor_decay": 0.0,
        "fit_interval": 3,
        "conjugate_steps": 1,
        "eigenvalues": "kronecker",
    }
    model = compiled(tanh_network(), KPSVD(method="kfac", damping=DAMPING, fisher="exact", **options))
    weights = matrices(model)
    step = np.zeros(sum(w.size for w in weights))
    kept, slope, next_fit, expected_exact = None, 0.0, 0, []
    for number in range(14):
        x, y = problem(rows=6, seed=number % 3)
        gradients = reference.squared_error_gradients(weights, x, y)
        if number % 5 == 0:
            used = [reference.kfac_factors(*sample) for sample in reference.squared_error_samples(weights, x)]
        solved = [reference.rule_solve([pair], one, DAMPING) for pair, one in zip(used, gradients, strict=True)]
        gradient, direction = (np.concatenate([m.reshape(-1) for m in parts]) for parts in (gradients, solved))
        slopes = np.array([gradient @ direction, gradient @ step])
        due = (
            number < 2
            or number % 5 == 0
            or number >= next_fit
            or slopes[1] > 0.5 * abs(slope)
            or slopes[0] > 2 * kept[1]
        )
        if due:
            expected_exact.append(number)
            next_fit = number + 3
            metric = reference.squared_error_gauss_newton(weights, x) + DAMPING * np.eye(gradient.size)
            basis = np.stack([direction, step])
            model_matrix = basis @ metric @ basis.T
        else:
            before, descent, c = kept
            first, second = before[0, 0] * slopes[0] / descent, c @ before @ c
            mixed = before[0, 1] / np.sqrt(before[0, 0] * before[1, 1]) * np.sqrt(first * second)
            model_matrix = np.array([[first, mixed], [mixed, second]])
        c = _minimiser(model_matrix, slopes)
        kept = (model_matrix, slopes[0], c)
        step = c @ [direction, step]
        slope = gradient @ step
        start, ends = weights, np.cumsum([w.size for w in weights])[:-1]
        weights = [w + part.reshape(w.shape) for w, part in zip(weights, np.split(step, ends), strict=True)]
        model.train_on_batch(x, y)
        for now, wanted, old in zip(matrices(model), weights, start, strict=True):
            assert np.linalg.norm(now - wanted) <= 2e-4 * np.linalg.norm(wanted - old)
        weights = matrices(model)  # Rounding would add up over the steps.
    assert exact_products == expected_exact
    assert len(set(range(2, 14)) - set(expected_exact)) >= 2


def test_an_interval_of_one_is_always_exact(monkeypatch):
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 0)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 1)
    monkeypatch.setattr(extrapolation, "extrapolate", lambda *_: pytest.fail("extrapolated"))
    model = compiled(tanh_network(), KPSVD(method="kfac", fit_interval=1, conjugate_steps=1))
    for number in range(6):
        model.train_on_batch(*problem(seed=number))
    assert variable(model.optimizer, "next_fit") == 6


@pytest.mark.parametrize("eager", [True, False])
def test_a_run_saved_between_exact_fits_goes_on_bit_for_bit(tmp_path, monkeypatch, eager):
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 1)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 1)
    x, y = problem(rows=20, dtype="float32")
    fit = {"batch_size": 4, "shuffle": False, "verbose": 0}
    optimizer = KPSVD(fit_interval=7, curvature_interval=3, inverse_interval=3, seed=0)
    model = compiled(tanh_network(dtype="float32"), optimizer, run_eagerly=eager)
    model.fit(x, y, **fit)
    # Of updates 0 to 4 number 3, with a new preconditioner, was the last exact one: 4 and 5 are extrapolated.
    assert variable(model.optimizer, "next_fit") == 3 + 7
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for one in (model, loaded):
        one.fit(x, y, **fit)
    assert_same(state(loaded, but=()), state(model, but=()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_heavy_tailed_regression_does_not_diverge_between_exact_fits(seed, monkeypatch):
    """With the λ of an earlier version, and without the conditions on extrapolation, this reached losses of 1e21."""
    monkeypatch.setattr(extrapolation, "EXACT_UPDATES", 50)
    monkeypatch.setattr(extrapolation, "FEWEST_EXAMPLES", 1)  # Which would prevent it too.
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", 1e9)  # And that.
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4000, 20)).astype("float32")
    y = np.sin(x @ rng.normal(size=20) / 3) + 0.3 * np.square(x[:, :3]).sum(1) + 0.3 * rng.standard_t(2, 4000)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((20,)),
            KPSVDDense(128, activation="relu"),
            KPSVDDense(128, activation="relu"),
            KPSVDDense(1),
        ]
    )
    intervals = dict.fromkeys(("curvature_interval", "inverse_interval", "fit_interval"), 10)
    model.compile(optimizer=KPSVD(eigenvalues="kronecker", damping=1e-4, **intervals), loss="mse")
    history = model.fit(x, y.astype("float32")[:, None], batch_size=64, epochs=6, verbose=0).history["loss"]
    assert max(history) < 2.0
    assert history[-1] < 0.6 * history[0]
