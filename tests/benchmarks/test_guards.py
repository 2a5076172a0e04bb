"""What the guards cost: that they are gone where they should be, that nothing else is, and what is printed and kept."""

import csv
import functools

import numpy as np
import pytest

INPUTS = 150  # and a bias: more rows than are inverted whole


def _build(layers=1):
    import keras

    from keras_kpsvd import KPSVDDense

    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((INPUTS,)), *(KPSVDDense(5, activation="softmax") for _ in range(layers))])


def _network(method="kfac", build=_build):
    from guards import Network

    return Network(
        "tiny",
        build,
        "sparse_categorical_crossentropy",
        batch=16,
        classes=5,
        method=method,
        step="default",
        alone=False,
    )


@functools.cache
def _trainer(method, *removed):
    from guards import Trainer

    return Trainer(_network(method), removed)


def _calls_of_python(operations):
    return sum(operations[name] for name in ("PyFunc", "PyFuncStateless", "EagerPyFunc"))


@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
def test_a_step_without_guards_has_no_check_for_finite_numbers_and_never_calls_python(method):
    from guards import GUARDS

    guarded, bare = (_trainer(method, *removed).operations() for removed in ((), GUARDS))
    assert guarded["IsFinite"] > 0 and _calls_of_python(guarded) > 0
    assert bare["IsFinite"] == 0 and _calls_of_python(bare) == 0
    assert 0 < bare["SelfAdjointEigV2"] <= guarded["PyFuncStateless"]
    assert 0 < bare["MatMul"] < guarded["MatMul"]


def test_nan_passes_through_a_step_without_guards_only():
    import tensorflow as tf
    from guards import GUARDS

    for removed in ((), tuple(GUARDS)):
        trainer = _trainer("kfac", *removed)
        start, before = trainer.state(), trainer.weights()
        x, y = trainer.batch
        spoilt = tf.tensor_scatter_nd_update(x, [[1, 2]], [np.nan])
        if removed:
            trainer.step(spoilt, y)
            assert all(np.isnan(weights).any() for weights in trainer.weights())
        else:
            with pytest.warns(RuntimeWarning, match="skipped a step"):
                trainer.step(spoilt, y)
            assert all(np.array_equal(*pair) for pair in zip(before, trainer.weights(), strict=True))
        trainer.restore(start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "step", "factors", "probes", "linear algebra", "eigh", "counters"])
def test_each_guard_taken_out_alone_takes_something_out_and_the_others_stay(name):
    from guards import GUARDS

    stock, alone, bare = (_trainer("kfac", *removed).operations() for removed in ((), (name,), GUARDS))
    assert bare.total() < alone.total() <= stock.total()
    assert alone.total() < stock.total() or _calls_of_python(alone) < _calls_of_python(stock)


def test_without_their_order_assignments_wait_for_the_values_of_their_own_layer_only():
    from guards import Trainer

    def waiting(*removed):
        trainer = Trainer(_network(build=functools.partial(_build, layers=2)), removed)
        functions = trainer.step.graph.as_graph_def().library.function
        assignments = [node for one in functions for node in one.node_def if node.op == "AssignVariableOp"]
        return sum(name.startswith("^") for node in assignments for name in node.input)

    assert waiting("order") < waiting()


def test_guards_are_back_once_a_step_is_traced():
    from guards import GUARDS, without

    def found():
        return [getattr(owner, attribute) for _, pieces in GUARDS.values() for owner, attribute, _ in pieces]

    before = found()
    with pytest.raises(ZeroDivisionError), without(GUARDS):
        assert all(one is not other for one, other in zip(found(), before, strict=True))
        raise ZeroDivisionError
    assert all(one is other for one, other in zip(found(), before, strict=True))


@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
def test_weights_agree_to_rounding_and_but_for_eigh_to_the_last_bit(method):
    from guards import AGREEING_STEPS, GUARDS, TOLERANCES, difference, train_past_exact_updates

    stock = _trainer(method)
    start = train_past_exact_updates(stock, 10)
    before = stock.weights()
    expected = stock.observe(start, AGREEING_STEPS)
    of_eigh = [one for one in GUARDS if one != "eigh"]
    for removed, tolerance in ((tuple(GUARDS), TOLERANCES["default"]), (tuple(of_eigh), 1e-6)):
        observed = _trainer(method, *removed).observe(start, AGREEING_STEPS)
        assert difference(observed.weights, expected.weights, before) <= tolerance
        assert observed.exact_fits == expected.exact_fits
    assert difference(before, expected.weights, before) == pytest.approx(1)


def test_steps_that_did_something_else_are_not_compared():
    from guards import check_agreement

    check_agreement("one", 1e-6, 1e-3, [True, False], [True, False])
    for off in (0.5, float("nan")):
        with pytest.raises(RuntimeError, match="weights are off"):
            check_agreement("one", off, 1e-3, [True], [True])
    with pytest.raises(RuntimeError, match="exact fits"):
        check_agreement("one", 0.0, 1e-3, [True, False], [False, True])


def test_ratios_are_of_rounds_and_the_file_has_the_lines_of_the_table(monkeypatch, tmp_path, capsys):
    import guards

    monkeypatch.setattr(guards, "networks", lambda quick: [_network()])
    path = tmp_path / "results" / "guards.csv"
    guards.main(["--rounds", "2", "--out", str(path)])
    printed = capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["without"] for row in rows] == ["stock", "stock again", "all"] == list(_network().cases())
    for row in rows:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  {row['without']:16s}")]
        assert f"{float(row['step_ms']):.2f}" in line and f"{float(row['ratio']):.3f}" in line
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
        assert (row["rounds"], row["steps"]) == ("2", "20") and row["device"] and "TensorFlow" in row["versions"]
        assert 1 <= int(row["exact_fits"]) <= 20
    assert [float(rows[0][name]) for name in ("ratio", "ratio_low", "ratio_high", "difference")] == [1, 1, 1, 0]
    assert int(rows[2]["operations"]) < int(rows[1]["operations"]) == int(rows[0]["operations"])


def test_a_block_that_is_not_whole_periods_is_refused(capsys):
    import guards

    with pytest.raises(SystemExit):
        guards.main(["--steps", "30"])
    assert "multiple of 20" in capsys.readouterr().err
