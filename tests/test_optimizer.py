"""Steps of `KPSVD` against float64 NumPy oracles that know nothing of the package."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature import corrected, step_control
from keras_kpsvd.curvature.approximations import METHODS, TWO_TERM_METHODS
from tests import reference
from tests.networks import assert_same, compiled, matrices, problem, state, tanh_network, variable

DAMPING = 2.0**-7
EVERY_STEP = {"curvature_interval": 1, "inverse_interval": 1, "factor_decay": 0.0}
# The step in its plainest form: one rate, no momentum, no bound, no draws.
PLAIN = {"learning_rate": 0.25, "momentum": 0.0, "damping": DAMPING, "kl_clip": None, "fisher": "exact"}


def _directions(weights, x, y, method="kfac", damping=DAMPING, rule="sqrt", indefinite="absolute"):
    gradients = reference.squared_error_gradients(weights, x, y)
    samples = reference.squared_error_samples(weights, x)
    dampings = damping if isinstance(damping, list) else [damping] * len(samples)
    steps = [
        reference.rule_solve(reference.method_terms(*sample, method), gradient, lam, rule, indefinite)
        for sample, gradient, lam in zip(samples, gradients, dampings, strict=True)
    ]
    return gradients, steps


def _corrected_directions(weights, x, y, dampings, enough, too_many):
    """The same with the diagonals that the blocks have in the eigenbases of their factors."""
    gradients = reference.squared_error_gradients(weights, x, y)
    samples = reference.squared_error_samples(weights, x)
    pairs = [reference.kfac_factors(*sample) for sample in samples]
    spectra = [[np.linalg.eigh(factor) for factor in pair] for pair in pairs]
    diagonals = [
        reference.diagonal_in_bases(reference.fisher(*sample), *(basis for _, basis in both))
        for sample, both in zip(samples, spectra, strict=True)
    ]
    free = sum(np.sum(one / (one + lam)) for one, lam in zip(diagonals, dampings, strict=True))
    factored = np.clip((free / y.size - enough) / (too_many - enough), 0, 1)
    steps = []
    for gradient, pair, both, diagonal, lam in zip(gradients, pairs, spectra, diagonals, dampings, strict=True):
        values, bases = zip(*both, strict=True)
        means = [np.trace(factor) / len(factor) for factor in pair]
        damped = reference.corrected_diagonal(diagonal, *values, *means, lam, factored)
        inverse = reference.matrix_of_diagonal(1 / damped, *bases)
        steps.append((inverse @ gradient.reshape(-1)).reshape(gradient.shape))
    return gradients, steps, factored


def _adaptive_dampings(damping, first, weights, x, lowest):
    """λ, at least `lowest √(q₀ q)` of the curvature that gradients see, then and now; that of each layer; and `q₀`.

    Less for a layer whose curvature is less than a hundredth of the mean.
    """
    factors = [reference.kfac_factors(*sample) for sample in reference.squared_error_samples(weights, x)]
    traces, sizes = np.array([np.trace(a) * np.trace(g) for a, g in factors]), np.array([w.size for w in weights])
    seen = sum(np.sum(a * a) * np.sum(g * g) for a, g in factors) / traces.sum()  # tr F² / tr F of the whole.
    first, mean = first or seen, traces.sum() / sizes.sum()
    damping = max(damping, lowest * np.sqrt(first * seen))
    return damping, [damping * part for part in np.minimum(1, 100 * traces / sizes / mean)], first


def _assert_close(actual, expected, start, tolerance):
    """Errors measured against the step, not against the weights."""
    for now, wanted, before in zip(actual, expected, start, strict=True):
        assert np.linalg.norm(now - wanted) <= tolerance * np.linalg.norm(wanted - before)


STEPS = [
    ("kfac", "sqrt", "absolute"),
    ("kfac", "factor", "absolute"),
    ("kpsvd", "sqrt", "absolute"),
    ("deflation", "sqrt", "reflect"),
    ("lanczos", "factor", "absolute"),
    ("kfac_corrected", "sqrt", "absolute"),
    ("kfac_corrected", "factor", "reflect"),
]


@pytest.mark.parametrize(("method", "rule", "indefinite"), STEPS)
def test_one_step_is_the_damped_solve_with_the_exact_fisher(method, rule, indefinite):
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(method=method, damping_rule=rule, indefinite=indefinite, **PLAIN))
    start = matrices(model)
    _, steps = _directions(start, x, y, method, rule=rule, indefinite=indefinite)
    model.train_on_batch(x, y)
    _assert_close(matrices(model), [w - 0.25 * d for w, d in zip(start, steps, strict=True)], start, 1e-6)


@pytest.mark.parametrize("method", TWO_TERM_METHODS)
def test_the_rules_for_indefinite_sums_differ_on_this_problem(method):
    """Otherwise the test above would not tell them apart. (The last layer's curvature is Kronecker-exact by any.)"""
    x, y = problem()
    start = matrices(tanh_network())
    one, other = (_directions(start, x, y, method, indefinite=rule)[1][0] for rule in ("absolute", "reflect"))
    assert np.linalg.norm(one - other) > 1e-3 * np.linalg.norm(one)


@pytest.mark.parametrize("learning_rate", [1.0, "adaptive"])
@pytest.mark.parametrize("method", METHODS)
def test_on_kronecker_exact_curvature_one_undamped_step_is_newtons(method, learning_rate):
    """One linear layer, squared error: `F = E[āāᵀ] ⊗ I·2/c` exactly; Newton's step ends at the least squares fit."""
    x, y = problem(rows=20, sizes=(4, 2))
    model = tanh_network((4, 2))
    compiled(model, KPSVD(**{**PLAIN, "learning_rate": learning_rate, "damping": 1e-12}, method=method))
    start = matrices(model)
    model.train_on_batch(x, y)
    best = np.linalg.lstsq(np.concatenate([x, np.ones((20, 1))], 1), y, rcond=None)[0]
    _assert_close(matrices(model), [best], start, 1e-5)


def test_a_loss_and_a_damping_multiplied_alike_leave_the_step_unchanged():
    x, y = problem()
    results = []
    for scale in (1.0, 8.0):
        model = compiled(tanh_network(), KPSVD(**{**PLAIN, "damping": DAMPING * scale}), loss_weights=[scale])
        start = matrices(model)
        model.train_on_batch(x, y)
        results.append(matrices(model))
    _assert_close(*results, start, 1e-6)


@pytest.mark.parametrize("form", ["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
def test_kl_bound_and_momentum_follow_their_formulas(form, kl_clip):
    momentum, nesterov = {"plain": (0.0, False), "momentum": (0.75, False), "nesterov": (0.75, True)}[form]
    options = {**PLAIN, "momentum": momentum, "nesterov": nesterov, "kl_clip": kl_clip}
    model = compiled(tanh_network(), KPSVD(method="kfac", **options, **EVERY_STEP))
    weights = matrices(model)
    velocity = [np.zeros_like(w) for w in weights]
    bounded = []
    for number in range(3):
        x, y = problem(seed=number)
        gradients, steps = _directions(weights, x, y)
        rate = 0.25
        if kl_clip is not None:
            quadratic = sum(np.sum(g * d) for g, d in zip(gradients, steps, strict=True))
            bounded.append(rate**2 * quadratic > kl_clip)
            rate *= min(1.0, np.sqrt(kl_clip / (rate**2 * quadratic)))
        start = weights
        velocity = [momentum * v - rate * d for v, d in zip(velocity, steps, strict=True)]
        moves = [momentum * v - rate * d for v, d in zip(velocity, steps, strict=True)] if nesterov else velocity
        weights = [w + m for w, m in zip(weights, moves, strict=True)]
        model.train_on_batch(x, y)
        _assert_close(matrices(model), weights, start, 1e-5)
    assert kl_clip is None or all(bounded)


@pytest.mark.parametrize(
    ("intervals", "refreshes", "inversions"),
    [
        ((2, 3), (0, 2, 4, 6), (0, 3, 6)),
        (("growing", 2), (0, 1, 2, 4), (0, 2, 4, 6)),
        ((1, "growing"), range(7), (0, 1, 2, 4)),
    ],
)
def test_factors_and_inverses_age_by_their_own_intervals(intervals, refreshes, inversions, monkeypatch):
    """KFAC's averages, with the bias correction, and preconditioners made of them only when due."""
    monkeypatch.setattr("keras_kpsvd.curvature.intervals.GROWTH", 2)
    every, inverse_every = intervals
    decay = 0.5
    options = {"curvature_interval": every, "inverse_interval": inverse_every, "factor_decay": decay}
    model = compiled(tanh_network(), KPSVD(method="kfac", **PLAIN, **options))
    weights = matrices(model)
    sums, total, used = None, 0.0, None
    for number in range(7):
        x, y = problem(seed=number)
        if number in refreshes:
            new = [reference.kfac_factors(*sample) for sample in reference.squared_error_samples(weights, x)]
            old = sums or [(0, 0)] * len(new)
            sums = [(decay * a + c, decay * g + d) for (a, g), (c, d) in zip(old, new, strict=True)]
            total = decay * total + 1
        if number in inversions:
            used = [(a / total, g / total) for a, g in sums]
        gradients = reference.squared_error_gradients(weights, x, y)
        start = weights
        weights = [
            w - 0.25 * reference.rule_solve([pair], gradient, DAMPING)
            for w, pair, gradient in zip(weights, used, gradients, strict=True)
        ]
        model.train_on_batch(x, y)
        _assert_close(matrices(model), weights, start, 1e-5)


@pytest.mark.parametrize(
    ("intervals", "refreshes", "inversions"),
    [((1, 3), range(7), (0, 3, 6)), ((3, 2), (0, 3, 6), (0, 3, 6)), ((2, 5), (0, 2, 4, 6), (0, 6))],
)
def test_corrected_eigenvalues_age_with_the_factors_and_their_bases_with_the_inverses(intervals, refreshes, inversions):
    """Bases turn with the first refresh at which an inverse is due; the diagonal is averaged in those there are."""
    decay = 0.5
    options = dict(zip(("curvature_interval", "inverse_interval"), intervals, strict=True), factor_decay=decay)
    model = compiled(
        tanh_network(), KPSVD(method="kfac", eigenvalues="corrected", **{**PLAIN, "learning_rate": 0.05}, **options)
    )
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
        _assert_close(matrices(model), weights, start, 1e-4)
        weights = matrices(model)  # Rounding would add up over the steps.


@pytest.mark.parametrize("options", [PLAIN, {}])
def test_of_a_short_last_batch_the_usual_one_says_how_much_is_known(options, monkeypatch):
    told = []
    monkeypatch.setattr(
        "keras_kpsvd.curvature.state.factored_part", lambda free, numbers: told.append(float(numbers)) or tf.zeros([])
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
        "keras_kpsvd.curvature.state.factored_part", lambda free, numbers: told.append(float(numbers)) or tf.zeros([])
    )
    model = compiled(tanh_network(), KPSVD(gradient_accumulation_steps=4), run_eagerly=True)
    model.optimizer.build(model.trainable_variables)
    for seed in range(4):
        model.train_on_batch(*problem(rows=6, seed=seed))
    assert told == [4 * 6 * 2]


@pytest.mark.parametrize(
    ("eigenvalues", "damping", "bound"),
    [
        ("kronecker", "adaptive", 1e9),
        ("kronecker", "adaptive", 0.5),
        ("kronecker", DAMPING, 1e9),
        ("kronecker", DAMPING, 0.6),
        (None, "adaptive", 1e9),
        (None, "adaptive", 0.5),
        ("corrected", DAMPING, 0.6),
    ],
)
def test_adaptive_steps_minimise_the_quadratic_model_and_damping_follows_the_slopes(
    eigenvalues, damping, bound, monkeypatch
):
    monkeypatch.setattr(step_control, "MAX_RELATIVE_CHANGE", bound)
    enough, too_many = 0.5, 2.0  # Of 23 weights and 12 numbers.
    monkeypatch.setattr(corrected, "ENOUGH", enough)
    monkeypatch.setattr(corrected, "TOO_MANY", too_many)
    options = {"damping": damping, "eigenvalues": eigenvalues, "conjugate_steps": 1, **EVERY_STEP}
    model = compiled(tanh_network(), KPSVD(fisher="exact", **options))
    lowest = 2e-3 if eigenvalues == "kronecker" else 6e-4
    weights = matrices(model)
    step = np.zeros(sum(w.size for w in weights))
    expected_damping, slope, averages = 0.0 if damping == "adaptive" else damping, np.zeros(2), np.zeros(2)
    first, rates, momenta, factors, parts_taken, factored = 0.0, [], [], [], [], []
    for number in range(10):
        x, y = problem(rows=6, seed=0 if number < 4 else number % 3)
        dampings = [expected_damping] * len(weights)
        if damping == "adaptive":
            expected_damping, dampings, first = _adaptive_dampings(expected_damping, first, weights, x, lowest)
        if eigenvalues == "kronecker":
            gradients, directions = _directions(weights, x, y, damping=dampings)
        else:
            gradients, directions, part = _corrected_directions(weights, x, y, dampings, enough, too_many)
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
        _assert_close(matrices(model), weights, start, 1e-4)
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
        _assert_close(other, results[0], start, 1e-3)


def test_the_step_does_not_depend_on_how_it_is_run():
    """Eagerly, in graphs, several in one execution: the same numbers."""
    x, y = problem(rows=24, dtype="float32")
    results = []
    for options in ({"run_eagerly": True}, {"run_eagerly": False}, {"run_eagerly": False, "steps_per_execution": 3}):
        model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", seed=5), **options)
        start = matrices(model)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        results.append(matrices(model))
        assert variable(model.optimizer, "updates") == 6
    for other in results[1:]:
        _assert_close(other, results[0], start, 1e-3)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1, "clipnorm": 0.5}, {"use_ema": True}])
