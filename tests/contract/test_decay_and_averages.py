"""Weight decay with exclusions, and moving averages of the weights."""

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD
from tests import reference
from tests.contract.oracle import EVERY_STEP, PLAIN, assert_steps, moved, squared_error_directions
from tests.networks import compiled, matrices, problem, tanh_network


def _decayed(matrix, kernel, bias):
    return np.concatenate([kernel * matrix[:-1], bias * matrix[-1:]])


@pytest.mark.parametrize(("excluded", "eager"), [("by name", False), ("by variable", True)])
def test_excluded_variables_do_not_decay_and_all_others_do(excluded, eager):
    x, y = problem()
    model = tanh_network()
    optimizer = KPSVD(**PLAIN, weight_decay=0.5)
    if excluded == "by name":
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    elif excluded == "by variable":
        optimizer.exclude_from_weight_decay(var_list=[model.layers[1].kernel])
    compiled(model, optimizer, run_eagerly=eager)
    start = matrices(model)
    factors = {  # Of each layer's kernel and bias.
        "by name": [(0.875, 1), (0.875, 1)],
        "by variable": [(0.875, 0.875), (1, 0.875)],
    }[excluded]
    decayed = [_decayed(w, *factor) for w, factor in zip(start, factors, strict=True)]
    expected = moved(decayed, squared_error_directions(start, x, y))
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    assert_steps(matrices(model), expected, start)


def test_under_the_adaptive_rate_weights_decay_at_the_rate_of_the_other_layers():
    """One linear layer: the fitted step is Newton's, from the old weights to the least squares fit."""
    x, y = problem(rows=20, sizes=(4, 2))
    model = tanh_network((4, 2))
    compiled(model, KPSVD(method="kfac", damping=1e-12, fisher="exact", weight_decay=5.0))
    start = matrices(model)
    best = np.linalg.lstsq(np.concatenate([x, np.ones((20, 1))], 1), y, rcond=None)[0]
    model.train_on_batch(x, y)
    assert_steps(matrices(model), [best - 0.01 * 5.0 * start[0]], start, 1e-5)


@pytest.mark.parametrize(("frequency", "eager"), [(None, False), (2, False), (2, True)])
def test_averages_follow_the_weights_and_overwrite_them_when_keras_says(frequency, eager):
    """The first average is the first weights; every second step goes on from it; `fit` ends on it."""
    model = tanh_network()
    optimizer = KPSVD(**PLAIN, **EVERY_STEP, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=frequency)
    compiled(model, optimizer, run_eagerly=eager)
    start = weights = matrices(model)
    batches = [problem(seed=number) for number in range(5)]
    averages = None
    for number, batch in enumerate(batches):
        weights = moved(weights, squared_error_directions(weights, *batch))
        averages = [0.75 * a + 0.25 * w for a, w in zip(averages or weights, weights, strict=True)]
        if frequency and (number + 1) % frequency == 0:
            weights = averages
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    model.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    assert_steps(matrices(model), averages, start, 1e-5)


def test_swapped_in_averages_are_evaluated_and_training_goes_on_from_the_weights():
    """`SwapEMAWeights` around each epoch's validation."""
    batches = [problem(seed=number) for number in range(2)]
    model = tanh_network()
    model.compile(KPSVD(**PLAIN, **EVERY_STEP, use_ema=True, ema_momentum=0.5), "mse")
    weights = matrices(model)
    averages, losses = None, []
    for x, y in [*batches, *batches]:
        weights = moved(weights, squared_error_directions(weights, x, y))
        averages = [0.5 * a + 0.5 * w for a, w in zip(averages or weights, weights, strict=True)]
        losses.append(_loss(averages, *batches[0]))
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    fit = {"batch_size": 10, "epochs": 2, "shuffle": False, "verbose": 0}
    swap = keras.callbacks.SwapEMAWeights()
    history = model.fit(x, y, validation_data=batches[0], callbacks=[swap], **fit).history
    np.testing.assert_allclose(history["val_loss"], losses[1::2], rtol=1e-5)


def _loss(weights, x, y):
    return np.mean((reference.forward(weights, x)[1] - y) ** 2)
