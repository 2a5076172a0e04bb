"""The first step is traced once, and cheaply: nothing goes into the trace that TensorFlow throws away."""

import functools
import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense, tracing
from keras_kpsvd.curvature import inverses, natural_gradient
from keras_kpsvd.tracing import ThrownAwayTrace, outside_the_trace, uncollected

WIDTHS = (12, 7, 5, 9, 3, 150, 4, 140, 160, 2)


def _model(optimizer, widths=(8, 2), **compiled):
    keras.utils.set_random_seed(0)
    layers = [KPSVDDense(width, activation="tanh") for width in widths[:-1]]
    model = keras.Sequential([keras.Input((6,)), *layers, KPSVDDense(widths[-1], dtype="float32")])
    model.compile(optimizer, "mse", **compiled)
    return model


def _data(rows=64, width=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 6)).astype("float32")
    return x, np.tanh(x[:, :width])


@pytest.fixture
def proposals(monkeypatch):
    """How often the computation of a step was traced."""
    calls, sound = [], natural_gradient.NaturalGradient.propose

    def counted(self, *arguments, **options):
        calls.append(1)
        return sound(self, *arguments, **options)

    monkeypatch.setattr(natural_gradient.NaturalGradient, "propose", counted)
    return calls


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, {}),
        ({}, {"metrics": ["mae"]}),
        ({"learning_rate": 0.1, "momentum": 0.0, "damping": 0.1}, {}),
        ({"use_ema": True, "weight_decay": 0.01}, {"steps_per_execution": 2}),
    ],
)
def test_a_step_is_traced_once_and_its_first_run_has_curvature(proposals, options, compiled):
    model = _model(KPSVD(seed=0, **options), **compiled)
    model.fit(*_data(), batch_size=32, verbose=0)
    assert len(proposals) == 1
    refreshes = [v.numpy() for v in model.optimizer.variables if v.path.endswith("_refreshes") and v.shape == ()]
    assert refreshes == [2, 2]  # One in each of the two steps.


def test_wrapped_for_float16_too(proposals):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _model(KPSVD(seed=0))
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.fit(*_data(), batch_size=64, verbose=0)
    assert len(proposals) == 1


def test_a_model_that_was_trained_before_is_traced_once_as_well(proposals, tmp_path):
    model = _model(KPSVD(seed=0))
    model.fit(*_data(), batch_size=64, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    del proposals[:]
    loaded.fit(*_data(), batch_size=64, verbose=0)
    assert len(proposals) == 1
    for one in (model, loaded):
        assert int(one.optimizer.iterations) == 1 + (one is loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "eigenvalues"),
    [("kfac", "kronecker"), ("kfac", "corrected"), ("kpsvd", "corrected"), ("kfac_corrected", "kronecker")],
)
def test_layers_of_all_sizes_share_their_decompositions(method, eigenvalues):
    """One graph for refreshes, one for inversions of each pair of whole and truncated factors, traced once each.

    Besides two in which factors are unpacked and packed, and one that probes inverses of either kind. With corrected
    eigenvalues one for refreshes of each pair too, one that counts their directions, and of either kind of factor one
    that finds eigenvectors and one that probes them.
    """
    made, original = [], tracing.graph_function.__wrapped__

    def kept(*arguments):
        made.append(original(*arguments))
        return made[-1]

    cached = functools.cache(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "graph_function", cached)
        model = _model(KPSVD(method=method, eigenvalues=eigenvalues, seed=0), WIDTHS)
        model.fit(*_data(), batch_size=64, verbose=0)
    shapes = zip((6, *WIDTHS[:-1]), WIDTHS, strict=True)
    kinds = {(d_in + 1 > 2 * inverses.RANK, d_out > 2 * inverses.RANK) for d_in, d_out in shapes}
    assert len(kinds) == 4
    assert len(made) == (3 * len(kinds) + 6 if eigenvalues == "corrected" else len(kinds) + 5)
    assert [one.experimental_get_tracing_count() for one in made] == [1] * len(made)


@pytest.mark.parametrize(("eigenvalues", "graphs"), [("kronecker", 5), ("corrected", 7)])
def test_convolutions_of_equal_sizes_share_theirs(eigenvalues, graphs):
    """Of samples summed over positions sizes decide on the way: a graph for each size, whatever tensors' names.

    One for refreshes, and two in which factors are unpacked and packed; one for inversions, and one that probes them.
    With corrected eigenvalues one that finds eigenvectors and one that probes them, and one that counts directions.
    """
    made, original = [], tracing.graph_function.__wrapped__

    def kept(*arguments):
        made.append(original(*arguments))
        return made[-1]

    keras.utils.set_random_seed(0)
    convolutions = [KPSVDConv2D(3, 3, padding="same", activation="tanh") for _ in range(4)]
    model = keras.Sequential([keras.Input((6, 6, 3)), *convolutions])
    model.compile(KPSVD(method="kpsvd", eigenvalues=eigenvalues, seed=0), "mse")
    x = np.random.default_rng(0).standard_normal((8, 6, 6, 3)).astype("float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "graph_function", functools.cache(kept))
        model.fit(x, x, batch_size=8, verbose=0)
    assert len(made) == graphs


def test_a_trace_knows_itself_and_its_branches_and_nothing_else():
    found = {}

    @tf.function(autograph=False)
    def first():
        trace = ThrownAwayTrace()
        found["trace"], found["inside"] = trace, trace.is_being_made()

        def branch():
            found["branch"] = trace.is_being_made()
            return tf.constant(0)

        tf.cond(tf.random.uniform([]) < 2, branch, lambda: tf.constant(0))

        @tf.function(autograph=False)
        def nested():
            found["nested"] = trace.is_being_made()

        nested()
        return tf.constant(0)

    first()
    assert found["inside"] and found["branch"] and found["nested"]
    assert not found["trace"].is_being_made()

    @tf.function(autograph=False)
    def second():
        found["second"] = found["trace"].is_being_made()
        return tf.constant(0)

    second()
    assert not found["second"]
    assert not ThrownAwayTrace().is_being_made()


def test_variables_made_outside_the_trace_are_there_at_once_and_it_is_thrown_away_all_the_same():
    found, values, thrown_away = {}, [], []

    @tf.function(autograph=False)
    def step():
        if not found:
            with outside_the_trace():
                found["variable"] = tf.Variable(1.0)
                values.append(found["variable"].numpy())
            found["trace"] = ThrownAwayTrace()
        thrown_away.append(found["trace"].is_being_made())
        return found["variable"] + 1.0

    assert float(step()) == 2.0 and values == [1.0]
    assert thrown_away == [True, False]


def test_with_a_strategy_variables_stay_where_replicas_make_them():
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():

        @tf.function
        def step():
            with outside_the_trace():
                return tf.constant(tf.executing_eagerly())

        assert not step()


def test_nothing_is_collected_while_a_step_is_traced():
    def seen():
        with uncollected():
            return gc.isenabled()

    assert tf.function(seen, autograph=False)().numpy() == 0 and gc.isenabled()
    assert seen() and gc.isenabled()  # eagerly

    def failing():
        with uncollected():
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        tf.function(failing, autograph=False)()
    assert gc.isenabled()
    gc.disable()
    try:
        tf.function(seen, autograph=False)()
        assert not gc.isenabled()  # whoever has switched it off keeps it so
    finally:
        gc.enable()
