"""What happens when numbers go wrong: one warning that names the layer, and an error when it does not stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd.reporting import SHOWN_LAYERS, run_python

# Consecutive failures of one kind after which training stops with an error.
MAX_FAILURES = 20


class Failures:
    """Counts consecutive failures, warns of each, and raises after `MAX_FAILURES` in a row.

    Args:
        layers: names of the layers, in order; several may be the same.
        add_variable: the optimizer's `add_variable`.
    """

    def __init__(self, layers: Sequence[str], add_variable: Callable[..., keras.Variable]):
        self._layers = list(layers)
        self._skipped = add_variable(shape=(), dtype="int64", name="skipped_steps")
        shape = (len(self._layers),)
        self._refreshes = add_variable(shape=shape, dtype="int64", name="refresh_failures")
        self._inversions = add_variable(shape=shape, dtype="int64", name="inversion_failures")

    def skipping(self) -> tf.Tensor:
        """Whether the last step was skipped, boolean scalar."""
        return self._skipped.value > 0

    def no_step_skipped(self) -> None:
        """The step was taken."""
        self._skipped.assign(0)

    def of_step(self, what: str, names: Sequence[str], finite: Sequence[tf.Tensor], intact: str) -> tf.Tensor:
        """The step is skipped.

        Args:
            what: holds NaN or Inf.
            names: of layers.
            finite: whether it does not, for each of them.
            intact: what is unchanged besides weights and momentum.
        """

        def message(bad: str) -> str:
            holder = f"{what} of layer {bad}" if bad else "its length"
            return f"KPSVD skipped a step: {holder} holds NaN or Inf. Weights and momentum{intact} are unchanged"

        count = self._skipped.value + 1
        self._skipped.assign(count)
        return _report(message, names, finite, count)

    def of_refresh(self, places: Sequence[int], good: Sequence[tf.Tensor]) -> None:
        """Curvature was refreshed, of the layers at `places`, where it is good."""
        self._of_layers(self._refreshes, "its new curvature is not finite, or wrong; the old one stays", places, good)

    def of_inversion(self, places: Sequence[int], good: Sequence[tf.Tensor]) -> None:
        """Preconditioners were made anew, of the layers at `places`, where they are good."""
        self._of_layers(self._inversions, "its decomposition failed; the last good preconditioner stays", places, good)

    def _of_layers(
        self, counts: keras.Variable, consequence: str, places: Sequence[int], good: Sequence[tf.Tensor]
    ) -> None:
        if not places:
            return
        flags = tf.stack(list(good))
        before = tf.convert_to_tensor(counts)
        now = tf.where(flags, tf.zeros([len(places)], before.dtype), tf.gather(before, list(places)) + 1)
        counts.assign(tf.tensor_scatter_nd_update(before, [[place] for place in places], now))
        names = [self._layers[place] for place in places]
        tf.cond(
            tf.reduce_all(flags),
            lambda: tf.constant(False),
            lambda: _report(lambda bad: f"KPSVD, layer {bad}: {consequence}", names, good, tf.reduce_max(now)),
        )


def _report(
    message: Callable[[str], str], names: Sequence[str], good: Sequence[tf.Tensor], consecutive: tf.Tensor
) -> tf.Tensor:
    """Warns, when the surrounding branch runs, of those that are not good, or raises where it is once too often.

    Python's own exceptions don't leave a graph as what they are: the error that arrives is TensorFlow's
    InvalidArgumentError, in every mode.
    """

    def tell(values: np.ndarray) -> None:
        *flags, count = values
        bad = list(dict.fromkeys(name for name, flag in zip(names, flags, strict=True) if not flag))
        shown = ", ".join(map(repr, bad[:SHOWN_LAYERS]))
        shown += f" and {len(bad) - SHOWN_LAYERS} more" if len(bad) > SHOWN_LAYERS else ""
        text = message(shown)
        if count >= MAX_FAILURES:
            raise ValueError(f"{text}. That was so {count} times in a row, and training stops here.")
        warnings.warn(f"{text}.", RuntimeWarning, stacklevel=2)

    flags = [tf.cast(flag, tf.int64) for flag in good]
    return run_python(tell, tf.stack([*flags, tf.cast(consecutive, tf.int64)]))
