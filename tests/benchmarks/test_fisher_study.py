"""The study of the Fisher blocks: its numbers against dense oracles, and that it leaves training alone."""

import csv
import json
import math
import random
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDConv2D, KPSVDDense, fisher_errors
from keras_kpsvd.curvature.approximations import METHODS
from keras_kpsvd.curvature.samples import block_samples
from tests import reference

ROOT = Path(__file__).parents[2]
TERMS = {"kpsvd": 1, "deflation": 2, "lanczos": 2}


def _convolutional():
    """A grouped convolution (blocks of 10 × 2), a dense layer of 17 × 5, and one of 6 × 3; dropout and moving means."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            KPSVDConv2D(4, 3, strides=2, groups=2, activation="tanh", name="conv"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.25),
            KPSVDDense(5, activation="relu", name="hidden"),
            KPSVDDense(3, activation="softmax", name="last"),
        ]
    )
    _compile(model, "kfac")
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(40, 5, 5, 2)).astype("float32"), rng.integers(0, 3, 40)


def _compile(model, method):
    optimizer = KPSVD(method=method, curvature_interval=2, inverse_interval=3)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")


@pytest.fixture(scope="module")
def measured():
    """Model, inputs and rows of one epoch of training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import fisher_study

        model, x, y = _convolutional()
        model.fit(x, y, batch_size=8, verbose=0)
        return model, x, fisher_study.measure(model, x, 1, seed=3)


def _blocks(model, x):
    """`{name: (activations, gradients)}` of the same samples."""
    named = {}
    for name, blocks in block_samples(model, x, None, 3, fisher="sampled", likelihood="auto").items():
        for index, (activations, gradients) in enumerate(blocks):
            key = name if len(blocks) == 1 else f"{name}/block_{index}"
            named[key] = activations.numpy(), gradients.numpy()
    return named


def test_errors_and_singular_values_are_those_of_dense_oracles(measured):
    model, x, rows = measured
    blocks = _blocks(model, x)
    assert [row["layer"] for row in rows] == list(blocks) == ["conv/block_0", "conv/block_1", "hidden", "last"]
    for row, (activations, gradients) in zip(rows, blocks.values(), strict=True):
        d_in, d_out = activations.shape[-1], gradients.shape[-1]
        assert (row["epoch"], row["d_in"], row["d_out"]) == (1, d_in, d_out)
        fisher = reference.fisher(activations, gradients)
        norm, spectrum = np.linalg.norm(fisher), np.linalg.eigvalsh(fisher)
        values = np.linalg.svd(reference.rearrange(fisher, d_in, d_out), compute_uv=False)
        np.testing.assert_allclose(row["singular_values"], values[:20], rtol=1e-6, atol=1e-7 * values[0])
        assert len(row["singular_values"]) == min(20, d_in**2, d_out**2)
        assert row["share_of_two"] == pytest.approx(np.sum(values[:2] ** 2) / norm**2, rel=1e-9)
        for method in METHODS:
            errors = row["errors"][method]
            if method in TERMS:
                best = reference.optimum_error(fisher, d_in, d_out, TERMS[method]) / norm
                assert errors["error_1"] == pytest.approx(best, rel=1e-6, abs=1e-8)
            approximation = reference.kronecker_sum(reference.method_terms(activations, gradients, method))
            error_1 = np.linalg.norm(fisher - approximation) / norm
            error_2 = np.linalg.norm(spectrum - np.linalg.eigvalsh(approximation)) / norm
            assert errors["error_1"] == pytest.approx(error_1, rel=1e-6, abs=1e-8)
            assert errors["error_2"] == pytest.approx(error_2, rel=1e-6, abs=1e-8)


def test_the_package_reports_the_same_errors_without_dense_matrices(measured):
    model, x, rows = measured
    others = fisher_errors(model, x, seed=3)
    assert [row["layer"] for row in rows] == list(others)
    for row in rows:
        for method, errors in row["errors"].items():
            other = others[row["layer"]][method]
            assert tuple(errors.values()) == pytest.approx((other.error_1, other.error_2), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 4), (3, 6), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("positions", [1, 3])
