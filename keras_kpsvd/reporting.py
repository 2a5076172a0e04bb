"""What the optimizer tells its user, when it is built and from inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd.arguments import under_xla

# Layers that a message names before it only counts.
SHOWN_LAYERS = 12


def tell_of_fallback(variables: list[keras.Variable], *, all_of_them: bool) -> None:
    """Says once, as a UserWarning, which layers train without curvature.

    Args:
        variables: theirs.
        all_of_them: no layer of the model is instrumented.
    """
    if not variables:
        return
    layers = list(dict.fromkeys(variable.path.rpartition("/")[0] or variable.path for variable in variables))
    more = f" and {len(layers) - SHOWN_LAYERS} more" if len(layers) > SHOWN_LAYERS else ""
    message = "KPSVD trains by SGD with momentum, without curvature: "
    if all_of_them:
        message = "KPSVD found no instrumented layer and trains the whole model by SGD with momentum: "
    message += ", ".join(layers[:SHOWN_LAYERS]) + more + "."
    if any(len(variable.shape) > 1 for variable in variables):
        message += " Dense, Conv1D, Conv2D and EinsumDense layers get curvature by `keras_kpsvd.instrument(model)`."
    _tell(message)


def _tell(message: str) -> None:
    """At no line of code: the one that called is Keras's."""
    warnings.warn_explicit(message, UserWarning, "keras_kpsvd", 0)


def tell_of_nothing_recorded() -> None:
    """Says, as a UserWarning, that a step had a gradient and no forward pass to take its curvature from."""
    _tell(
        "KPSVD saw no forward pass before this step and took it without new curvature: as a plain gradient step, where "
        "none was seen before. Call the model with `training=True`, under a `tf.GradientTape`, once before each "
        "`apply` and in the same function."
    )


def tell_of_unused_rate() -> None:
    """Says, as a UserWarning, that a rate was set which no variable trains at."""
    _tell(
        "KPSVD finds its rate in every step where learning_rate='adaptive', and all variables of this model train so: "
        "setting `learning_rate`, as ReduceLROnPlateau and LearningRateScheduler do, has no effect. "
        "Make KPSVD with a number or a schedule as `learning_rate` to choose the rate."
    )


def run_python(function: Callable[[np.ndarray], None], argument: tf.Tensor) -> tf.Tensor:
    """Calls `function` with the value of `argument` when the surrounding branch runs.

    A ValueError that it raises ends the step as the InvalidArgumentError that TensorFlow makes of it in graphs.
    """

    def call(value: np.ndarray) -> np.bool_:
        function(value)
        return np.bool_(True)

    if tf.executing_eagerly():
        try:
            return tf.constant(call(argument.numpy()))
        except ValueError as error:
            raise tf.errors.InvalidArgumentError(None, None, str(error)) from None
    if under_xla():  # Which cannot call the host; what it would tell of happens all the same.
        return tf.constant(True)
    return tf.numpy_function(call, [argument], tf.bool, stateful=True)
