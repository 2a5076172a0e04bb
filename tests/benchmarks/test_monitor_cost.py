"""What the monitor costs: from seconds and its own account to a line of the table."""

import types

import numpy as np
import pytest

# Of three rounds, in which the monitors took .3, .1 and .2, and 4, 2 and 6 longer.
SECONDS = {"without": (10.0, 20.0, 30.0), "with": (10.3, 20.1, 30.2), "always": (14.0, 22.0, 36.0)}
OWN = {"with": (0.2, 0.1, 0.3), "always": (2.0, 0.5, 2.0)}


@pytest.fixture
def row(monkeypatch, tmp_path):
    import monitor

    class Contestant:
        """One whose fits take what they are told to, and observe six refreshes of two layers."""

        def __init__(self, problem, method, watching):
            self.model, self.monitor = None, watching
            self.name = "without" if watching is None else "with" if watching.budget.share else "always"

        def fit(self, x, y, batch, epochs):
            assert len(x) == len(y) == 96 and batch == 32
            if epochs == 1:
                return 1.0
            self.round = getattr(self, "round", -1) + 1
            if self.monitor is not None:
                self.monitor.budget.seconds = OWN[self.name][self.round]
                self.monitor.records += [{"layer": name} for name in ("one", "two")] * 6
            return SECONDS[self.name][self.round]

    data = np.zeros((100, 3), np.float32)
    monkeypatch.setitem(monitor.PROBLEMS, "tiny", types.SimpleNamespace(load=lambda seed: (data, data, data, data)))
    monkeypatch.setattr(monitor, "Contestant", Contestant)
    monkeypatch.setattr(monitor, "check_agreement", lambda *_: None)
    return monitor.compare("tiny", 32, "kfac", rounds=3, epochs=5, folder=tmp_path)


def test_ratios_are_to_the_fit_of_the_same_round_without_a_monitor(row):
    ratios = 10.3 / 10, 20.1 / 20, 30.2 / 30
    assert (row.ratio_low, row.ratio, row.ratio_high) == pytest.approx(tuple(sorted(ratios)))
    assert row.always_ratio == pytest.approx(1.2) and row.epoch_ms == pytest.approx(20.1e3 / 5)
    assert row.observed == 6 and row.refreshes == 13  # of 15 updates: the first 11, then every other one


def test_the_account_is_held_against_what_observing_everything_took(row):
    assert (row.true_low, row.true_over_own, row.true_high) == pytest.approx((2, 3, 4))
    assert row.own_share == pytest.approx(0.2 / 10.3)
    # By the factor .4, .4 and .9; by the seconds 2.2, 1.6 and 4.3.
    assert row.share == pytest.approx(np.median([2.2 / 10.3, 1.6 / 20.1, 4.3 / 30.2]))


def test_the_line_has_the_numbers(row):
    import monitor

    line = monitor.line(row)
    for number in ("1.007 (1.005 … 1.030)", "1.94 %", "3.00 (2.00 … 4.00)", "14.24 %"):
        assert number in line


def test_a_monitor_that_changes_the_training_ends_the_script():
    import keras
    import monitor

    models = []
    for bias in (0.0, 1e-7):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.set_weights([np.ones((1, 1)), np.full(1, bias)])
        models.append(model)
    monitor.check_agreement("case", models[0], models[0])
    with pytest.raises(RuntimeError, match="changed the training"):
        monitor.check_agreement("case", *models)