def test_variables_without_curvature_train_as_by_sgd_bit_for_bit(options):
    """The same gradients for both optimizers, in a model where instrumented layers step beside them."""
    results = []
    for kind in (KPSVD, keras.optimizers.SGD):
        keras.utils.set_random_seed(1)
        plain = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
        model = keras.Sequential([keras.Input((4,)), *plain, KPSVDDense(2)])
        optimizer = kind(learning_rate=0.05, momentum=0.9, **options)
        variables = model.trainable_variables
        for number in range(4):
            rng = np.random.default_rng(number)
            optimizer.apply([tf.constant(rng.normal(size=v.shape), "float32") for v in variables], variables)
        results.append([v.numpy() for layer in plain for v in layer.trainable_variables])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_without_instrumented_layers_trains_as_by_sgd_bit_for_bit():
    x, y = problem(rows=24, dtype="float32")
    results = []
    for optimizer in (KPSVD(learning_rate=0.05), keras.optimizers.SGD(0.05, momentum=0.9)):
        model = tanh_network(dtype="float32", layer=keras.layers.Dense)
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        results.append(matrices(model))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_step_of_a_compiled_fit_has_curvature():
    x, y = problem()
    model = tanh_network()
    model.compile(KPSVD(method="kfac", **PLAIN), "mse")
    start = matrices(model)
    _, steps = _directions(start, x, y)
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    _assert_close(matrices(model), [w - 0.25 * d for w, d in zip(start, steps, strict=True)], start, 1e-6)


