"""Moving averages of Kronecker approximations over refreshes.

Factors of a term have a free scale (`c·A`, `G/c`) and, in a second term, a free sign, so averaging factors one by one
would average something that means nothing. Here the sums themselves are averaged and recompressed: the best
approximation with as many terms of `(1−w)·old + w·new` follows exactly from the small Gram matrix of Frobenius inner
products of the terms in play, and depends on no sign and no scale. KFAC's own factors have a scale of their own (they
are second moments) and are averaged as KFAC does, one by one.
"""

from __future__ import annotations

import tensorflow as tf

from keras_kpsvd.linalg import recompress

Pair = tuple[tf.Tensor, tf.Tensor]


def average_weight(count: tf.Tensor, decay: float) -> tf.Tensor:
    """The weight of the newest of `count + 1` terms in a bias-corrected exponential average, `(1−ρ)/(1−ρ^{count+1})`.

    The first average is the first value itself, so no start value has to be forgotten.
    """
    # In float32 a decay near 1 would round to 1, and the weight to 0/0.
    decay = tf.constant(decay, tf.float64)
    return tf.cast((1 - decay) / (1 - tf.pow(decay, tf.cast(count, tf.float64) + 1)), tf.float32)


def average_terms(
    old: tuple[Pair, ...], new: tuple[Pair, ...], weight: tf.Tensor, *, factorwise: bool, trace: tf.Tensor | None = None
) -> tuple[Pair, ...]:
    """`(1−w)·old + w·new`, kept to as many terms as came.

    Args:
        old: one or two pairs `(A, G)`: the base term, positive semi-definite, and a correction.
        new: as many.
        weight: `w`, scalar; 1 forgets `old`, which must be finite.
        factorwise: average the factors of the base term one by one, as KFAC does; otherwise the base term of the
            average is the best single term of the averaged base terms, again positive semi-definite (Perron–Frobenius).
        trace: the scale of the base: its first factor is scaled to this trace, the second inversely, so that a free
            scale is fixed. None keeps the scale that came.

    Returns:
        As many pairs. A correction is the best single term of the averaged sum less the averaged base.
    """
    weight = tf.cast(weight, new[0][0].dtype)
    if factorwise:
        base = tuple(before + weight * (now - before) for before, now in zip(old[0], new[0], strict=True))
    else:
        ((a, g),) = recompress((_scaled(old[0], 1 - weight), _scaled(new[0], weight)), 1, symmetric=True).terms
        base = (a, g)
    if trace is not None:
        base = rescale_to_trace(base, trace)
    if len(new) == 1:
        return (base,)
    averaged = (*(_scaled(pair, 1 - weight) for pair in old), *(_scaled(pair, weight) for pair in new))
    ((p, q),) = recompress((*averaged, _scaled(base, -1.0)), 1, symmetric=True).terms
    return base, (p, q)


def rescale_to_trace(pair: Pair, trace: tf.Tensor) -> Pair:
    """The same Kronecker product with `tr A = trace`; unchanged where either trace is not positive."""
    a, g = pair
    own = tf.linalg.trace(a)
    usable = (own > 0) & (trace > 0)
    factor = tf.where(usable, trace / tf.where(usable, own, tf.ones_like(own)), tf.ones_like(own))
    factor = tf.where(tf.math.is_finite(factor) & (factor > 0), factor, tf.ones_like(factor))
    return a * factor, g / factor


def _scaled(pair: Pair, factor: tf.Tensor | float) -> Pair:
    return pair[0] * factor, pair[1]
