"""Training of one method, with the time and loss of every epoch."""

import argparse
import sys
import time
from dataclasses import dataclass, field

import keras
import numpy as np
import tensorflow as tf
from autoencoder_problems import Problem, build_autoencoder

_SHOWN = 10  # held-out images reconstructed for the picture


@dataclass
class Run:
    """What one method did; filled in while it trains, so that an interrupted run keeps its finished epochs.

    Attributes:
        method: its name.
        losses: training loss of every finished epoch, Keras's running mean over the epoch's batches.
        seconds: training time up to the end of every finished epoch; the first includes tracing and compiling.
        status: "running", "finished", "interrupted", "diverged" or "failed: ...".
        held_out_loss: loss of the held-out images after training, or None.
        reconstructions: `[shown, features]`, raw outputs for the first held-out images, or None.
    """

    method: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    status: str = "running"
    held_out_loss: float | None = None
    reconstructions: np.ndarray | None = None

    @property
    def epochs(self) -> int:
        """Number of finished epochs."""
        return len(self.losses)


class EpochRecorder(keras.callbacks.Callback):
    """Writes the loss and the time of every epoch into a `Run`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Starts the clock: what happens between epochs is not training."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Records the finished epoch."""
        elapsed = time.perf_counter() - self._began
        self.run.seconds.append((self.run.seconds[-1] if self.run.seconds else 0.0) + elapsed)
        self.run.losses.append(float(logs["loss"]))


def batches(images: np.ndarray, batch_size: int, seed: int) -> tf.data.Dataset:
    """(image, image) batches, shuffled anew every epoch in an order that depends on `seed` alone.

    The few images that do not fill a batch are left out, other ones in every epoch: a step on a handful of images would
    be noisy, and its curvature more so.
    """
    held = tf.constant(images)

    def gather(indices):
        rows = tf.gather(held, indices)
        return rows, rows

    indices = tf.data.Dataset.range(len(images)).shuffle(len(images), seed=seed, reshuffle_each_iteration=True)
    return indices.batch(batch_size, drop_remainder=True).map(gather).prefetch(2)


def make_model(problem: Problem, method: str, options: argparse.Namespace) -> keras.Model:
    """The compiled autoencoder: plain Keras layers for Adam and SGD, keras_kpsvd's for its own optimizer."""
    if method == "adam":
        dense, optimizer = keras.layers.Dense, keras.optimizers.Adam(options.adam_learning_rate)
    elif method == "sgd":
        dense = keras.layers.Dense
        optimizer = keras.optimizers.SGD(options.sgd_learning_rate, momentum=0.9, nesterov=True)
    else:
        import keras_kpsvd

        dense = keras_kpsvd.KPSVDDense
        optimizer = keras_kpsvd.KPSVD(method=method, seed=options.seed)
    model = build_autoencoder(problem.widths, dense, options.seed, options.initializer)
    model.compile(optimizer=optimizer, loss=problem.loss)
    return model


def train(problem: Problem, method: str, epochs: int, options: argparse.Namespace, runs: list[Run]) -> None:
    """Trains one method and appends its `Run` to `runs` before the first step, so that Ctrl-C loses nothing.

    A method that diverges or fails is a run with that status. KeyboardInterrupt passes through.
    """
    run = Run(method)
    runs.append(run)
    keras.utils.set_random_seed(options.seed)
    model = None
    try:
        model = make_model(problem, method, options)
        model.fit(
            batches(problem.train_images, options.batch_size, options.seed),
            epochs=epochs,
            shuffle=False,  # `batches` does, the same way for every method
            verbose=1 if sys.stdout.isatty() else 2,
            callbacks=[EpochRecorder(run), keras.callbacks.TerminateOnNaN()],
        )
        run.status = "finished" if run.epochs else "diverged"
    except KeyboardInterrupt:
        run.status = "interrupted"
        raise
    except Exception as error:  # one method's failure must not cost the others their results
        run.status = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"{method} {run.status}", flush=True)
    finally:
        if model is not None and run.epochs:
            _look_at_held_out_images(problem, model, run)


def _look_at_held_out_images(problem: Problem, model: keras.Model, run: Run) -> None:
    outputs = keras.ops.convert_to_numpy(model(problem.test_images, training=False))
    run.reconstructions = outputs[:_SHOWN]
    run.held_out_loss = float(problem.loss(problem.test_images, outputs))
    # The loss can look finite while hidden weights are NaN: compiled ReLUs may turn NaN into 0.
    if run.status == "finished" and not np.isfinite([run.losses[-1], run.held_out_loss]).all():
        run.status = "diverged"