@pytest.mark.parametrize("learning_rate", ["adaptive", 0.25])
def test_the_first_eager_step_is_a_plain_gradient_step(learning_rate):
    x, y = problem()
    model = tanh_network()
    model.compile(KPSVD(method="kfac", **{**PLAIN, "learning_rate": learning_rate}), "mse", run_eagerly=True)
    start = matrices(model)
    model.train_on_batch(x, y)
    rate = 0.01 if learning_rate == "adaptive" else learning_rate
    gradients = reference.squared_error_gradients(start, x, y)
    _assert_close(matrices(model), [w - rate * g for w, g in zip(start, gradients, strict=True)], start, 1e-6)


def test_a_learning_rate_schedule_is_followed():
    x, y = problem()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 0.125])
    model = compiled(tanh_network(), KPSVD(method="kfac", **{**PLAIN, "learning_rate": schedule}, **EVERY_STEP))
    for rate in (0.5, 0.125):
        start = matrices(model)
        _, steps = _directions(start, x, y)
        model.train_on_batch(x, y)
        _assert_close(matrices(model), [w - rate * d for w, d in zip(start, steps, strict=True)], start, 1e-6)


def test_accumulated_gradients_are_stepped_with_as_one_gradient():
    """Curvature is that of the last part, the gradient the mean of both."""
    x, y = problem(rows=12)
    model = compiled(tanh_network(), KPSVD(method="kfac", **PLAIN, gradient_accumulation_steps=2))
    start = matrices(model)
    gradients = reference.squared_error_gradients(start, x, y)
    samples = reference.squared_error_samples(start, x[6:])
    expected = [
        w - 0.25 * reference.rule_solve(reference.method_terms(*sample, "kfac"), gradient, DAMPING)
        for w, sample, gradient in zip(start, samples, gradients, strict=True)
    ]
    model.train_on_batch(x[:6], y[:6])
    for one, other in zip(matrices(model), start, strict=True):
        np.testing.assert_array_equal(one, other)
    model.train_on_batch(x[6:], y[6:])
    _assert_close(matrices(model), expected, start, 1e-6)


