"""Dropout and the shuffler of stock `fit` see the random numbers that they see under a stock optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense

pytestmark = pytest.mark.filterwarnings("ignore:KPSVD trains by SGD with momentum")


class Witness(keras.layers.Layer):
    """Passes its inputs on and notes them, step by step, from within the graph."""

    def __init__(self, seen, **arguments):
        super().__init__(**arguments)
        self.note = seen.append  # Not the list itself, which Keras would replace by one that it tracks.

    def call(self, inputs, training=False):
        if training and not isinstance(inputs, keras.KerasTensor):
            tf.py_function(lambda values: self.note(values.numpy()), [inputs], [])
        return inputs


def _seen(optimizer, epochs=2):
    """What a stock, shuffled `fit` showed: the order of the rows, which inputs and which hidden units were dropped."""
    order, inputs, hidden = [], [], []
    keras.utils.clear_session()  # Keras 3.12 does not seed its global generator anew once it is there.
    keras.utils.set_random_seed(4)
    # Softplus is never zero: where a hidden unit is, dropout made it so.
    model = keras.Sequential(
        [
            keras.Input((4,)),
            Witness(order),
            keras.layers.Dropout(0.4),
            Witness(inputs),
            KPSVDDense(5, activation="softplus"),
            keras.layers.Dropout(0.4),
            Witness(hidden),
            KPSVDDense(2),
        ]
    )
    model.compile(optimizer(), "mse")
    x = np.arange(1, 1 + 24 * 4, dtype="float32").reshape(24, 4) / 96
    model.fit(x, x[:, :2], batch_size=4, epochs=epochs, shuffle=True, verbose=0)
    later = [tf.random.uniform([3]).numpy(), np.random.random(3), keras.random.uniform([3]).numpy()]
    return order, inputs, [values != 0 for values in hidden], later


@pytest.fixture(scope="module")
def under_sgd():
    return _seen(lambda: keras.optimizers.SGD(0.01))


def test_the_witness_sees_shuffled_rows_and_new_masks_in_every_step(under_sgd):
    order, inputs, hidden, _ = under_sgd
    assert len(order) == len(inputs) == len(hidden) == 12
    for epoch in (order[:6], order[6:]):
        rows = np.concatenate(epoch)[:, 0]
        assert not np.array_equal(rows, np.sort(rows)) and len(np.unique(rows)) == 24
    assert len({values.tobytes() for values in inputs}) == 12
    assert len({values.tobytes() for values in hidden}) == 12
    assert all(0 < values.mean() < 1 for values in hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "kfac", "curvature_interval": 2},
        {"method": "kfac_corrected", "curvature_interval": 1, "seed": 3, "learning_rate": 0.01},
    ],
)
def test_a_shuffled_fit_sees_the_rows_and_the_masks_that_it_sees_under_sgd(under_sgd, options):
    for ours, stock in zip(_seen(lambda: KPSVD(**options)), under_sgd, strict=True):
        assert len(ours) == len(stock)
        for one, other in zip(ours, stock, strict=True):
            np.testing.assert_array_equal(one, other)
