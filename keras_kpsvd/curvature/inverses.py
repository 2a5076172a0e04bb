"""Preconditioners of Kronecker terms as they are: what a block keeps of them, and how they are made anew.

Of one term the damped inverses of both factors, whole or truncated; of two terms these and the second as a low-rank
correction (`linalg.solve`).
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kpsvd.curvature.approximations import TWO_TERM_METHODS, Pair
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.packing import unpacked
from keras_kpsvd.curvature.probes import inverts, orthonormalises
from keras_kpsvd.linalg import (
    Inverse,
    TruncatedInverse,
    all_finite,
    apply_corrected,
    apply_one_term,
    correction_rank,
    factor_damping,
    invert_one_term,
    one_term_and_correction,
)
from keras_kpsvd.tracing import traced_once

# Eigenpairs kept of a factor, and of the second term on either side; up to twice as many rows are inverted whole.
# Half as many cost nothing on CURVES and 2 % of the loss on MNIST, twice as many gained nothing; see its log in
# benchmarks/README.md.
RANK = 64


class KroneckerInverses:
    """Variables of one block: `A_λ⁻¹`, `G_λ⁻¹`, and the second term in the basis that both terms share.

    Args:
        shape: `(d_in, d_out)`.
        options: of the block.
        add: makes a variable from a shape, a name and an initializer.
    """

    # Refreshes make nothing of it.
    refresh_targets: tuple[keras.Variable, ...] = ()

    def __init__(self, shape: tuple[int, int], options: CurvatureOptions, add: Callable[..., keras.Variable]):
        self._options = options
        self._inverses = []
        for side, size in zip("AG", shape, strict=True):
            if size <= 2 * RANK:
                self._inverses.append([add((size, size), f"{side}_inverse", "identity")])
            else:
                names = {"basis": (size, RANK), "weights": (RANK,)}
                parts = [add(sizes, f"{side}_{name}") for name, sizes in names.items()]
                self._inverses.append([*parts, add((), f"{side}_shift", "ones")])
        self._second = []
        if options.method in TWO_TERM_METHODS:
            ranks = [correction_rank(size, RANK) for size in shape]
            sizes = zip(shape, ranks, strict=True)
            self._second = [add(pair, name) for pair, name in zip(sizes, ("K1", "K2"), strict=True)]
            self._second += [add((rank,), name) for rank, name in zip(ranks, ("s1", "s2"), strict=True)]

    @property
    def variables(self) -> list[keras.Variable]:
        """What the values of `invert` are assigned to."""
        return [*self._inverses[0], *self._inverses[1], *self._second]

    def inverses(self) -> tuple[Inverse, Inverse]:
        """`A_λ⁻¹` and `G_λ⁻¹`, the identity before the first."""
        tensors = [[tf.convert_to_tensor(variable) for variable in side] for side in self._inverses]
        return tuple(side[0] if len(side) == 1 else TruncatedInverse(*side) for side in tensors)

    def _correction(self) -> list[tf.Tensor]:
        return [tf.convert_to_tensor(variable) for variable in self._second]

    def invert(
        self, terms: tuple[Pair, ...], known: tf.Tensor, damping: tf.Tensor, factored: tf.Tensor | float
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The next values of `variables`, the old ones where that fails, and whether they are good.

        Args:
            terms: packed.
            known: whether there was a refresh.
            damping: λ.
            factored: of no meaning here: factors are what is damped.
        """
        old = (*self.inverses(), *self._correction())
        try:
            return traced_once(_invert, self._options, terms, old, known, damping)
        except tf.errors.OpError:
            # Eagerly all sorts of things can raise. In a graph a failed decomposition is NaN, or refused by the probe.
            return tf.nest.flatten(old), tf.constant(False)

    def precondition(self, matrix: tf.Tensor) -> tf.Tensor:
        """`A_λ⁻¹ ∇ G_λ⁻¹`, or its two-term form."""
        if self._second:
            rule = self._options.indefinite
            return apply_corrected(*self.inverses(), *self._correction(), matrix, indefinite=rule)
        return apply_one_term(*self.inverses(), matrix)


def _invert(
    options: CurvatureOptions, terms: tuple[Pair, ...], old: tuple, known: tf.Tensor, damping: tf.Tensor
) -> tuple[list[tf.Tensor], tf.Tensor]:
    terms = unpacked(terms)
    a, g = terms[0]
    lam_a, lam_g = factor_damping(a, g, tf.cast(damping, a.dtype), options.damping_rule)
    # Without a refresh the factors are zeros: any damping makes them harmless, the result is not used.
    lam_a, lam_g = (tf.where(known, value, tf.ones_like(value)) for value in (lam_a, lam_g))
    starts = tuple(one.basis if isinstance(one, TruncatedInverse) else None for one in old[:2])
    if len(terms) == 2:
        new = one_term_and_correction(a, g, *terms[1], lam_a, lam_g, RANK, starts)
    else:
        new = invert_one_term(a, g, lam_a, lam_g, starts)
    flat = tf.nest.flatten(new)
    good = all_finite(*flat) & inverts(new[0], a, lam_a) & inverts(new[1], g, lam_g)
    if len(terms) == 2:
        good &= orthonormalises(new[2], new[0], a, lam_a) & orthonormalises(new[3], new[1], g, lam_g)
    values = [tf.where(known & good, now, before) for now, before in zip(flat, tf.nest.flatten(old), strict=True)]
    return values, good | ~known
