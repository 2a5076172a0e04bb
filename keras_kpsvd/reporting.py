"""Warnings from inside a step, in graph mode as eagerly: they run on the host, in branches a healthy step never
takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf


def warn_when_run(message: str) -> None:
    """Issues `message` as a RuntimeWarning when the surrounding branch runs."""
    _run_python(lambda _: warnings.warn(message, RuntimeWarning, stacklevel=2), tf.constant(0))


def warn_of_layers(names: list[str], good: list[tf.Tensor], consequence: str) -> None:
    """Issues one RuntimeWarning that names every layer whose flag is False; nothing where all are True."""
    if not names:
        return

    def warn(flags: np.ndarray) -> None:
        bad = ", ".join(repr(name) for name, flag in zip(names, flags, strict=True) if not flag)
        warnings.warn(f"KPSVD, layer {bad}: {consequence}.", RuntimeWarning, stacklevel=2)

    flags = tf.stack(good)
    tf.cond(tf.reduce_all(flags), lambda: tf.constant(False), lambda: _run_python(warn, flags))


def _run_python(function: Callable[[np.ndarray], None], argument: tf.Tensor) -> tf.Tensor:
    def call(value: np.ndarray) -> np.bool_:
        function(value)
        return np.bool_(True)

    return tf.numpy_function(call, [argument], tf.bool, stateful=True)
