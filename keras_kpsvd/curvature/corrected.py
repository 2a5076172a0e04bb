"""Preconditioners of corrected eigenvalues: what a block keeps of them, and how they are made anew.

See `linalg.eigenbasis`. The factors' eigenvectors are found anew where a preconditioner is due, and what was known of
the diagonal `S` is carried over into them; each refresh then averages the diagonal that its own samples have in them.
So a step knows the latest batch exactly, and older ones as far as the bases have not turned since.

`S + λ` damps only where the block itself has little curvature. Where a batch says too little, that is too little
damping. How little it says is measured in two ways.

A step fits the noise of its own batch in every direction that is left free. How many these are is known, `Σ_l tr F̂_l
(F̂_l + λ_l)⁻¹` with the whole λ, and so is how many numbers a batch has to say: as many as it has targets (labels, or
pixels). The paper's auto-encoders leave 1 to 4 directions to each pixel; 30 layers, a heavy-tailed regression and a
classifier of 8 units at batches of 64 leave 10 to 60 to each label.

And `S` is a mean of squares, which may rest on a few of the examples: of a classifier on those that are not certain
yet, and on others in the next batch. How few is known, `κ = E_n[‖D_n‖⁴] / E_n[‖D_n‖²]²` (`linalg.length_kurtosis`) of
those that weigh something: 1 where all say as much, and with targets drawn 3 where each says the square of one normal
draw. What an example's targets say is a factor of its gradients in all layers; its activations and what leads back to a
layer are others: an auto-encoder with He's initialisation has a κ of 1.05 in its last layer and of 10 in its encoder.
So the most even block says how much the targets tell. Of auto-encoders, whose examples have hundreds of targets each,
it has a κ of 1.03 to 1.55; of a regression with one target 3 and more, of classifiers 3 to 100 once they have learnt
most. (`N` rows have at most `N`; the exact Fisher, which draws nothing, knows only how uneven the examples are: its κ
is less.)

Up to `ENOUGH` directions and a kurtosis of `EVEN` λ alone damps, from `TOO_MANY` or `UNEVEN` on the factors are damped
as K-FAC damps them, which holds back all directions in which either factor is small, and in between that part of the
way. The auto-encoders reach the same loss in two thirds of the epochs without K-FAC's damping; the others need it.
(More λ instead makes all of them slower.) It is so much more damping that λ is a tenth there of what it is without
(`FACTORED`). See benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kpsvd.curvature.approximations import Pair
from keras_kpsvd.curvature.averaging import average_weight
from keras_kpsvd.curvature.reduction import BatchCurvature
from keras_kpsvd.linalg import (
    all_finite,
    apply_diagonal,
    damped_diagonal,
    diagonal_of_samples,
    diagonal_of_weight_gradients,
    directions_left_free,
    factor_eigenbasis,
    length_kurtosis,
    multiplicities,
    split_damping,
    transported,
)
from keras_kpsvd.tracing import traced_once

# Kurtoses, and directions left free for each number of a batch, between which K-FAC's damping sets in.
EVEN, UNEVEN = 1.5, 2.0
ENOUGH, TOO_MANY = 5.0, 10.0

# What is left of λ where the factors are damped.
FACTORED = 0.1

# Of a damped eigenvalue: its inverse is finite in float32.
SMALLEST = 1e-35


class CorrectedEigenvalues:
    """Variables of one block: bases `U_A`, `U_G`, the factors' eigenvalues, the averaged `S`, and what divides by it.

    And the kurtosis of the examples' gradients, averaged likewise.

    Args:
        shape: `(d_in, d_out)`.
        rank: eigenvectors kept of a factor of more than twice as many rows; of smaller ones all.
        rule: how factors are damped, where they are.
        add: makes a variable from a shape, a name and an initializer.
    """

    def __init__(self, shape: tuple[int, int], rank: int, rule: str, add: Callable[..., keras.Variable]):
        self._rule = rule
        columns = [size if size <= 2 * rank else rank for size in shape]
        sizes = tuple(kept + (size > kept) for size, kept in zip(shape, columns, strict=True))
        self._bases = [
            add((size, kept), f"{side}_basis", "identity" if size == kept else "zeros")
            for side, size, kept in zip("AG", shape, columns, strict=True)
        ]
        self._sides = [add((size,), f"{side}_eigenvalues") for side, size in zip("AG", sizes, strict=True)]
        self._diagonal = add(sizes, "eigenvalues")
        self.kurtosis = add((), "kurtosis")
        self._weights = add(sizes, "weights", "ones")

    @property
    def variables(self) -> list[keras.Variable]:
        """What the values of `invert` are assigned to."""
        return [self._weights]

    @property
    def refresh_targets(self) -> list[keras.Variable]:
        """What the values of `refreshed` are assigned to."""
        return [*self._bases, *self._sides, self._diagonal, self.kurtosis]

    def values(self) -> list[tf.Tensor]:
        """The same as tensors, `S` with an axis more: so its sizes are left open where graphs are shared."""
        *others, diagonal, kurtosis = (tf.convert_to_tensor(variable) for variable in self.refresh_targets)
        return [*others, tf.expand_dims(diagonal, 1), kurtosis]

    def directions_left_free(self, damping: tf.Tensor) -> tf.Tensor:
        """`tr F̂ (F̂ + λI)⁻¹`, float32 scalar."""
        *bases, _, _, diagonal, _ = self.values()
        return traced_once(_directions, None, diagonal, tf.cast(damping, diagonal.dtype), *bases)

    def invert(
        self, terms: tuple[Pair, ...], known: tf.Tensor, damping: tf.Tensor, factored: tf.Tensor | float
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The next weights, the old ones where they are not finite, and whether they are good.

        Args:
            terms: of no meaning here: refreshes have decomposed them.
            known: whether there was a refresh.
            damping: λ.
            factored: `φ` of `linalg.damped_diagonal`.
        """
        *values, _ = self.values()
        damping, factored = (tf.cast(one, self._diagonal.dtype) for one in (damping, factored))
        old = tf.convert_to_tensor(self._weights)
        new = tf.ensure_shape(traced_once(_inverted, self._rule, *values, damping, factored), old.shape)
        return _new_or_old(new, old, known)

    def precondition(self, matrix: tf.Tensor) -> tf.Tensor:
        """The damped inverse times `vec(∇)`, `[d_in, d_out]`."""
        return apply_diagonal(*(tf.convert_to_tensor(one) for one in (*self._bases, self._weights)), matrix)


