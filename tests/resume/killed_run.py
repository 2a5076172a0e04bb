"""The training run that `test_killed` kills; in a module of its own, which a fork server can import without pytest."""

import os

import keras
import numpy as np

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import mend_backup
from tests.resume.runs import INTERVALS, batches_left, counter, data, everything, fit, network

BATCHES, BATCH = 260, 16
ACCUMULATED = 2
SAVE_FREQ = 3  # Every other save is in the middle of an accumulation.


class _Tell(keras.callbacks.Callback):
    """Reports every finished batch."""

    def __init__(self, progress):
        super().__init__()
        self.progress = progress

    def on_train_batch_end(self, batch, logs=None):
        self.progress.send(batch)


def _new_model():
    options = {"gradient_accumulation_steps": ACCUMULATED, "use_ema": True, "weight_decay": 1e-3, "conjugate_steps": 3}
    return network(KPSVD(method="kfac_corrected", seed=5, **options, **INTERVALS), deep=True)


def _write(model, result):
    """In one piece: it is there whole or not at all."""
    assert counter(model.optimizer, "updates") == BATCHES // ACCUMULATED, "a step was skipped or a batch lost"
    unfinished = f"{result}.unfinished"
    with open(unfinished, "wb") as file:
        np.savez(file, **{f"{number:03} {name}": value for number, (name, value) in enumerate(everything(model))})
    os.replace(unfinished, result)


def uninterrupted(result):
    """The whole run by a plain `fit`."""
    model = _new_model()
    fit(model, *data(BATCHES, BATCH), 0, BATCHES, BATCH)
    _write(model, result)


def restarted(directory, result, progress):
    """The same run as a user would write it who expects to be killed: the same script, started again and again."""
    model = _new_model()
    mend_backup(directory)
    backup = keras.callbacks.BackupAndRestore(
        directory, save_freq=SAVE_FREQ, double_checkpoint=True, delete_checkpoint=False
    )
    model.fit(batches_left(model, *data(BATCHES, BATCH), BATCH), verbose=0, callbacks=[backup, _Tell(progress)])
    _write(model, result)
