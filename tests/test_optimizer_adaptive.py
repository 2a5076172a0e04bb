"""Steps of the adaptive rate, with corrected eigenvalues and without, against dense matrices."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import CurvatureMonitor
from keras_kpsvd.curvature import corrected, step_control
from tests import reference
from tests.contract.oracle import DAMPING, EVERY_STEP, PLAIN, assert_steps
from tests.networks import compiled, matrices, problem, tanh_network, variable


def _corrected_directions(weights, x, y, dampings, free_bounds, kurtosis_bounds, moves):
    """Gradients, preconditioned with the diagonals that the blocks have in the eigenbases of their factors, and `φ`.

    And λ of each layer, of which a tenth is left where it moves and `φ` is 1.
    """
    gradients = reference.squared_error_gradients(weights, x, y)
    samples = reference.squared_error_samples(weights, x)
    pairs = [reference.kfac_factors(*sample) for sample in samples]
    spectra = [[np.linalg.eigh(factor) for factor in pair] for pair in pairs]
    diagonals = [
        reference.diagonal_in_bases(reference.fisher(*sample), *(basis for _, basis in both))
        for sample, both in zip(samples, spectra, strict=True)
    ]
    free = sum(np.sum(one / (one + lam)) for one, lam in zip(diagonals, dampings, strict=True))
    kurtosis = min(reference.length_kurtosis(*sample, y.shape[1]) for sample in samples)
    measures = [(free / y.size, free_bounds), (kurtosis, kurtosis_bounds)]
    factored = np.clip(max((value - low) / (high - low) for value, (low, high) in measures), 0, 1)
    if moves:
        dampings = [(1 - 0.9 * factored) * one for one in dampings]
    steps = []
    for gradient, pair, both, diagonal, lam in zip(gradients, pairs, spectra, diagonals, dampings, strict=True):
        values, bases = zip(*both, strict=True)
        means = [np.trace(factor) / len(factor) for factor in pair]
        damped = reference.corrected_diagonal(diagonal, *values, *means, lam, factored)
        inverse = reference.matrix_of_diagonal(1 / damped, *bases)
        steps.append((inverse @ gradient.reshape(-1)).reshape(gradient.shape))
    return gradients, steps, factored, dampings


def _adaptive_dampings(damping, first, factors, weights, lowest):
    """λ, at least `lowest √(q₀ q)` of the curvature that gradients see, then and now; that of each layer; and `q₀`.

    Less for a layer whose curvature is less than a hundredth of the mean.
    """
    traces, sizes = np.array([np.trace(a) * np.trace(g) for a, g in factors]), np.array([w.size for w in weights])
    seen = sum(np.sum(a * a) * np.sum(g * g) for a, g in factors) / traces.sum()  # tr F² / tr F of the whole.
    first, mean = first or seen, traces.sum() / sizes.sum()
    damping = max(damping, lowest * np.sqrt(first * seen))
    return damping, [damping * part for part in np.minimum(1, 100 * traces / sizes / mean)], first


@pytest.mark.parametrize(
    ("intervals", "refreshes", "inversions"),
    [((1, 3), range(7), (0, 3, 6)), ((3, 2), (0, 3, 6), (0, 3, 6)), ((2, 5), (0, 2, 4, 6), (0, 6))],
)
def test_corrected_eigenvalues_age_with_the_factors_and_their_bases_with_the_inverses(intervals, refreshes, inversions):
    """Bases turn with the first refresh at which an inverse is due; the diagonal is averaged in those there are."""
    decay = 0.5
    options = dict(zip(("curvature_interval", "inverse_interval"), intervals, strict=True), factor_decay=decay)
    model = compiled(tanh_network(), KPSVD(eigenvalues="corrected", **{**PLAIN, "learning_rate": 0.05}, **options))
    weights = matrices(model)
    layers = range(len(weights))
    sums, total = [(0, 0)] * len(weights), 0.0
    bases, values, diagonals, inverses = ([None for _ in layers] for _ in range(4))
    for number in range(7):
        x, y = problem(seed=number)
        samples = reference.squared_error_samples(weights, x)
        if number in refreshes:
            total = decay * total + 1
            for layer in layers:
                pairs = zip(sums[layer], reference.kfac_factors(*samples[layer]), strict=True)
                sums[layer] = tuple(decay * old + new for old, new in pairs)
                if number in inversions:
                    values[layer], turned = zip(*(np.linalg.eigh(one / total) for one in sums[layer]), strict=True)
                    if number:
                        dense = reference.matrix_of_diagonal(diagonals[layer], *bases[layer])
                        diagonals[layer] = reference.diagonal_in_bases(dense, *turned)
                    bases[layer] = turned
                now = reference.diagonal_in_bases(reference.fisher(*samples[layer]), *bases[layer])
                old = diagonals[layer] if number else now
                diagonals[layer] = old + (now - old) / total
        if number in inversions:
            for layer in layers:
                means = [np.trace(one) / total / len(one) for one in sums[layer]]
                damped = reference.corrected_diagonal(diagonals[layer], *values[layer], *means, DAMPING, 0.0)
                inverses[layer] = reference.matrix_of_diagonal(1 / damped, *bases[layer])
        gradients = reference.squared_error_gradients(weights, x, y)
        start = weights
        weights = [
            w - 0.05 * (inverse @ gradient.reshape(-1)).reshape(w.shape)
            for w, inverse, gradient in zip(weights, inverses, gradients, strict=True)
        ]
        model.train_on_batch(x, y)
        assert_steps(matrices(model), weights, start, 1e-4)
        weights = matrices(model)  # Rounding would add up over the steps.


def test_examples_without_weight_do_not_make_the_others_uneven():
    kurtoses = []
    x, y = problem(rows=12)
    for padding in (0, 12):
        model = compiled(tanh_network(), KPSVD(fisher="empirical"), run_eagerly=True)
        rows = np.concatenate([np.arange(12), np.arange(padding)])
        model.train_on_batch(x[rows], y[rows], sample_weight=np.repeat([1.0, 0.0], [12, padding]))
        kurtoses.append([v.numpy() for v in model.optimizer.variables if v.name.endswith("kurtosis")])
    assert min(kurtoses[0]) > 1
    np.testing.assert_allclose(kurtoses[1], kurtoses[0], rtol=1e-5)


def test_between_inversions_lambda_is_what_the_last_one_left_of_it(monkeypatch):
    """A monitor tells it: half of K-FAC's damping takes 45 % of it, also in steps that only refresh."""
    monkeypatch.setattr(
        "keras_kpsvd.curvature.natural_gradient.factored_part", lambda *known: tf.constant(0.5, tf.float32)
    )
    model = compiled(tanh_network(), KPSVD(curvature_interval=1, inverse_interval=100, seed=0))
    model.optimizer.build(model.trainable_variables)
    (damping,) = (v for v in model.optimizer.variables if v.name == "damping")
    told = []
    for _ in range(3):
        damping.assign(2.0)  # Above the floor.
        monitor = CurvatureMonitor(budget=None)
        model.fit(*problem(rows=12), batch_size=12, verbose=0, callbacks=[monitor])
        told += [record["damping"] for record in monitor.records[:1]]
    assert told == pytest.approx([1.1, 1.1, 1.1])