def _directions(_: None, diagonal: tf.Tensor, damping: tf.Tensor, *bases: tf.Tensor) -> tf.Tensor:
    return tf.cast(directions_left_free(tf.squeeze(diagonal, 1), damping, *bases), tf.float32)


def _inverted(
    rule: str,
    a_basis: tf.Tensor,
    g_basis: tf.Tensor,
    a_values: tf.Tensor,
    g_values: tf.Tensor,
    diagonal: tf.Tensor,
    damping: tf.Tensor,
    factored: tf.Tensor,
) -> tf.Tensor:
    means = []
    for basis, values in ((a_basis, a_values), (g_basis, g_values)):
        counts = multiplicities(basis)
        means.append(tf.reduce_sum(counts * values) / tf.reduce_sum(counts))
    split = split_damping(*means, damping, rule)
    damped = damped_diagonal(tf.squeeze(diagonal, 1), a_values, g_values, damping, split, factored)
    # The bases have turned by now: the last weights belong to others, so that new ones must be finite.
    return 1 / tf.maximum(damped, diagonal.dtype.as_numpy_dtype(SMALLEST))


def _new_or_old(new: tf.Tensor, old: tf.Tensor, known: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
    """The new weights where they are finite and there is curvature; whether they are good."""
    good = all_finite(new)
    return [tf.where(known & good, new, old)], good | ~known


def factored_part(kurtoses: tf.Tensor, directions: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """`φ` of `linalg.damped_diagonal`: how little a batch has to say, by the larger of two measures.

    Args:
        kurtoses: of blocks, `linalg.length_kurtosis`, `[blocks]` float32, 0 where nothing is known. The smallest of the
            others counts.
        directions: that all layers leave free, scalar.
        numbers: of a batch; 0 if nothing is known of it.

    Returns:
        Scalar in [0, 1], float32.
    """
    share = tf.math.divide_no_nan(directions, tf.cast(numbers, tf.float32))
    most = tf.reduce_max(tf.math.reciprocal_no_nan(kurtoses))  # The part of the examples that the most even rests on.
    parts = [(tf.math.reciprocal_no_nan(most) - EVEN) / (UNEVEN - EVEN), (share - ENOUGH) / (TOO_MANY - ENOUGH)]
    return tf.clip_by_value(tf.maximum(*parts), 0.0, 1.0)


def _eigenbasis(_: None, factor: tf.Tensor, start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return factor_eigenbasis(factor, start)


def refreshed(
    batch: BatchCurvature,
    factors: Pair,
    old: list[tf.Tensor],
    count: tf.Tensor,
    decay: float,
    turn: tf.Tensor,
    repeats: int = 1,
    weighing: tf.Tensor | float = 1.0,
) -> list[tf.Tensor]:
    """The next values of `CorrectedEigenvalues` from one more batch.

    Args:
        batch: its samples, or its `D_n`.
        factors: `(A, G)`, averaged, that batch included.
        old: the last values.
        count: refreshes before this one. 0: there is no diagonal yet.
        decay: ρ of the moving average.
        turn: whether to find the factors' eigenvectors anew; else those of last time stay.
        repeats: gradients of each example.
        weighing: the part of the examples that weigh something.
    """
    known = count > 0
    *old, kurtosis = old
    bases, diagonal = tuple(old[:2]), old[4]

    def turned():
        (a_values, a_basis), (g_values, g_basis) = (
            traced_once(_eigenbasis, None, factor, basis) for factor, basis in zip(factors, bases, strict=True)
        )
        carried = transported(diagonal, bases, (a_basis, g_basis))
        return [a_basis, g_basis, a_values, g_values, tf.where(known, carried, diagonal)]

    values = tf.cond(turn | ~known, turned, lambda: [tf.identity(one) for one in old])
    *kept, diagonal = (tf.ensure_shape(new, one.shape) for new, one in zip(values, old, strict=True))
    if batch.weight_gradients is not None:
        now = diagonal_of_weight_gradients(batch.weight_gradients, *kept[:2])
    else:
        now = diagonal_of_samples(batch.activations, batch.gradients, *kept[:2])
    weight = tf.cast(average_weight(count, decay), now.dtype)
    found = weighing * length_kurtosis(batch.squared_lengths(), repeats)  # A mean over those that weigh something.
    # Nothing says nothing: then the kurtosis stays.
    kurtosis += tf.where(tf.equal(found, 0), tf.zeros_like(found), weight * (found - kurtosis))
    return [*kept, diagonal + weight * (now - diagonal), kurtosis]