def test_decoupled_weight_decay_is_kerass():
    """`W ← W − rate·decay·W` before the step."""
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(method="kfac", **PLAIN, weight_decay=0.125))
    start = matrices(model)
    _, steps = _directions(start, x, y)
    model.train_on_batch(x, y)
    _assert_close(
        matrices(model), [(1 - 0.25 * 0.125) * w - 0.25 * d for w, d in zip(start, steps, strict=True)], start, 1e-6
    )


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    x, y = problem(dtype="float32")
    states = []
    for seed in (1, 1, 2):
        model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", seed=seed))
        for _ in range(2):
            model.train_on_batch(x, y)
        states.append(state(model))
    assert_same(states[0], states[1])
    assert any(not np.array_equal(states[0][name], states[2][name]) for name in states[0])


def test_layers_without_curvature_are_named_once_when_the_optimizer_is_built():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            KPSVDDense(3, name="curved"),
            keras.layers.LayerNormalization(name="normalised"),
            keras.layers.Dense(2, name="plain"),
        ],
        name="network",
    )
    model.compile(KPSVD(), "mse")
    with pytest.warns(UserWarning, match="without curvature: network/normalised, network/plain") as caught:
        model.fit(*problem(sizes=(4, 2), dtype="float32"), epochs=2, verbose=0)
    told = [str(one.message) for one in caught if "SGD with momentum" in str(one.message)]
    assert len(told) == 1 and "curved" not in told[0]
    assert "keras_kpsvd.instrument(model)" in told[0]


def test_layers_that_nothing_can_give_curvature_are_named_without_advice():
    layers = [KPSVDDense(3), keras.layers.LayerNormalization(name="normalised")]
    model = keras.Sequential([keras.Input((4,)), *layers], name="network")
    with pytest.warns(UserWarning, match="without curvature: network/normalised[.]$"):
        KPSVD().build(model.trainable_variables)


def test_a_model_that_nobody_instrumented_is_told_how():
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4, name=f"layer{n}") for n in range(14))])
    with pytest.warns(UserWarning, match="no instrumented layer") as caught:
        KPSVD().build(model.trainable_variables)
    message = str(caught[0].message)
    assert "layer11 and 2 more" in message and "keras_kpsvd.instrument(model)" in message


def test_a_model_of_instrumented_layers_is_told_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KPSVD().build(tanh_network().trainable_variables)
