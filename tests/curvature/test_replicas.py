"""Several passes as one, and where the work on layers is placed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDDense, loss_densities
from keras_kpsvd.curvature.conjugate import fisher_product
from keras_kpsvd.curvature.placement import spread
from keras_kpsvd.curvature.replicas import JointPass, _gather
from keras_kpsvd.curvature.step_control import changes_of_outputs, quadratic_model
from keras_kpsvd.layers import Recorder

SEED = tf.constant([3, 4])


def _model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = KPSVDDense(5, activation="tanh")(inputs)
    model = keras.Model(inputs, [KPSVDDense(2)(hidden), KPSVDDense(3, activation="softmax")(hidden)])
    model.compile(loss=["mse", "categorical_crossentropy"], loss_weights=[0.5, 3.0])
    return model


def _passes(model, parts, weights):
    passes, heads = [], []
    for x, weight in zip(parts, weights, strict=True):
        recorder = Recorder(persistent=True, always=True)
        layers = [layer for layer in model.layers if isinstance(layer, KPSVDDense)]
        for layer in layers:
            layer.attach(recorder)
        outputs = model(tf.constant(x), training=True)
        for layer in layers:
            layer.detach(recorder)
        passes.append(recorder.take())
        passes[-1].outputs = outputs
        heads.append(loss_densities.heads("auto", model, outputs, tf.constant(weight)))
    return passes, heads


@pytest.mark.parametrize("split", [(5, 6), (0, 11), (10, 1), (4, 4, 3)])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_passes_of_parts_of_a_batch_are_as_one_pass_of_the_whole(split, fisher):
    """The same targets are drawn, whatever the split; samples, the quadratic model and Fisher products agree."""
    rng = np.random.default_rng(0)
    model, x, weight = _model(), rng.normal(size=(11, 4)).astype("float32"), rng.random(11).astype("float32")
    ends = np.cumsum(split)[:-1]
    results = []
    for parts, weights in (([x], [weight]), (np.split(x, ends), np.split(weight, ends))):
        passes, heads = _passes(model, parts, weights)
        joint = JointPass(passes, heads, ["CPU:0"] * len(parts))
        calls = joint.calls(fisher, SEED, lambda *_, **__: 7, {})
        rng = np.random.default_rng(1)
        direction = {
            layer: [tf.constant(rng.normal(size=v.shape), tf.float32) for v in layer.curvature_variables]
            for layer in passes[0].layers
        }
        grams = tf.ones([len(direction), 1, 1])
        quadratic = quadratic_model(joint, [direction], grams, dict.fromkeys(direction, tf.constant(0.1)), SEED)
        product = fisher_product(joint, list(direction), changes_of_outputs(joint, direction), SEED)
        flat = [value for of_layer in calls.values() for call in of_layer for value in call]
        flat += [value for values in product.values() for value in values]
        results.append([*flat, quadratic.curvature, *quadratic.logit_changes])
        assert int(joint.rows) == 11
        assert float(joint.numbers(tf.constant(0.0))) == 11 * (2 + 1) and float(joint.numbers(tf.constant(20.0))) == 60
    rows = 7 if fisher == "sampled" else 7 * 5
    assert results[0][0].shape[0] == rows
    for whole, joined in zip(*results, strict=True):
        np.testing.assert_allclose(joined, whole, rtol=1e-4, atol=1e-5)


def test_layers_are_spread_over_devices_by_what_they_cost():
    costs = {"a": 8.0, "b": 5.0, "c": 4.0, "d": 1.0}
    assert spread(costs, ["x", "y"]) == {"a": "x", "b": "y", "c": "y", "d": "x"}
    assert spread(costs, ["x"]) == spread(costs, []) == dict.fromkeys(costs)


def test_inputs_of_unknown_size_are_refused_where_rows_come_from_other_processes():
    gathered = tf.function(lambda values: _gather(tf.distribute.get_strategy(), [[values]]), autograph=False)
    with pytest.raises(ValueError, match=r"fixed size.*several processes.*\(None, None, 3\)"):
        gathered.get_concrete_function(tf.TensorSpec([None, None, 3]))
