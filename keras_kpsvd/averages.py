"""Keras's moving averages of weights, which know nothing of steps that were skipped."""

from __future__ import annotations

import tensorflow as tf


class AveragesOfStepsTaken:
    """Mixin of an optimizer: a skipped step leaves its averages, and weights that they would overwrite, as they are.

    Keras does both after every step (`use_ema`, `ema_overwrite_frequency`), and the second once more when `fit` ends.
    """

    def _skipped(self) -> tf.Tensor:
        """Whether the last step was skipped, boolean scalar."""
        raise TypeError(f"{type(self).__name__} must define `_skipped`.")

    def _update_model_variables_moving_average(self, trainable_variables: list) -> None:
        averages = [one for one in self._model_variables_moving_average if one is not None]
        before = [tf.identity(one.value) for one in averages]
        super()._update_model_variables_moving_average(trainable_variables)
        for average, value in zip(averages, before, strict=True):  # No branch: replicas must not meet in one.
            average.assign(tf.where(self._skipped(), value, average.value))

    def _overwrite_model_variables_with_average_value(self, trainable_variables: list) -> None:
        def overwrite() -> tf.Tensor:
            super(AveragesOfStepsTaken, self)._overwrite_model_variables_with_average_value(trainable_variables)
            return tf.constant(True)

        tf.cond(self._skipped(), lambda: tf.constant(False), overwrite)

    def finalize_variable_values(self, var_list: list) -> None:
        """Puts the averages in place of the weights at the end of `fit`, whatever became of the last step."""
        if self.use_ema:
            super()._overwrite_model_variables_with_average_value(var_list)
