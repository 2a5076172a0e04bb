"""Where the numbers of `CurvatureMonitor` go: logs, the CSV file, TensorBoard."""

import csv

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import COLUMNS, CurvatureMonitor
from keras_kpsvd.curvature.observation import QUANTITIES
from tests.monitored import OFTEN, data, dense, fit
from tests.networks import state


def test_logs_have_the_last_observed_refresh_of_each_epoch():
    monitor = CurvatureMonitor(budget=None)
    _, logs = fit(monitor)
    for layer in ("dense0", "out"):
        own = [record for record in monitor.records if record["layer"] == layer]
        assert [record["update"] for record in own] == [0, 2, 4]
        for name in QUANTITIES:
            assert logs[f"{layer}/{name}"] == [own[1][name], own[2][name]]
    _, logs = fit(CurvatureMonitor(log_quantities=["damping"]))
    assert list(logs) == ["loss", "dense0/damping", "out/damping"]


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_file_has_a_line_per_block_and_refresh_and_a_resumed_run_goes_on_with_it(tmp_path):
    path = tmp_path / "new" / "curvature.csv"
    first, second = CurvatureMonitor(csv=path, budget=None), CurvatureMonitor(csv=str(path), budget=None)
    model, _ = fit(first)
    assert len(_rows(path)) == len(first.records) == 6
    fit(second, model=model)
    assert path.read_text().count("error_1") == 1
    for row, record in zip(_rows(path), first.records + second.records, strict=True):
        assert tuple(row) == COLUMNS and row.pop("layer") == record["layer"]
        assert {name: float(value) for name, value in row.items()} == {name: record[name] for name in row}


def test_lines_are_there_as_epochs_end(tmp_path):
    path, counts = tmp_path / "curvature.csv", []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(_rows(path))))
    fit(CurvatureMonitor(csv=path, budget=None), callbacks=[count])
    assert counts == [4, 6]


def test_a_file_of_something_else_is_refused_before_training_and_left_as_it_is(tmp_path):
    path = tmp_path / "curvature.csv"
    for content in ("epoch,loss\n1,2\n", ",".join(COLUMNS)[:-3], ",".join(reversed(COLUMNS)) + "\n"):
        path.write_text(content)
        model = dense()
        model.compile(KPSVD(**OFTEN), "mse")
        before = state(model)
        with pytest.raises(ValueError, match="`csv` must be a new file or one that `CurvatureMonitor` wrote"):
            fit(CurvatureMonitor(csv=path), model=model)
        assert path.read_text() == content
        assert all(np.array_equal(value, state(model)[name]) for name, value in before.items())


def test_a_line_torn_by_a_killed_run_spoils_no_other(tmp_path):
    path = tmp_path / "curvature.csv"
    path.write_text(",".join(COLUMNS) + "\ndense0,0,1.2")
    monitor = CurvatureMonitor(csv=path)
    fit(monitor)
    rows = _rows(path)
    assert rows[0]["sigma_1"] is None and [row["layer"] for row in rows[1:]] == ["dense0", "out"] * (len(rows) // 2)


def test_tensorboard_gets_every_scalar_at_its_update(tmp_path):
    monitor = CurvatureMonitor(tensorboard=tmp_path / "logs", budget=None)
    fit(monitor)
    (file,) = (tmp_path / "logs").iterdir()
    found = {
        (value.tag, event.step): value.simple_value
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    expected = {
        (f"{record['layer']}/{name}", record["update"]): np.float32(record[name])
        for record in monitor.records
        for name in QUANTITIES
        if name != "update"
    }
    assert found == expected


def test_dead_layers_and_steps_that_are_not_finite_do_no_harm(tmp_path):
    """The output weights are zero: no gradient reaches the first layer. Then targets overflow the second step."""
    model = dense()
    model.layers[-1].kernel.assign(np.zeros_like(model.layers[-1].kernel))
    model.compile(KPSVD(0.1, curvature_interval=1, inverse_interval=1, seed=0), "mse")
    x, y = data(model)
    x[8:16] = np.nan
    monitor = CurvatureMonitor(csv=tmp_path / "curvature.csv", tensorboard=tmp_path / "logs", budget=None)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[monitor])
    assert monitor.records[0]["layer"] == "dense0" and monitor.records[0]["error_1"] == 0
    assert [record["update"] for record in monitor.records] == [0, 0, 1, 1]
    assert len(_rows(tmp_path / "curvature.csv")) == 4
