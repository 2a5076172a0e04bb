"""Warnings from inside a step, in graph mode as eagerly: they run on the host, in branches a healthy step never
takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Layers that a message names before it only counts.
SHOWN_LAYERS = 12


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


def tell_of_fallback(paths: list[str], *, all_of_them: bool) -> None:
    """Says once, as a UserWarning, which layers train without curvature.

    Args:
        paths: of their variables, `layer/variable`.
        all_of_them: no layer of the model is instrumented.
    """
    if not paths:
        return
    layers = list(dict.fromkeys(path.rpartition("/")[0] or path for path in paths))
    shown = ", ".join(layers[:SHOWN_LAYERS]) + (
        f" and {len(layers) - SHOWN_LAYERS} more" * (len(layers) > SHOWN_LAYERS)
    )
    consequence = (
        "KPSVD trains by SGD with momentum, without curvature:"
        if not all_of_them
        else ("KPSVD found no instrumented layer and trains the whole model by SGD with momentum:")
    )
    warnings.warn(
        f"{consequence} {shown}. (`keras_kpsvd.instrument(model)` gives curvature to Dense, Conv1D, Conv2D and "
        "EinsumDense layers.)",
        UserWarning,
        stacklevel=2,
    )


def _run_python(function: Callable[[np.ndarray], None], argument: tf.Tensor) -> tf.Tensor:
    def call(value: np.ndarray) -> np.bool_:
        function(value)
        return np.bool_(True)

    return tf.numpy_function(call, [argument], tf.bool, stateful=True)
