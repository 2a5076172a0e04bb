"""`CurvatureMonitor` in stock `fit` on two devices: what it sees on one, and the training is the same."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import CurvatureMonitor
from keras_kpsvd.curvature.observation import QUANTITIES
from tests.networks import assert_same, problem, state, tanh_network


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("method", "fisher"), [("kfac", "exact"), ("kfac_corrected", "sampled")])
def test_two_devices_see_what_one_sees(strategy, method, fisher, eager):
    def fit(scope, monitor):
        with scope:
            model = tanh_network(dtype="float32")
            optimizer = KPSVD(method=method, fisher=fisher, curvature_interval=2, seed=1)
            model.compile(optimizer, "mse", run_eagerly=eager)
            model.optimizer.build(model.trainable_variables)
        x, y = problem(rows=24, dtype="float32")
        callbacks = [] if monitor is None else [monitor]
        model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        return model

    one, two = CurvatureMonitor(budget=None), CurvatureMonitor(budget=None)
    fit(tf.distribute.get_strategy().scope(), one)
    watched, plain = fit(strategy.scope(), two), fit(strategy.scope(), None)
    assert_same(state(watched), state(plain))
    assert len(one.records) == len(two.records) == 4
    for record, other in zip(one.records, two.records, strict=True):
        assert (record["layer"], record["update"]) == (other["layer"], other["update"])
        compared = [name for name in QUANTITIES if name != "refresh_seconds"]
        np.testing.assert_allclose([other[name] for name in compared], [record[name] for name in compared], 1e-3, 1e-5)
