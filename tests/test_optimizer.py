"""Steps of `KPSVD` against float64 NumPy oracles that know nothing of the package."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
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
