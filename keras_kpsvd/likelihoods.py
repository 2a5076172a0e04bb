"""Predictive distributions: their gradients at sampled or at all targets, and how many targets there are.

A compiled loss is a scaled negative log-likelihood, `loss = mean_n κ_n · (−log p(y_n | z_n))` (`loss_densities`); the
curvature of that loss (its generalised Gauss–Newton matrix) is `E_n[κ_n E_y[∇log p ∇log pᵀ]]` (Martens 2020, §9). All
gradients here therefore carry the factor `√κ_n`, so that the second moment of what they back-propagate to is the
curvature of the loss as compiled, whatever its reduction.

Only callables need `tensorflow_probability`, which takes a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kpsvd.linalg import sum_in_order

NAMES = ("categorical", "bernoulli", "normal")
MAX_EXACT = 256


class Head(NamedTuple):
    """One output of a model and what its loss says of it.

    Attributes:
        outputs: `z`, `[batch, ...]`: logits where they are known, else what the model returned.
        family: one of `NAMES`, or the user's callable `z -> Distribution`.
        logits: whether `outputs` are logits rather than probabilities (of no meaning for "normal" and callables).
        weight: `κ`, a scalar or broadcastable to `outputs` from the left over `[batch, ...]`.
    """

    outputs: tf.Tensor
    family: str | Callable[[tf.Tensor], Any]
    logits: bool
    weight: tf.Tensor | float


def check(likelihood: str | Callable, fisher: str = "sampled") -> None:
    """Raises a ValueError that names `likelihood` if it is none of the accepted values, or none for `fisher`."""
    if likelihood != "auto" and likelihood not in NAMES and not callable(likelihood):
        expected = ", ".join(repr(name) for name in ("auto", *NAMES))
        raise ValueError(
            f"`likelihood` must be one of {expected}, or a callable from the model's output to a "
            f"tfp.distributions.Distribution. Received: likelihood={likelihood!r}"
        )
    if fisher == "exact" and callable(likelihood):
        raise _without_expectation(likelihood)


def _without_expectation(likelihood: Callable) -> ValueError:
    return ValueError(
        f"`fisher`='exact' knows the expectation over targets of {', '.join(NAMES)} only; use fisher='sampled' with a "
        f"callable likelihood. Received: likelihood={likelihood!r}"
    )


def targets(head: Head) -> tf.Tensor:
    """How many numbers the targets of a batch are, float32 scalar: labels, or entries.

    Of a callable's density those of a draw. Only the part that has a positive weight counts.
    """
    if callable(head.family):
        drawn = tf.nest.flatten(head.family(_leaf(head)).sample(seed=tf.constant([0, 0])))
        count = sum_in_order([tf.size(one, out_type=tf.int64) for one in drawn])
    else:
        sizes = tf.shape(head.outputs, out_type=tf.int64)
        count = tf.reduce_prod(sizes[:-1] if head.family == "categorical" else sizes)
    weighted = tf.cast(tf.convert_to_tensor(head.weight, tf.float32) > 0, tf.float32)
    part = tf.math.divide_no_nan(tf.reduce_sum(weighted), tf.cast(tf.size(weighted), tf.float32))
    return part * tf.cast(count, tf.float32)


def sampled_cotangent(head: Head, seed: tf.Tensor) -> tf.Tensor:
    """`√κ ∂(−log p(y|z))/∂z` at targets drawn from `p(·|z)`.

    By logits that is `p − y` for "bernoulli" and "categorical" (`y` one-hot); where the outputs are probabilities `o`,
    `(o − y)/(o(1 − o))` and `1/Σo − y/o`. Mean squared error is the negative log-likelihood of a normal of variance
    1/2, to a constant: `2(z − y)`.

    Args:
        head: the output and its density.
        seed: `[2]` integers; equal seeds draw equal targets, and nobody else's random numbers are touched.

    Returns:
        float tensor of the shape of `head.outputs`.
    """
    outputs = _leaf(head)
    shape, dtype = tf.shape(outputs), outputs.dtype
    if callable(head.family):
        return _weighted(head, _drawn_score(head.family, outputs, seed))
    if head.family == "normal":
        draws = tf.random.stateless_normal(shape, seed, dtype=dtype)
        return _weighted(head, 2.0**0.5 * draws + 0.0 * outputs)  # NaN where the output is.
    tiny = tf.constant(keras.config.epsilon(), dtype)
    if head.family == "bernoulli":
        p = tf.sigmoid(outputs) if head.logits else tf.clip_by_value(outputs, tiny, 1 - tiny)
        score = p - tf.cast(tf.random.stateless_uniform(shape, seed, dtype=dtype) < p, dtype)
        return _weighted(head, score if head.logits else score / (p * (1 - p)))
    p, total = _class_probabilities(head, outputs)
    logits = outputs if head.logits else tf.math.log(tf.clip_by_value(p, tiny, 1.0))
    drawn = tf.random.stateless_categorical(tf.reshape(logits, [-1, shape[-1]]), 1, seed, dtype=tf.int32)
    targets = tf.reshape(tf.one_hot(drawn[:, 0], shape[-1], dtype=dtype), shape)
    score = p - targets if head.logits else (1 - targets / tf.clip_by_value(p, tiny, 1.0)) / total
    return _weighted(head, tf.ensure_shape(score, outputs.shape))


def _drawn_score(family: Callable, outputs: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """`∂(−log p(y|z))/∂z` at a draw from the distribution that a callable makes of `z`."""
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        distribution = family(outputs)
        targets = tf.stop_gradient(distribution.sample(seed=seed))
        log_likelihood = distribution.log_prob(targets)
    gradient = tape.gradient(log_likelihood, outputs)
    if gradient is None:
        raise ValueError(
            "`likelihood` must return a distribution whose `log_prob` depends on the model's output. "
            f"Received: likelihood={family!r}"
        )
    return -gradient


def exact_cotangents(head: Head) -> tf.Tensor:
    """Cotangents `[k, batch, ...]` whose outer products sum to `κ E_y[∇log p ∇log pᵀ]`: no target is drawn.

    For "bernoulli" and "normal" one for each output, `√(p(1−p)) e_i` and `√2 e_i`; for "categorical" one for each class
    at each position, `√p_i (p − e_i)`; by logits, and by the chain rule where the outputs are probabilities.

    Raises:
        ValueError: more than `MAX_EXACT` outputs per example, or a callable likelihood.
    """
    outputs = _leaf(head)
    width = outputs.shape[1:].num_elements()
    if callable(head.family):
        raise _without_expectation(head.family)
    if width is None or width > MAX_EXACT:
        raise ValueError(
            f"`fisher`='exact' sums over every output and is meant for at most {MAX_EXACT} of them; "
            "use fisher='sampled'. "
            f"Received an output of shape {tuple(outputs.shape)}."
        )
    if head.family == "normal":
        deviation = tf.fill(tf.shape(outputs), tf.constant(2.0**0.5, outputs.dtype))
    elif head.family == "bernoulli" and head.logits:
        deviation = tf.sqrt(tf.sigmoid(outputs) * tf.sigmoid(-outputs))
    elif head.family == "bernoulli":
        probabilities = tf.clip_by_value(outputs, keras.config.epsilon(), 1 - keras.config.epsilon())
        deviation = tf.math.rsqrt(probabilities * (1 - probabilities))
    else:
        probabilities, total = _class_probabilities(head, outputs)
        probabilities = tf.clip_by_value(probabilities, keras.config.epsilon(), 1.0)
        classes = outputs.shape[-1]
        unit = tf.eye(classes, dtype=outputs.dtype)
        if head.logits:
            # ∂(−log p_i)/∂z = p − e_i, drawn with probability p_i; axis 1 runs over i.
            each = tf.sqrt(probabilities)[..., None] * (probabilities[..., None, :] - unit)
        else:
            # −log(o_i/Σo) has the gradient (1 − e_i/p_i)/Σo.
            root = tf.sqrt(probabilities)[..., None]
            each = (root - unit / root) / total[..., None]
        positions = width // classes
        each = tf.reshape(each, [-1, positions, classes, classes])
        spread = tf.einsum("npij,pq->pinqj", each, tf.eye(positions, dtype=outputs.dtype))
        return _weighted(head, tf.reshape(spread, tf.concat([[width], tf.shape(outputs)], 0)), batch_axis=1)
    flat = tf.linalg.diag(tf.reshape(deviation, [-1, width]))
    stacked = tf.reshape(tf.transpose(flat, [1, 0, 2]), tf.concat([[width], tf.shape(outputs)], 0))
    return _weighted(head, stacked, batch_axis=1)


def draws_per_example(heads: list[Head]) -> int:
    """How many cotangents `exact_cotangents` makes of each example, all outputs together."""
    return sum(head.outputs.shape[1:].num_elements() for head in heads)


def logit_change(head: Head, tangents: list[tf.Tensor]) -> tf.Tensor | None:
    """Mean inner products of changes of the logits: what a step that trusts the quadratic model must bound.

    The densities of "bernoulli" and "categorical" are far from quadratic over more than a few logits, and where they
    are saturated their Fisher matrix is zero and bounds nothing.

    Args:
        head: the output and its density.
        tangents: `k` tensors of the shape of its outputs.

    Returns:
        `[k, k]`, float32: the mean over examples (and positions) of the inner product over classes, less what all
        classes share, for "categorical"; the mean over examples and outputs for "bernoulli". None for "normal", which
        is quadratic, and where `outputs` are no logits.
    """
    if callable(head.family) or head.family == "normal" or not head.logits:
        return None
    stacked = tf.stack([tf.cast(tangent, tf.float32) for tangent in tangents])
    averaged = tf.size(stacked[0])
    if head.family == "categorical":
        stacked -= tf.reduce_mean(stacked, axis=-1, keepdims=True)
        averaged //= tf.maximum(tf.shape(stacked)[-1], 1)
    flat = tf.reshape(stacked, [len(tangents), -1])
    return tf.matmul(flat, flat, transpose_b=True) / tf.cast(tf.maximum(averaged, 1), tf.float32)


def fisher_inner(head: Head, tangents: list[tf.Tensor], seed: tf.Tensor, draws: int = 16) -> tf.Tensor:
    """`E_n[κ_n t_iᵀ F_z t_j]` for changes `t` of the outputs, `F_z` the Fisher matrix of the predictive distribution at
    `z`.

    Args:
        head: the output and its density.
        tangents: `k` tensors of the shape of its outputs.
        seed: `[2]` integers, for callables.
        draws: callables only: `F_z` is the mean outer product of the score at so many draws a example.

    Returns:
        `[k, k]`, float32, symmetric positive semi-definite.
    """
    outputs = _leaf(head)
    stacked = tf.stack([tf.cast(tangent, outputs.dtype) for tangent in tangents])
    if callable(head.family):
        repeated = head._replace(
            outputs=tf.tile(outputs, tf.concat([[draws], tf.ones([outputs.shape.rank - 1], tf.int32)], 0)),
            weight=1.0,
        )
        scores = tf.reshape(sampled_cotangent(repeated, seed), tf.concat([[draws], tf.shape(outputs)], 0))
        axes = list(range(2, scores.shape.rank))
        images = [
            tf.reduce_sum(_weighted(head, scores, batch_axis=1) * tangent, axis=axes) for tangent in tf.unstack(stacked)
        ]
        flat = tf.stack([tf.reshape(image, [-1]) for image in images])
        return tf.cast(tf.matmul(flat, flat, transpose_b=True) / tf.cast(tf.shape(flat)[1], flat.dtype), tf.float32)
    stacked = _weighted(head, stacked, batch_axis=1)
    tiny = keras.config.epsilon()
    if head.family == "normal":
        images = 2.0 * stacked
    elif head.family == "bernoulli":
        p = tf.sigmoid(outputs) if head.logits else tf.clip_by_value(outputs, tiny, 1 - tiny)
        variance = p * (1 - p)
        images = stacked * variance if head.logits else stacked / variance
    else:
        p, total = _class_probabilities(head, outputs)
        if head.logits:
            images = p * (stacked - tf.reduce_sum(p * stacked, axis=-1, keepdims=True))
        else:
            images = stacked / tf.clip_by_value(p, tiny, 1.0) - tf.reduce_sum(stacked, axis=-1, keepdims=True)
            images /= tf.square(total)
    count = len(tangents)
    one, other = tf.reshape(stacked, [count, -1]), tf.reshape(images, [count, -1])
    products = tf.matmul(one, other, transpose_b=True) / tf.cast(tf.maximum(tf.shape(outputs)[0], 1), outputs.dtype)
    return tf.cast(0.5 * (products + tf.transpose(products)), tf.float32)


def _leaf(head: Head) -> tf.Tensor:
    """The outputs as a constant, in float32 at least."""
    outputs = head.outputs if head.outputs.dtype == tf.float64 else tf.cast(head.outputs, tf.float32)
    return tf.stop_gradient(outputs)


def _class_probabilities(head: Head, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Probabilities of the classes, and the sums `[..., 1]` that Keras's losses divide outputs by to have them."""
    if head.logits:
        return tf.nn.softmax(outputs), tf.ones_like(outputs[..., :1])
    total = tf.reduce_sum(outputs, axis=-1, keepdims=True)
    total = tf.maximum(total, tf.constant(keras.config.epsilon(), outputs.dtype))
    return outputs / total, total


def _weighted(head: Head, cotangent: tf.Tensor, batch_axis: int = 0) -> tf.Tensor:
    weight = tf.sqrt(tf.cast(head.weight, cotangent.dtype))
    missing = cotangent.shape.rank - batch_axis - weight.shape.rank
    if weight.shape.rank > 0:
        weight = tf.reshape(weight, tf.concat([tf.shape(weight), tf.ones([missing], tf.int32)], 0))
    return cotangent * weight