def test_symmetric_and_skew_parts_hold_all_singular_values(d_in, d_out, positions):
    import fisher_study

    rng = np.random.default_rng(d_in)
    samples = rng.normal(size=(60, positions, d_in)), rng.normal(size=(60, positions, d_out))
    fisher = fisher_study.dense_fisher(*samples)
    np.testing.assert_allclose(fisher, reference.fisher(*samples), rtol=1e-12, atol=1e-14)
    values = fisher_study.singular_values(fisher, d_in, d_out)
    wanted = np.linalg.svd(reference.rearrange(fisher, d_in, d_out), compute_uv=False)
    np.testing.assert_allclose(values, wanted, rtol=1e-7, atol=1e-7 * wanted[0])
    assert np.linalg.norm(values) == pytest.approx(np.linalg.norm(fisher))


def test_the_distance_does_not_depend_on_the_size_of_its_blocks(monkeypatch):
    import fisher_study

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(21, 21))
    terms = [(rng.normal(size=(7, 7)), rng.normal(size=(3, 3))) for _ in range(2)]
    wanted = np.linalg.norm(matrix - reference.kronecker_sum(terms))
    for block in (1, 2 * 3 * 21, 10**6):
        monkeypatch.setattr(fisher_study, "_BLOCK", block)
        assert fisher_study.distance(matrix, terms) == pytest.approx(wanted, rel=1e-12)


def test_layers_beyond_the_sizes_are_left_out_and_spectra_not_computed(measured):
    import fisher_study

    model, x, rows = measured
    small = fisher_study.measure(model, x, 1, seed=3, dense_size=20, spectrum_size=19)
    # "conv" has blocks of 10 × 2, "hidden" 17 × 5, "last" 6 × 3.
    assert [row["layer"] for row in small] == ["conv/block_0", "conv/block_1", "last"]
    for row in small:
        whole = next(other for other in rows if other["layer"] == row["layer"])
        assert row["singular_values"] == whole["singular_values"]
        for method, errors in row["errors"].items():
            assert errors["error_1"] == whole["errors"][method]["error_1"]
            assert (errors["error_2"] is None) == (row["layer"] != "last")
    assert fisher_study.measure(model, x, 1, dense_size=1) == []


def test_a_dead_layer_fits_and_one_that_is_not_finite_has_no_numbers():
    import fisher_study

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), KPSVDDense(2, activation="relu"), KPSVDDense(2)])
    model.compile(loss="mean_squared_error")
    x = np.ones((8, 3), "float32")
    kernel = model.layers[0].kernel
    kernel.assign(-tf.ones_like(kernel))
    dead, _ = fisher_study.measure(model, x, 0)
    assert dead["share_of_two"] is None and set(dead["singular_values"]) == {0.0}
    assert all(errors == {"error_1": 0.0, "error_2": 0.0} for errors in dead["errors"].values())
    kernel.assign(math.nan * kernel)
    rows = fisher_study.measure(model, x, 0)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(value is None for errors in rows[0]["errors"].values() for value in errors.values())


def _states(model):
    """Every variable and random state there is, as bytes or text."""
    seeds = keras.src.random.seed_generator.global_seed_generator()  # made on first use, from Python's own
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [variable.numpy().tobytes() for variable in variables] + [
        repr(np.random.get_state()),
        repr(random.getstate()),
        repr(seeds.state.numpy()),
        repr(tf.random.get_global_generator().state.numpy()),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "lanczos"])
def test_training_goes_on_bitwise_as_without_the_study(method):
    import fisher_study

    def trained(study):
        model, x, y = _convolutional()
        _compile(model, method)

        def watch(epoch, logs):
            before = _states(model)
            fisher_study.measure(model, x, epoch)
            assert _states(model) == before

        callback = keras.callbacks.LambdaCallback(on_epoch_end=watch if study else None)
        losses = model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[callback]).history["loss"]
        # TensorFlow's own counter of operations with random seeds is no variable; its next number shows it.
        return losses, _states(model), tf.random.uniform([2]).numpy().tobytes()

    assert trained(True) == trained(False)


