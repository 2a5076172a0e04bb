"""What `KPSVD` does with NaN, with decompositions that fail, and with layers that carry no information."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature import corrected, inverses
from keras_kpsvd.curvature import state as state_module
from keras_kpsvd.curvature.approximations import METHODS
from keras_kpsvd.linalg import gram
from keras_kpsvd.tracing import graph_function
from tests import reference
from tests.networks import assert_same, assert_told_once, compiled, matrices, problem, state, tanh_network, variable

PLAIN = {"learning_rate": 0.25, "momentum": 0.0, "damping": 2.0**-7, "kl_clip": None, "fisher": "exact"}
EVERY_STEP = {"curvature_interval": 1, "inverse_interval": 1}


def _spoilt(x, value):
    spoilt = x.copy()
    spoilt[1, 2] = value
    return spoilt


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("eager", "options"),
    [
        (True, {"weight_decay": 0.1}),
        (True, {**PLAIN, "weight_decay": 0.1, "momentum": 0.5, "clipnorm": 1.0}),
        (False, {**PLAIN, "weight_decay": 0.1}),
    ],
)
def test_a_batch_that_is_not_finite_is_skipped_whole_and_the_next_one_trains(eager, options, value):
    x, y = problem(dtype="float32")
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **options, **EVERY_STEP), run_eagerly=eager)
    model.train_on_batch(x, y)
    before = state(model)
    with pytest.warns(RuntimeWarning, match="skipped a step") as told:
        model.train_on_batch(_spoilt(x, value), y)
    assert_told_once(told)
    assert_same(state(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.train_on_batch(x, y)
    after = state(model)
    assert all(np.isfinite(values).all() for values in after.values())
    assert all(not np.array_equal(after[name], before[name]) for name in after if name.endswith(("kernel", "bias")))


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_target_that_is_not_finite_is_skipped_too(value, eager):
    """Activations and sampled gradients are finite here, the loss is not."""
    x, y = problem(dtype="float32")
    model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", **EVERY_STEP), run_eagerly=eager)
    before = state(model)
    with pytest.warns(RuntimeWarning, match="skipped a step") as told:
        model.train_on_batch(x, np.where(y == y[0, 0], value, y).astype("float32"))
    assert_told_once(told)
    assert_same(state(model), before)


def test_nan_in_one_part_of_an_accumulated_batch_skips_that_step_only():
    x, y = problem(dtype="float32")
    optimizer = KPSVD(method="kfac", **PLAIN, **EVERY_STEP, gradient_accumulation_steps=2)
    model = compiled(tanh_network(dtype="float32"), optimizer)
    start = matrices(model)
    model.train_on_batch(_spoilt(x, np.nan), y)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.train_on_batch(x, y)
    for one, other in zip(matrices(model), start, strict=True):
        np.testing.assert_array_equal(one, other)
    for _ in range(2):
        model.train_on_batch(x, y)
    for one, other in zip(matrices(model), start, strict=True):
        assert np.isfinite(one).all() and not np.array_equal(one, other)


def test_a_model_without_instrumented_layers_skips_nan_in_its_default_graph():
    x, y = problem(dtype="float32")
    model = tanh_network(dtype="float32", layer=keras.layers.Dense)
    model.compile(KPSVD(), "mse")
    model.train_on_batch(x, y)
    before = state(model)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.train_on_batch(_spoilt(x, np.nan), y)
    assert_same(state(model), before)


def _raising(*results):
    """Fails when it runs, not when it is traced. (In a graph no kernel can: see `linalg.decompositions`.)"""
    with tf.control_dependencies([tf.debugging.assert_less(tf.random.uniform([]), 0.0)]):
        return [tf.identity(result) for result in results]


FAILURES = {
    "raises": _raising,
    "nan": lambda *results: [tf.fill(tf.shape(result), tf.constant(np.nan, result.dtype)) for result in results],
    "rubbish": lambda *results: [tf.sin(1e3 * result) + 0.5 for result in results],
}


def _failing(failure, condition, results):
    """`results` where they run as they should: layers share what is traced."""
    flat = tf.nest.flatten(results)
    flat = tf.cond(condition, lambda: failure(*flat), lambda: [tf.identity(result) for result in flat])
    return tf.nest.pack_sequence_as(results, flat)


@pytest.fixture
def break_decomposition(monkeypatch):
    """Makes the decomposition of the layers of a given shape fail from now on."""
    sound = {name: getattr(inverses, name) for name in ("invert_one_term", "one_term_and_correction")}

    def start(failure, d_in):
        graph_function.cache_clear()
        if failure == "eigh raises":
            decompose = tf.linalg.eigh

            def refuse(matrix):
                if len(matrix) == 3:  # Its other side: refreshes, too, have matrices of five rows.
                    raise tf.errors.InvalidArgumentError(None, None, "did not converge")
                return decompose(matrix)

            monkeypatch.setattr(tf.linalg, "eigh", refuse)
            return

        def wrapped(name):
            def function(a, *rest):
                return _failing(FAILURES[failure], tf.shape(a)[0] == d_in, sound[name](a, *rest))

            return function

        for name in sound:
            monkeypatch.setattr(inverses, name, wrapped(name))

    yield start
    graph_function.cache_clear()


def _preconditioner(model, name):
    block = next(block for block in model.optimizer._blocks if block.layer.name == name)
    return [variable.numpy() for variable in block.preconditioner]


@pytest.mark.parametrize(
    ("failure", "method", "eager"),
    [
        *((failure, "kfac", eager) for failure in ("nan", "rubbish") for eager in (True, False)),
        ("raises", "kfac", True),
        ("eigh raises", "kfac_corrected", True),
        pytest.param("eigh raises", "kfac_corrected", False, marks=pytest.mark.slow),
        *(pytest.param("rubbish", "kfac_corrected", eager, marks=pytest.mark.slow) for eager in (True, False)),
        pytest.param("eigh raises", "lanczos", False, marks=pytest.mark.slow),
    ],
)
def test_a_failed_decomposition_keeps_the_last_good_preconditioner_of_its_layer(
    break_decomposition, failure, method, eager
):
    x, y = problem()
    model = compiled(tanh_network(), KPSVD(method=method, **PLAIN, **EVERY_STEP), run_eagerly=eager)
    model.train_on_batch(x, y)
    good, others = _preconditioner(model, "dense0"), _preconditioner(model, "out")
    break_decomposition(failure, d_in=5)
    model.make_train_function(force=True)
    start = matrices(model)
    x, y = problem(seed=1)
    with pytest.warns(RuntimeWarning, match="'dense0': its decomposition failed") as told:
        model.train_on_batch(x, y)
    assert_told_once(told)
    for one, other in zip(_preconditioner(model, "dense0"), good, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(_preconditioner(model, "out")[0], others[0])
    if method == "kfac":
        gradient = reference.squared_error_gradients(start, x, y)[0]
        np.testing.assert_allclose(matrices(model)[0], start[0] - 0.25 * good[0] @ gradient @ good[1], rtol=1e-6)


@pytest.mark.parametrize(("failure", "eager"), [("raises", True), ("nan", True), ("nan", False), ("rubbish", False)])
def test_a_layer_without_a_good_preconditioner_takes_a_plain_gradient_step(break_decomposition, failure, eager):
    x, y = problem()
    break_decomposition(failure, d_in=5)
    model = compiled(tanh_network(), KPSVD(method="kfac", **PLAIN), run_eagerly=eager)
    start = matrices(model)
    with pytest.warns(RuntimeWarning, match="'dense0': its decomposition failed") as told:
        model.train_on_batch(x, y)
    assert_told_once(told)
    gradients = reference.squared_error_gradients(start, x, y)
    terms = reference.method_terms(*reference.squared_error_samples(start, x)[1], "kfac")
    steps = [gradients[0], reference.damped_solve(terms, gradients[1], PLAIN["damping"])]
    for now, before, step in zip(matrices(model), start, steps, strict=True):
        np.testing.assert_allclose(now, before - 0.25 * step, rtol=1e-6)


@pytest.fixture
def break_bases(monkeypatch):
    """Makes the eigenvectors of factors of five rows fail from now on."""
    sound = corrected.factor_eigenbasis

    def start(failure):
        graph_function.cache_clear()
        if failure == "eigh raises":
            decompose = tf.linalg.eigh

            def refuse(matrix):
                if len(matrix) == 5:
                    raise tf.errors.InvalidArgumentError(None, None, "did not converge")
                return decompose(matrix)

            monkeypatch.setattr(tf.linalg, "eigh", refuse)
            return
        monkeypatch.setattr(
            corrected,
            "factor_eigenbasis",
            lambda matrix, basis: _failing(FAILURES[failure], tf.shape(matrix)[0] == 5, sound(matrix, basis)),
        )

    yield start
    graph_function.cache_clear()


BROKEN_BASES = [("nan", True), ("nan", False), ("rubbish", False), ("eigh raises", True), ("eigh raises", False)]


@pytest.mark.parametrize(("failure", "eager"), BROKEN_BASES)
def test_eigenvectors_that_fail_leave_a_layers_curvature_as_it_was(break_bases, failure, eager):
    model = compiled(tanh_network(), KPSVD(eigenvalues="corrected", **PLAIN, **EVERY_STEP), run_eagerly=eager)
    model.train_on_batch(*problem())
    blocks = {block.layer.name: block for block in model.optimizer._blocks}
    names = ("dense0", "out")
    good, others = ([v.numpy() for v in blocks[n].refresh_targets + blocks[n].preconditioner] for n in names)
    break_bases(failure)
    model.make_train_function(force=True)
    start, (x, y) = matrices(model), problem(seed=1)
    direction = blocks["dense0"].blocks[0].precondition
    expected = direction(tf.constant(reference.squared_error_gradients(start, x, y)[0])).numpy()
    with pytest.warns(RuntimeWarning, match="'dense0': its new curvature is not finite, or wrong") as told:
        model.train_on_batch(x, y)
    assert_told_once(told)
    now, moved = ([v.numpy() for v in blocks[n].refresh_targets + blocks[n].preconditioner] for n in names)
    for one, other in zip(now, good, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(moved[0], others[0])
    np.testing.assert_allclose(matrices(model)[0], start[0] - 0.25 * expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("failure", "eager"), BROKEN_BASES)
def test_without_eigenvectors_a_layer_takes_a_plain_gradient_step(break_bases, failure, eager):
    x, y = problem()
    break_bases(failure)
    model = compiled(tanh_network(), KPSVD(eigenvalues="corrected", **PLAIN), run_eagerly=eager)
    start = matrices(model)
    with pytest.warns(RuntimeWarning, match="'dense0': its new curvature"):
        model.train_on_batch(x, y)
    gradients = reference.squared_error_gradients(start, x, y)
    np.testing.assert_allclose(matrices(model)[0], start[0] - 0.25 * gradients[0], rtol=1e-6)
    assert np.linalg.norm(matrices(model)[1] - start[1] + 0.25 * gradients[1]) > 1e-3


@pytest.fixture
def break_refreshes(monkeypatch):
    """Makes refreshes of layers of five inputs fail from now on: their result or, for "rubbish", their `eigh`."""
    sound, decompose = state_module._batch_terms, gram.eigh

    def start(failure):
        hidden = tf.constant(False)

        def broken(method, batch, old, count):
            nonlocal hidden
            hidden = tf.shape(batch.activations)[-1] == 5
            terms, good = sound(method, batch, old, count)
            return terms if failure == "rubbish" else _failing(FAILURES[failure], hidden, terms), good

        monkeypatch.setattr(state_module, "_batch_terms", broken)
        if failure == "rubbish":
            monkeypatch.setattr(gram, "eigh", lambda matrix: _failing(FAILURES[failure], hidden, decompose(matrix)))
        graph_function.cache_clear()

    yield start
    graph_function.cache_clear()


@pytest.mark.parametrize(
    ("failure", "method", "eager"),
    [
        ("raises", "kfac", True),
        *(("nan", "kfac", eager) for eager in (True, False)),
        *(
            pytest.param(failure, method, eager, marks=pytest.mark.slow)
            for failure in ("nan", "rubbish")
            for method in ("kpsvd", "kfac_corrected")
            for eager in (True, False)
        ),
    ],
)
def test_curvature_that_cannot_be_computed_leaves_that_layers_averages_as_they_were(
    break_refreshes, failure, method, eager
):
    """Without triples, as of "kfac", nothing is decomposed that could be finite and wrong."""
    x, y = problem(dtype="float32")
    options = {"method": method, **PLAIN, **EVERY_STEP}
    model = compiled(tanh_network(dtype="float32"), KPSVD(**options), run_eagerly=eager)
    model.train_on_batch(x, y)
    before = state(model)
    break_refreshes(failure)
    model.make_train_function(force=True)
    with pytest.warns(RuntimeWarning, match="'dense0': its new curvature is not finite, or wrong") as told:
        model.train_on_batch(*problem(seed=1, dtype="float32"))
    assert_told_once(told)
    after = state(model)
    two_term = method == "kfac_corrected"
    kept = [name for name in before if "dense0" in name and name.endswith(("_A", "_G", "_P", "_Q", "_refreshes"))]
    # The last layer's G is a constant for squared error.
    moved = [name for name in before if "out" in name and name.endswith(("_A", "_P", "_refreshes"))]
    assert (len(kept), len(moved)) == ((5, 3) if two_term else (3, 2))
    assert all(np.array_equal(before[name], after[name]) for name in kept)
    assert all(not np.array_equal(before[name], after[name]) for name in moved)
    assert all(np.isfinite(values).all() for values in after.values())


@pytest.mark.parametrize("method", ["kfac", "kpsvd", "kfac_corrected"])
def test_layers_without_information_leave_every_weight_finite(method):
    """One output unit, a batch of one, a perfect fit, then a dead ReLU layer; nothing needs a warning."""
    keras.utils.set_random_seed(0)
    hidden = KPSVDDense(3, activation="relu")
    model = keras.Sequential([keras.Input((4,)), hidden, KPSVDDense(1)])
    compiled(model, KPSVD(method=method, **EVERY_STEP))
    x, y = problem(sizes=(4, 1), dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.train_on_batch(x, y)
        model.train_on_batch(x[:1], y[:1])
        model.train_on_batch(x, model.predict_on_batch(x))
        hidden.bias.assign([-100.0, -100.0, -100.0])
        loss = [model.train_on_batch(x, y) for _ in range(4)]
    assert all(np.isfinite(values).all() for values in state(model).values())
    assert loss[-1] < loss[0]  # The output's bias still learns.


@pytest.mark.parametrize("method", ["kfac", "lanczos"])
def test_a_network_dead_from_the_start_is_finite(method):
    """Zero factors from the first refresh on."""
    model = tanh_network(dtype="float32")
    for layer in model.layers:
        layer.activation = keras.activations.relu
        layer.bias.assign(np.full(layer.units, -100.0))
    compiled(model, KPSVD(method=method, fisher="empirical", **EVERY_STEP))
    before = matrices(model)
    x, y = problem(dtype="float32")
    for _ in range(2):
        model.train_on_batch(x, y)
    for one, other in zip(matrices(model), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_refreshes_run(method):
    x, y = problem(dtype="float32")
    options = {"learning_rate": 0.1, "damping": 1e-2, "kl_clip": 0.1}
    model = tanh_network(dtype="float32")
    model.compile(KPSVD(method=method, seed=0, **options, **EVERY_STEP), "mse")
    before = np.mean((reference.forward(matrices(model), x)[1] - y) ** 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.fit(np.tile(x, (100, 1)), np.tile(y, (100, 1)), batch_size=len(x), shuffle=False, verbose=0)
    after = np.mean((reference.forward(matrices(model), x)[1] - y) ** 2)
    assert after < 0.1 * before
    counts = [v.numpy() for v in model.optimizer.variables if v.name.endswith("_refreshes")]
    assert counts == [100, 100]
    assert variable(model.optimizer, "updates") == 100


def test_an_error_in_the_forward_pass_does_not_poison_the_next_step():
    """The abandoned pass is closed by the next one, whose step is the one it would have been."""
    results = []
    for fails in (False, True):
        x, y = problem(dtype="float32")
        model = compiled(tanh_network(dtype="float32"), KPSVD(method="kfac", seed=1))
        if fails:
            with pytest.raises(ValueError), tf.GradientTape():
                model(2 * x, training=True)
                raise ValueError("in the user's loss")
        model.train_on_batch(x, y)
        results.append(state(model))
    assert_same(*results)
