"""Every bad argument is refused when the object is made, by name."""

from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD
from keras_kpsvd.arguments import check_choice, check_count, check_fraction, check_positive, check_strategy

NAN, INFINITY = float("nan"), float("inf")
BAD = {
    "method": ["ekfac", "KFAC", None, 1],
    "fisher": ["true", None, "Exact"],
    "likelihood": ["gaussian", None, 3],
    "eigenvalues": ["ekfac", "Corrected", True, 1],
    "damping_rule": ["heuristic", None, 0.5],
    "indefinite": ["clip", None, True],
    "damping": [0, 0.0, -1e-3, NAN, INFINITY, "auto", None, True],
    "kl_clip": [0, -1.0, NAN, INFINITY, "none", True],
    "curvature_interval": [0, -1, 1.5, NAN, None, True, "2", "grow"],
    "inverse_interval": [0, -1, 2.0, None, False, "Growing"],
    "conjugate_steps": [0, 1.5, None, True],
    "fit_interval": [0, 1.5, "10", True],
    "fisher_batch_size": [0, -8, 0.25, True],
    "factor_decay": [1, 1.0, -0.1, 1.5, NAN, None, "0.9", True],
    "momentum": [-0.1, 1.1, NAN, None, "0.9", True],
    "nesterov": [None, 1, "yes"],
    "seed": ["a", "1", 1.5, NAN, True],
    "learning_rate": [-1e-3, NAN, INFINITY, -INFINITY, "fast"],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_argument_is_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        KPSVD(**{argument: value})


def test_nesterov_is_refused_with_the_adaptive_rate():
    with pytest.raises(ValueError, match=r"`nesterov`.*`learning_rate`.*Received: nesterov=True"):
        KPSVD(nesterov=True)
    KPSVD(nesterov=True, learning_rate=0.1)


def test_a_schedule_is_refused_where_the_rate_is_adaptive():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    optimizer = KPSVD()
    for one in (schedule, lambda: 0.1):
        with pytest.raises(ValueError, match=r"`learning_rate` .*'adaptive': make one with the schedule.*Received: "):
            optimizer.learning_rate = one
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    optimizer.learning_rate = 0.1
    assert KPSVD(schedule).get_config()["learning_rate"]["class_name"] == "ExponentialDecay"


@pytest.mark.parametrize("option", [{"conjugate_steps": 2}, {"fit_interval": 20}])
def test_what_finds_the_adaptive_rate_is_refused_with_a_given_one(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"`{name}` .*learning_rate='adaptive'.*Received: {name}="):
        KPSVD(0.1, **option)
    KPSVD(**option)
    optimizer = KPSVD(0.1, **{name: 1})
    assert KPSVD.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    assert KPSVD(0.1).get_config()["fit_interval"] == 1


def test_the_bound_of_given_rates_is_refused_with_the_adaptive_one():
    with pytest.raises(ValueError, match=r"`kl_clip` .*`learning_rate` a number.*Received: kl_clip=0.001"):
        KPSVD(kl_clip=1e-3)
    KPSVD(kl_clip=None)
    KPSVD(0.1, kl_clip=1e-3)
    assert KPSVD.from_config(KPSVD().get_config()).kl_clip == KPSVD(0.1).kl_clip == 0.01


def test_exact_expectations_are_refused_with_callables():
    with pytest.raises(ValueError, match=r"`fisher`='exact'.*fisher='sampled'.*Received: likelihood="):
        KPSVD(fisher="exact", likelihood=lambda outputs: outputs)
    KPSVD(fisher="exact", likelihood="normal")


def test_extrapolated_models_are_refused_with_conjugate_gradients():
    with pytest.raises(ValueError, match=r"`fit_interval`.*`conjugate_steps`"):
        KPSVD(fit_interval=10, conjugate_steps=3)
    KPSVD(fit_interval=10, conjugate_steps=1)
    assert KPSVD(conjugate_steps=3).get_config()["fit_interval"] == 1
    assert KPSVD().get_config()["fit_interval"] == 20


def test_corrected_eigenvalues_are_those_of_one_term():
    for method in ("deflation", "lanczos", "kfac_corrected"):
        with pytest.raises(ValueError, match=r"`eigenvalues`.*'kfac' or 'kpsvd'.*Received: method="):
            KPSVD(method=method, eigenvalues="corrected")
        assert KPSVD(method=method).get_config()["eigenvalues"] == "kronecker"
    for method in ("kfac", "kpsvd"):
        assert KPSVD(method=method).get_config()["eigenvalues"] == "corrected"
        assert KPSVD(method=method, learning_rate=0.1).get_config()["eigenvalues"] == "kronecker"
        KPSVD(method=method, learning_rate=0.1, eigenvalues="corrected")
    with pytest.raises(ValueError, match=r"'kronecker', 'corrected' or None"):
        KPSVD(eigenvalues="ekfac")


def test_the_ends_of_every_range_are_accepted():
    KPSVD(learning_rate=0, momentum=0, factor_decay=0, damping=1e-30, kl_clip=None, curvature_interval=1)
    KPSVD(learning_rate=1, momentum=1, factor_decay=0.999, damping="adaptive", inverse_interval=10**6)
    numpy = {"damping": np.float32(0.1), "curvature_interval": np.int64(3), "momentum": np.float64(0.5)}
    optimizer = KPSVD(learning_rate=np.float32(0.5), **numpy)
    assert keras.saving.serialize_keras_object(optimizer)["config"]["curvature_interval"] == 3
    with pytest.raises(ValueError, match=r"1 or more or 'growing'"):
        KPSVD(curvature_interval="grow")
    optimizer = KPSVD(curvature_interval="growing", inverse_interval=7)
    config = keras.saving.serialize_keras_object(optimizer)["config"]
    assert (config["curvature_interval"], config["inverse_interval"]) == ("growing", 7)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)).get_config() == config
    KPSVD(learning_rate=lambda: 0.1)
    KPSVD(learning_rate=keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))
    KPSVD(likelihood=lambda outputs: outputs)


def test_several_processes_need_a_seed():
    """Refused when it is built: the strategy is known only then."""
    several = mock.Mock(spec=tf.distribute.MultiWorkerMirroredStrategy, num_replicas_in_sync=2)
    with pytest.raises(ValueError, match=r"`seed` must be .*the same in every process.* Received: seed=None"):
        check_strategy(several, seeded=False)
    check_strategy(several, seeded=True)
    check_strategy(mock.Mock(spec=tf.distribute.MultiWorkerMirroredStrategy, num_replicas_in_sync=1), seeded=False)
    check_strategy(mock.Mock(spec=tf.distribute.MirroredStrategy, num_replicas_in_sync=2), seeded=False)


def test_messages_say_what_was_expected_and_what_was_received():
    for check, expected in [
        (lambda: check_choice("method", "x", ("a", "b")), "`method` must be one of 'a', 'b'. Received: method='x'"),
        (
            lambda: check_positive("damping", -1, " or None"),
            "`damping` must be a finite number greater than 0 or None. Received: damping=-1",
        ),
        (lambda: check_fraction("momentum", 2, one=True), "`momentum` must be in [0, 1]. Received: momentum=2"),
        (lambda: check_fraction("decay", 1, one=False), "`decay` must be in [0, 1). Received: decay=1"),
        (lambda: check_count("rows", 0), "`rows` must be an integer of 1 or more. Received: rows=0"),
    ]:
        with pytest.raises(ValueError) as error:
            check()
        assert str(error.value) == expected
