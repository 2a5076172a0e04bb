"""Which predictive distribution a compiled loss stands for, and by what it scales its logarithm.

A loss that Keras averages over outputs is a scaled negative log-likelihood, `loss = mean_n κ_n · (−log p(y_n | z_n))`:
with `c` outputs averaged over, `κ = 1/c`. What follows from the density is in `likelihoods`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kpsvd.likelihoods import Head

_LOSSES = {
    keras.losses.binary_crossentropy: "bernoulli",
    keras.losses.categorical_crossentropy: "categorical",
    keras.losses.sparse_categorical_crossentropy: "categorical",
    keras.losses.mean_squared_error: "normal",
}


def heads(
    likelihood: str | Callable,
    model: keras.Model | None,
    outputs: Any,
    sample_weight: Any = None,
) -> list[Head]:
    """One `Head` for each output that has a loss.

    Args:
        likelihood: "auto", one of `likelihoods.NAMES`, or a callable `z -> tfp.distributions.Distribution`.
        model: the outermost model, compiled or not; None in loops without one.
        outputs: what the model returned: a tensor or a nest of tensors.
        sample_weight: as the model's loss received it.

    A named or callable likelihood holds for every output. Where the loss is not known (hand-written loops), it is taken
    to be Keras's own: the mean over the batch of the mean over outputs; a callable's, the mean over the batch of `−log
    p`.

    Raises:
        ValueError: the density can't be known; the message names `likelihood`.
    """
    flat = keras.tree.flatten(outputs)
    losses, loss_weights = _compiled(model, flat, outputs)
    if sample_weight is None:
        weights = [None] * len(flat)
    else:
        weights = keras.tree.flatten(sample_weight)
        weights = weights * len(flat) if len(weights) == 1 else weights
    found = []
    for output, loss, loss_weight, weight in zip(flat, losses, loss_weights, weights, strict=True):
        if loss is None and model is not None and any(other is not None for other in losses):
            continue
        family, from_logits, reduction = _family(likelihood, loss, model)
        before = getattr(output, "_keras_logits", None)
        discrete = family in ("bernoulli", "categorical")
        logits = not discrete or before is not None or from_logits is not False
        z = before if discrete and before is not None else output
        kappa = _scale(family, reduction, z) * (1.0 if loss_weight is None else loss_weight)
        elements = _element_weights(output, weight, reduction)
        found.append(Head(z, family, logits, kappa if elements is None else kappa * elements))
    return found


def _compiled(model: keras.Model | None, flat: list, outputs: Any) -> tuple[list, list]:
    """Losses and loss weights in the order of the flattened outputs; None where there is none."""
    nothing = [None] * len(flat)
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None:
        return nothing, nothing
    names = getattr(model, "output_names", None)

    def spread(value):
        if isinstance(value, dict):
            if isinstance(outputs, dict):  # Flattening orders keys by its own rule.
                place = keras.tree.pack_sequence_as(outputs, list(range(len(flat))))
                return [value.get(key) for key in sorted(outputs, key=place.get)]
            return [value.get(name) for name in names or []]
        if keras.tree.is_nested(value):
            return list(keras.tree.flatten(value))
        return [value] * len(flat)

    losses = spread(model.loss)
    weights = spread(compiled._user_loss_weights)
    if len(losses) != len(flat) or len(weights) != len(flat):
        raise ValueError(
            "`likelihood`='auto' needs one loss for each output. "
            f"Received {len(losses)} losses and {len(weights)} loss weights for {len(flat)} outputs: "
            f"loss={model.loss!r}"
        )
    return losses, weights


def _family(
    likelihood: str | Callable, loss: Any, model: keras.Model | None
) -> tuple[str | Callable, bool | None, str]:
    """`(family, from_logits or None if unknown, reduction)`."""
    resolved = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = getattr(resolved, "fn", resolved)
    options = getattr(resolved, "_fn_kwargs", {})
    reduction = getattr(resolved, "reduction", "sum_over_batch_size")
    known = _LOSSES.get(function) if callable(function) else None
    standard = options.get("axis", -1) == -1 and options.get("ignore_class") is None
    from_logits = options.get("from_logits", False) if known else None
    if likelihood != "auto":
        return likelihood, from_logits, reduction
    if known is None or not standard or reduction in (None, "none"):
        named = "no compiled loss" if model is None or loss is None else f"loss={loss!r}"
        raise ValueError(
            "`likelihood`='auto' knows the predictive distribution of binary_crossentropy, categorical_crossentropy, "
            "sparse_categorical_crossentropy and mean_squared_error over the last axis, reduced to a scalar. Pass "
            "likelihood='bernoulli', 'categorical', 'normal' or a callable from the model's output to a "
            f"tfp.distributions.Distribution to KPSVD. Received: {named}"
        )
    return known, from_logits, reduction


def _scale(family: str | Callable, reduction: str, outputs: tf.Tensor) -> tf.Tensor | float:
    """`κ` of one example: the loss is `mean_n κ (−log p_n)`."""
    summed = reduction in ("sum", None, "none")
    shape = tf.shape(outputs)
    batch = tf.cast(shape[0], tf.float32)
    if callable(family):
        return batch if summed else 1.0
    if family == "categorical":
        averaged = tf.constant(1.0) if summed else tf.cast(tf.reduce_prod(shape[1:-1]), tf.float32)
    else:
        averaged = tf.cast(shape[-1] if summed else tf.reduce_prod(shape[1:]), tf.float32)
    return (batch if summed else 1.0) / averaged


def _element_weights(output: tf.Tensor, sample_weight: Any, reduction: str) -> tf.Tensor | None:
    """Sample weights and Keras mask as one factor over `[batch, ...]`, scaled as the loss scales them."""
    mask = getattr(output, "_keras_mask", None)
    if mask is not None:
        mask = tf.cast(mask, tf.float32)
        if reduction in ("mean", "sum_over_batch_size"):
            mask *= tf.math.divide_no_nan(tf.cast(tf.size(mask), tf.float32), tf.reduce_sum(mask))
    if sample_weight is None:
        weight = mask
    else:
        weight = tf.cast(sample_weight, tf.float32)
        if weight.shape.rank is not None and weight.shape.rank > 1 and weight.shape.rank >= output.shape.rank:
            weight = weight[..., 0]
        if mask is not None:
            weight = weight * mask if weight.shape.rank == mask.shape.rank else weight[:, None] * mask
    if weight is None:
        return None
    per_value = output.shape.rank - 1
    if reduction == "mean_with_sample_weight":
        spread = tf.cast(tf.reduce_prod(tf.shape(output)[:per_value]), tf.float32)
        spread /= tf.cast(tf.reduce_prod(tf.shape(output)[weight.shape.rank : per_value]), tf.float32)
        weight = weight * tf.math.divide_no_nan(spread, tf.reduce_sum(weight))
    return weight
