"""The training step of a compiled model on one batch of random data, traced once and run as often as one likes."""

from __future__ import annotations

import time

import keras
import numpy as np
import tensorflow as tf


class TracedStep:
    """A model, its optimizer and its traced step.

    Args:
        model: uncompiled.
        optimizer: what trains it.
        loss: Keras's name.
        batch: examples.
        classes: of integer targets; None where the inputs themselves are the targets.

    Attributes:
        first_seconds: of tracing and of the first step, which TensorFlow spends on optimising the graph.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        loss: str,
        batch: int,
        classes: int | None,
    ):
        self.model, self.optimizer = model, optimizer
        model.compile(optimizer=optimizer, loss=loss)
        optimizer.build(model.trainable_variables)
        rng = np.random.default_rng(0)
        x = rng.random((batch, *model.input_shape[1:]), np.float32)
        y = x if classes is None else rng.integers(classes, size=batch)
        self.batch = tf.constant(x), tf.constant(y)
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        began = time.perf_counter()
        self.step = step.get_concrete_function(*self.batch)
        self.variables = [*model.trainable_variables, *model.non_trainable_variables, *optimizer.variables]
        self.run(1)
        self.first_seconds = time.perf_counter() - began

    def state(self) -> list[tf.Tensor]:
        """All weights and all of the optimizer's state."""
        return [tf.identity(variable.value) for variable in self.variables]

    def restore(self, values: list[tf.Tensor]) -> None:
        """The inverse of `state`, of any step of the same model and kind of optimizer."""
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def run(self, steps: int) -> float:
        """Takes steps on the one batch; the last loss, which a device that runs ahead has to be waited for."""
        for _ in range(steps):
            logs = self.step(*self.batch)
        return float(logs["loss"])