@pytest.fixture
def rows_by_problem():
    """Two problems, two epochs, two layers; the second problem has no error 2."""
    rng = np.random.default_rng(0)

    def row(epoch, layer, known):
        errors = {
            m: {"error_1": float(rng.random()), "error_2": float(rng.random()) if known else None} for m in METHODS
        }
        values = [2.0**-k for k in range(1, 21)] if layer == "a" else [0.0] * 4
        rest = {"d_in": 3, "d_out": 2, "singular_values": values, "share_of_two": 0.9, "errors": errors}
        return {"epoch": epoch, "layer": layer, **rest}

    return {
        name: [row(epoch, layer, known) for epoch in (0, 5) for layer in "ab"]
        for name, known in (("one", True), ("two", False))
    }


def test_tables_hold_every_number(rows_by_problem, tmp_path):
    import fisher_study

    fisher_study.write_csv(rows_by_problem, tmp_path / "errors.csv")
    fisher_study.write_singular_values(rows_by_problem, tmp_path / "values.csv")
    errors, values = (list(csv.DictReader((tmp_path / name).open())) for name in ("errors.csv", "values.csv"))
    assert list(errors[0]) == ["problem", "epoch", "layer", "d_in", "d_out", "method", "error_1", "error_2"]
    assert list(values[0]) == ["problem", "epoch", "layer", "index", "singular_value", "relative"]
    assert len(errors) == 2 * 2 * 2 * len(METHODS) and len(values) == 2 * 2 * (20 + 4)
    for line in errors:
        (row,) = (
            row
            for row in rows_by_problem[line["problem"]]
            if (str(row["epoch"]), row["layer"]) == (line["epoch"], line["layer"])
        )
        for name, value in row["errors"][line["method"]].items():
            assert line[name] == ("" if value is None else repr(value))
    assert [values[1][name] for name in ("index", "singular_value", "relative")] == ["2", "0.25", "0.5"]
    assert values[20]["layer"] == "b" and values[20]["relative"] == ""


def test_pictures_are_drawn_with_the_medians_of_all_methods(rows_by_problem, tmp_path, monkeypatch):
    import fisher_study
    from colours import METHOD_COLOURS
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((self, a, k)) or plot(self, *a, **k))
    paths = fisher_study.plot({**rows_by_problem, "empty": []}, tmp_path / "new")
    assert [path.name for path in paths] == ["errors.png", "singular_values.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    curves = [(panel, a, k) for panel, a, k in drawn if k.get("label") in METHODS]
    assert len(curves) == 3 * len(METHODS) and {panel.get_yscale() for panel, _, _ in curves} == {"log"}
    for _, (epochs, medians), look in curves[: len(METHODS)]:
        found = [row["errors"][look["label"]]["error_1"] for row in rows_by_problem["one"]]
        assert epochs == [0, 5] and medians == pytest.approx([np.mean(found[:2]), np.mean(found[2:])])
        assert look["color"] == METHOD_COLOURS[look["label"]]
    assert fisher_study.plot({"empty": []}, tmp_path) == []


def test_an_error_of_zero_counts_in_the_medians_and_an_unknown_one_does_not(rows_by_problem, tmp_path, monkeypatch):
    import fisher_study
    from matplotlib.axes import Axes

    rows = [dict(row) for row in 2 * rows_by_problem["one"] if row["epoch"] == 0]
    for row, error in zip(rows, (0.0, 0.2, 0.5, None), strict=True):
        row["errors"] = {"kfac": {"error_1": error, "error_2": None}}
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((a, k)) or plot(self, *a, **k))
    fisher_study.plot({"one": rows}, tmp_path)
    assert [a[1] for a, k in drawn if k.get("label") == "kfac"] == [[0.2]]


def test_legends_are_whole_with_one_problem(rows_by_problem, tmp_path, monkeypatch):
    import fisher_study
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    fisher_study.plot({"one": rows_by_problem["one"]}, tmp_path)
    for figure in figures:
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len(figures) == 2