@pytest.mark.parametrize("options", [PLAIN, {}])
def test_of_a_short_last_batch_the_usual_one_says_how_much_is_known(options, monkeypatch):
    told = []
    monkeypatch.setattr(
        "keras_kpsvd.curvature.natural_gradient.factored_part",
        lambda *known: told.append(float(known[-1])) or tf.zeros([]),
    )
    every = {"curvature_interval": 1, "inverse_interval": 1}
    model = compiled(tanh_network(), KPSVD(eigenvalues="corrected", **options, **every), run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    x, y = problem(rows=12)
    for rows in (12, 12, 3):
        model.train_on_batch(x[:rows], y[:rows])
    assert told == pytest.approx([24, 24, 24])


def test_accumulated_parts_are_known_together(monkeypatch):
    told = []
    monkeypatch.setattr(
        "keras_kpsvd.curvature.natural_gradient.factored_part",
        lambda *known: told.append(float(known[-1])) or tf.zeros([]),
    )
    model = compiled(tanh_network(), KPSVD(gradient_accumulation_steps=4), run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    for seed in range(4):
        model.train_on_batch(*problem(rows=6, seed=seed))
    assert told == [4 * 6 * 2]


@pytest.mark.parametrize(
    ("method", "eigenvalues", "damping", "bound"),
    [
        ("kfac", "kronecker", "adaptive", 1e9),
        ("kfac", "kronecker", "adaptive", 0.5),
        ("kfac", "kronecker", DAMPING, 1e9),
        ("kfac", "kronecker", DAMPING, 0.6),
        ("kfac", None, "adaptive", 1e9),
        ("kfac", None, "adaptive", 0.5),
        ("kfac", "uneven", "adaptive", 1e9),
        ("kfac", "corrected", DAMPING, 0.6),
        ("kpsvd", "kronecker", "adaptive", 1e9),
        ("deflation", "kronecker", "adaptive", 1e9),
        ("lanczos", "kronecker", DAMPING, 1e9),
        ("kfac_corrected", "kronecker", "adaptive", 1e9),
    ],
)
def test_adaptive_steps_minimise_the_quadratic_model_and_damping_follows_the_slopes(
    method, eigenvalues, damping, bound, monkeypatch
):
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", bound)
    free_bounds, kurtosis_bounds = (0.5, 2.0), (1e8, 1e9)  # Of 23 weights and 12 numbers.
    if eigenvalues == "uneven":
        eigenvalues, free_bounds, kurtosis_bounds = None, (1e8, 1e9), (1.0, 1.5)
    for names, values in ((("ENOUGH", "TOO_MANY"), free_bounds), (("EVEN", "UNEVEN"), kurtosis_bounds)):
        for name, value in zip(names, values, strict=True):
            monkeypatch.setattr(corrected, name, value)
    options = {"damping": damping, "eigenvalues": eigenvalues, "conjugate_steps": 1, **EVERY_STEP}
    model = compiled(tanh_network(), KPSVD(method=method, fisher="exact", **options))
    lowest = 2e-3 if eigenvalues == "kronecker" else 6e-4
    weights = matrices(model)
    step = np.zeros(sum(w.size for w in weights))
    expected_damping, slope, averages = 0.0 if damping == "adaptive" else damping, np.zeros(2), np.zeros(2)
    first, rates, momenta, factors, parts_taken, factored = 0.0, [], [], [], [], []
    for number in range(10):
        x, y = problem(rows=6, seed=0 if number < 4 else number % 3)
        dampings = [expected_damping] * len(weights)
        terms = [reference.method_terms(*sample, method) for sample in reference.squared_error_samples(weights, x)]
        if damping == "adaptive":
            of_first = [pairs[0] for pairs in terms]
            expected_damping, dampings, first = _adaptive_dampings(expected_damping, first, of_first, weights, lowest)
        if eigenvalues == "kronecker":
            gradients = reference.squared_error_gradients(weights, x, y)
            directions = [
                reference.rule_solve(pairs, gradient, lam)
                for pairs, gradient, lam in zip(terms, gradients, dampings, strict=True)
            ]
        else:
            gradients, directions, part, dampings = _corrected_directions(
                weights, x, y, dampings, free_bounds, kurtosis_bounds, damping == "adaptive"
            )
            factored.append(part)
        gradient, direction = (np.concatenate([m.reshape(-1) for m in parts]) for parts in (gradients, directions))
        of_weights = [np.full(w.size, lam) for w, lam in zip(weights, dampings, strict=True)]
        matrix = reference.squared_error_gauss_newton(weights, x) + np.diag(np.concatenate(of_weights))
        basis = np.stack([-direction, step], 1)
        rate, momentum = np.linalg.lstsq(basis.T @ matrix @ basis, -basis.T @ gradient, rcond=None)[0]
        if not 0 <= momentum <= 0.9:
            momentum = np.clip(momentum, 0, 0.9)
            rate = (gradient + matrix @ step * momentum) @ direction / (direction @ matrix @ direction)
        after = gradient @ step
        step = basis @ [rate, momentum]
        ends = np.cumsum([w.size for w in weights])[:-1]
        sizes = [max(np.linalg.norm(w), np.sqrt(2 * w.size / sum(w.shape))) for w in weights]
        parts = [np.linalg.norm(part) / size for part, size in zip(np.split(step, ends), sizes, strict=True)]
        change = np.sqrt(np.sum(parts) ** 2 - np.sum(np.square(parts)))
        part = min(1.0, bound / change)
        step *= part
        if damping == "adaptive":  # The ratio of slopes averaged over some five steps, and a fifth at most.
            averages = 0.8 * averages + 0.2 * np.array([slope[1], after - slope[0]])
            ratio = 1 + averages[1] / averages[0] if averages[0] < 0 else 0.5
            factor = 0.8 if ratio > 0.75 else 1 / 0.8 if ratio < 0 else 1.0
            expected_damping *= factor
            factors.append(factor)
        slope = gradient @ step * np.array([1 - part, part])  # Expected to be left at its end, and to be gone.
        start = weights
        weights = [w + part.reshape(w.shape) for w, part in zip(weights, np.split(step, ends), strict=True)]
        model.train_on_batch(x, y)
        assert_steps(matrices(model), weights, start, 1e-4)
        np.testing.assert_allclose(variable(model.optimizer, "damping"), expected_damping, rtol=1e-6)
        rates.append(rate)
        parts_taken.append(part)
        momenta.append(momentum)
        weights = matrices(model)  # Rounding would add up over the steps.
    assert max(momenta) > 0.1 and min(rates) > 0
    assert damping != "adaptive" or len(set(factors)) > 1
    assert not factored or any(0 < part < 1 for part in factored)
    assert max(parts_taken) == 1 and (min(parts_taken) == 1) == (bound > 1)  # Some steps are cut, not all.


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"conjugate_steps": 1, "method": "kfac_corrected"}, {"learning_rate": 0.1}])
def test_adaptive_damping_knows_no_scale(options):
    """A loss multiplied by any number, at the same rate if one is given, trains alike."""
    results = []
    for scale in (1.0, 2.0**-20, 2.0**20):
        if "learning_rate" in options:
            options = {**options, "kl_clip": None}
        model = compiled(tanh_network(), KPSVD(seed=3, **options), loss_weights=[scale])
        start = matrices(model)
        for number in range(8):
            model.train_on_batch(*problem(seed=number))
        results.append(matrices(model))
    for other in results[1:]:
        assert_steps(other, results[0], start, 1e-3)
