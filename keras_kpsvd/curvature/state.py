"""One layer's curvature as an optimizer keeps it: averaged factors, and the preconditioner made of them."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kpsvd.curvature.approximations import KFAC_METHODS, TWO_TERM_METHODS, Pair, operator_terms
from keras_kpsvd.curvature.averaging import average_terms, average_weight
from keras_kpsvd.curvature.corrected import CorrectedEigenvalues, factored_part, refreshed
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.packing import flattened, unpacked
from keras_kpsvd.curvature.placement import on
from keras_kpsvd.curvature.probes import inverts, is_orthonormal, orthonormalises
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall, reduce_calls
from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import (
    Inverse,
    TruncatedInverse,
    all_finite,
    apply_corrected,
    apply_one_term,
    correction_rank,
    curvature_moments,
    factor_damping,
    invert_one_term,
    one_term_and_correction,
    pack,
    packed_size,
    sum_in_order,
)
from keras_kpsvd.tracing import traced_once

# Exact triples are trusted when the first one's residuals are within this part of its value. Where KFAC leaves hardly
# more than rounding it reaches 1e-2; later triples may be rounding altogether, and are then small.
TRIPLE_TOLERANCE = 0.1

# Eigenpairs kept of a factor, and of the second term on either side; up to twice as many rows are inverted whole.
# Half as many cost nothing on CURVES and 3 % of the loss on MNIST, twice as many gained 1 %; see benchmarks/README.md.
RANK = 64

# Steps of power iteration for several positions per example, from nothing and from the last refresh.
COLD_STEPS, WARM_STEPS = 12, 1


class BlockCurvature:
    """Variables of one block and the pure functions that compute their next values.

    Before the first good refresh the preconditioner is the identity: the block takes a plain gradient step.

    Args:
        prefix: of the variables' names.
        shape: `(d_in, d_out)`.
        dtype: of factors and preconditioner.
        options: shared choices.
        add_variable: the optimizer's `add_variable`.
    """

    def __init__(
        self,
        prefix: str,
        shape: tuple[int, int],
        dtype: str,
        options: CurvatureOptions,
        add_variable: Callable[..., keras.Variable],
    ):
        self.options = options
        self.shape = d_in, d_out = shape

        def add(shape: tuple[int, ...], name: str, initializer: str = "zeros") -> keras.Variable:
            return add_variable(shape=shape, dtype=dtype, name=f"{prefix}_{name}", initializer=initializer)

        self.two_term = options.method in TWO_TERM_METHODS
        names = [("A", "G"), ("P", "Q")] if self.two_term else [("A", "G")]
        self._packed = [(add((packed_size(d_in),), a), add((packed_size(d_out),), g)) for a, g in names]
        self.moments = add((2,), "moments")
        self.count = add_variable(shape=(), dtype="int64", name=f"{prefix}_refreshes", initializer="zeros")
        self._corrected = None
        if options.eigenvalues == "corrected":
            self._corrected = CorrectedEigenvalues(shape, RANK, add)
        self._inverses = []
        for side, size in (("A", d_in), ("G", d_out)):
            if self._corrected is not None:
                break
            if size <= 2 * RANK:
                self._inverses.append([add((size, size), f"{side}_inverse", "identity")])
            else:
                names = {"basis": (size, RANK), "weights": (RANK,)}
                parts = [add(shape, f"{side}_{name}") for name, shape in names.items()]
                self._inverses.append([*parts, add((), f"{side}_shift", "ones")])
        self._second = []
        if self.two_term:
            r_in, r_out = (correction_rank(size, RANK) for size in (d_in, d_out))
            self._second = [
                add((d_in, r_in), "K1"),
                add((d_out, r_out), "K2"),
                add((r_in,), "s1"),
                add((r_out,), "s2"),
            ]

    @property
    def corrects(self) -> bool:
        """Whether eigenvalues are corrected."""
        return self._corrected is not None

    @property
    def factors(self) -> list[Pair]:
        """`(A, G)`, then `(P, Q)` of a second term, as tensors `[d, d]`; kept as their lower triangles."""
        return list(unpacked(self._terms()))

    def _terms(self) -> tuple[Pair, ...]:
        """The same, packed."""
        return tuple((tf.convert_to_tensor(a), tf.convert_to_tensor(g)) for a, g in self._packed)

    def refresh(self, batch: BatchCurvature, turn: tf.Tensor | bool = True) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The averaged factors with one more batch in them, and whether they are good.

        Args:
            batch: what it says of the block.
            turn: with corrected eigenvalues, whether to find eigenvectors anew, for a preconditioner that is due.

        Returns:
            The next values of `refresh_targets`, the old ones where anything was not finite or triples that should be
            exact are not, and a scalar boolean.
        """
        old, count = self._terms(), tf.convert_to_tensor(self.count)
        moments = tf.convert_to_tensor(self.moments)
        spectrum = None
        if self._corrected is not None:
            *kept, diagonal = self._corrected.values()
            # With an axis more its sizes are left open where graphs are shared.
            spectrum = (*kept, diagonal[:, tf.newaxis], tf.convert_to_tensor(turn))
        arguments = (batch, old, moments, count, spectrum)
        try:
            return traced_once(_refresh, self.options, *arguments, sizes_matter=batch.sums_over_positions)
        except tf.errors.OpError:  # As in `invert`.
            kept = [] if self._corrected is None else self._corrected.values()
            return [*flattened(old), moments, *kept, count], tf.constant(False)

    @property
    def refresh_targets(self) -> list[keras.Variable]:
        """What the values of `refresh` are assigned to."""
        corrected = [] if self._corrected is None else self._corrected.refresh_targets
        return [*flattened(self._packed), self.moments, *corrected, self.count]

    @property
    def preconditioner(self) -> list[keras.Variable]:
        """What the values of `invert` are assigned to."""
        if self._corrected is not None:
            return [self._corrected.weights]
        return [*self._inverses[0], *self._inverses[1], *self._second]

    def inverses(self) -> tuple[Inverse, Inverse]:
        """`A_λ⁻¹` and `G_λ⁻¹` of the preconditioner, the identity before the first; not with corrected eigenvalues."""
        tensors = [[tf.convert_to_tensor(variable) for variable in side] for side in self._inverses]
        return tuple(side[0] if len(side) == 1 else TruncatedInverse(*side) for side in tensors)

    def directions_left_free(self, damping: tf.Tensor) -> tf.Tensor:
        """With corrected eigenvalues, in how many directions `damping` damps little, float32 scalar."""
        return self._corrected.directions_left_free(damping)

    def invert(self, damping: tf.Tensor, factored: tf.Tensor | float = 1.0) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The preconditioner of the current factors at `damping` (the paper's λ), and whether it is good.

        Args:
            damping: λ.
            factored: with corrected eigenvalues, how far the factors are damped too; see `curvature.corrected`.

        Returns:
            The next values of `preconditioner`, the old ones where the decomposition failed or its result does not
            reproduce a probe vector (with corrected eigenvalues refreshes decompose), and a scalar boolean. Without
            factors yet the old values are good.
        """
        if self._corrected is not None:
            new = self._corrected.inverted(damping, self.options.damping_rule, factored)
            return _new_or_old(new, tf.convert_to_tensor(self._corrected.weights), self.count > 0)
        terms = self._terms()
        second = [tf.convert_to_tensor(variable) for variable in self._second]
        old = (*self.inverses(), *second)
        try:
            return traced_once(_invert, self.options, terms, old, tf.convert_to_tensor(self.count) > 0, damping)
        except tf.errors.OpError:
            # Eagerly all sorts of things can raise. In a graph a failed decomposition is NaN, or refused by the probe.
            return tf.nest.flatten(old), tf.constant(False)

    def precondition(self, matrix: tf.Tensor) -> tf.Tensor:
        """The preconditioner times a gradient `[d_in, d_out]`: `A_λ⁻¹ ∇ G_λ⁻¹`, its two-term form or that of `S`."""
        matrix = tf.cast(matrix, self._packed[0][0].dtype)
        if self._corrected is not None:
            return self._corrected.precondition(matrix)
        inverses = self.inverses()
        if self.two_term:
            second = [tf.convert_to_tensor(variable) for variable in self._second]
            return apply_corrected(*inverses, *second, matrix, indefinite=self.options.indefinite)
        return apply_one_term(*inverses, matrix)


class LayerCurvature:
    """The blocks of one instrumented layer: one for most, one for each group of a grouped convolution.

    Args:
        layer: a built instrumented layer.
        options: shared choices.
        add_variable: the optimizer's `add_variable`.

    Attributes:
        cost: of its refreshes and inversions, in no unit, to compare layers by.
    """

    def __init__(self, layer: RecordingLayer, options: CurvatureOptions, add_variable: Callable[..., keras.Variable]):
        self.layer = layer
        self.options = options
        dtype = "float64" if layer.variable_dtype == "float64" else "float32"
        prefix = layer.path.replace("/", "_")
        shapes = layer.block_shapes
        names = [prefix] if len(shapes) == 1 else [f"{prefix}_block_{index}" for index in range(len(shapes))]
        self.cost = float(sum(d_in**3 + d_out**3 for d_in, d_out in shapes))
        self.blocks = [
            BlockCurvature(name, shape, dtype, options, add_variable) for name, shape in zip(names, shapes, strict=True)
        ]

    def moments_and_size(self) -> tuple[tf.Tensor, int]:
        """`linalg.curvature_moments` of the first term, `[2]` float32, 0 before the first refresh; how many weights."""
        of_blocks = tf.stack([tf.cast(tf.convert_to_tensor(block.moments), tf.float32) for block in self.blocks])
        traces, along = tf.unstack(of_blocks, axis=1)
        trace = tf.reduce_sum(traces)
        both = tf.stack([trace, tf.reduce_sum(tf.math.divide_no_nan(traces, trace) * along)])
        return both, sum(d_in * d_out for d_in, d_out in self.layer.block_shapes)

    def refresh(self, calls: list[LayerCall], turn: tf.Tensor | bool = True) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`BlockCurvature.refresh` of all blocks, good where all are."""
        method = self.options.method
        samples = method != "kfac" or self.options.eigenvalues == "corrected"
        batches = reduce_calls(self.layer, calls, base=method in KFAC_METHODS, svd=samples)
        return _joined([block.refresh(batch, turn) for block, batch in zip(self.blocks, batches, strict=True)])

    @property
    def refresh_targets(self) -> list[keras.Variable]:
        """What the values of `refresh` are assigned to."""
        return [variable for block in self.blocks for variable in block.refresh_targets]

    def directions_left_free(self, damping: tf.Tensor) -> tf.Tensor:
        """`BlockCurvature.directions_left_free` of all blocks together."""
        return sum_in_order([block.directions_left_free(damping) for block in self.blocks])

    def invert(self, damping: tf.Tensor, factored: tf.Tensor | float = 1.0) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`BlockCurvature.invert` of all blocks, good where all are."""
        return _joined([block.invert(damping, factored) for block in self.blocks])

    @property
    def preconditioner(self) -> list[keras.Variable]:
        """What the values of `invert` are assigned to."""
        return [variable for block in self.blocks for variable in block.preconditioner]

    def precondition(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """The preconditioner times gradients by the layer's `curvature_variables`, in their shapes."""
        matrices = self.layer.to_matrices(gradients)
        return self.layer.from_matrices(
            [block.precondition(matrix) for block, matrix in zip(self.blocks, matrices, strict=True)]
        )


def refresh_layers(
    layers: list[LayerCurvature],
    calls: dict[RecordingLayer, list[LayerCall]],
    devices: dict[RecordingLayer, str | None] | None = None,
    turn: tf.Tensor | bool = True,
) -> list[tf.Tensor]:
    """Folds a batch into the averages of every layer, assigned once all are computed; whether each was good.

    Args:
        layers: the layers.
        calls: of each.
        devices: where to compute each; None leaves it to TensorFlow.
        turn: of `BlockCurvature.refresh`.
    """
    results = []
    for one in layers:
        with on((devices or {}).get(one.layer)):
            results.append(one.refresh(calls[one.layer], turn))
    assign_last(
        [variable for one in layers for variable in one.refresh_targets],
        [value for values, _ in results for value in values],
    )
    return [good for _, good in results]


def invert_layers(
    layers: list[LayerCurvature],
    dampings: dict[RecordingLayer, tf.Tensor],
    devices: dict[RecordingLayer, str | None] | None = None,
    numbers: tf.Tensor | None = None,
) -> list[tf.Tensor]:
    """Makes the preconditioners of every layer anew, likewise.

    Args:
        layers: the layers.
        dampings: λ of each.
        devices: where to compute each; None leaves it to TensorFlow.
        numbers: with corrected eigenvalues, how many a batch has to say; see `curvature.corrected`.
    """
    results = []
    factored = tf.constant(1.0)
    if numbers is not None:
        factored = factored_part([one.directions_left_free(dampings[one.layer]) for one in layers], numbers)
    for one in layers:
        with on((devices or {}).get(one.layer)):
            results.append(one.invert(dampings[one.layer], factored))
    assign_last(
        [variable for one in layers for variable in one.preconditioner],
        [value for values, _ in results for value in values],
    )
    return [good for _, good in results]


def _joined(results: list[tuple[list[tf.Tensor], tf.Tensor]]) -> tuple[list[tf.Tensor], tf.Tensor]:
    return [value for values, _ in results for value in values], tf.reduce_all(tf.stack([good for _, good in results]))


def _refresh(
    options: CurvatureOptions,
    batch: BatchCurvature,
    old: tuple[Pair, ...],
    moments: tf.Tensor,
    count: tf.Tensor,
    spectrum: tuple | None,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    batch, finite = batch.finite_or_zero()
    packed, old = old, unpacked(old)
    factorwise = options.method in KFAC_METHODS
    batch = batch.with_kfac(base=factorwise)
    new, sound = _batch_terms(options.method, batch, old, count)
    trace = None
    weight = average_weight(count, options.factor_decay)
    if not factorwise:
        # The free scale of an SVD term is fixed by KFAC's: tr A is the mean squared length of the activations.
        part = tf.cast(weight, batch.trace.dtype)
        trace = (1 - part) * tf.linalg.trace(old[0][0]) + part * batch.trace
    averaged = average_terms(old, new, weight, factorwise=factorwise, trace=trace)
    new = [*(pack(factor) for factor in flattened(averaged)), curvature_moments(*averaged[0])]
    before = [*flattened(packed), moments]
    if spectrum is not None:
        *kept, diagonal, turn = spectrum
        kept = [*kept, tf.squeeze(diagonal, 1)]
        now = refreshed(batch.compressed(), averaged[0], kept, count, options.factor_decay, turn)
        new, before = [*new, *now], [*before, *kept]
        sound &= is_orthonormal(now[0]) & is_orthonormal(now[1])
    good = finite & sound & all_finite(*new)
    values = [tf.where(good, one, other) for one, other in zip(new, before, strict=True)]
    return [*values, count + tf.cast(good, count.dtype)], good


def _batch_terms(
    method: str, batch: BatchCurvature, old: tuple[Pair, ...], count: tf.Tensor
) -> tuple[tuple[Pair, ...], tf.Tensor]:
    """The terms of one batch, and whether they are what they should be as far as that is known.

    Exact by the Gram route where there is one position per example: large residuals tell of a decomposition that went
    wrong. Else by power iteration from the averaged right factors, one step of three products for each triple: averages
    move slowly, and the steps of successive refreshes add up. The first refresh has nothing to start from.
    """
    if method == "kfac":
        return (batch.base,), tf.constant(True)
    operator = batch.compressed().operator()
    if operator.positions == 1:
        terms, residuals = operator_terms(operator, batch.base, method, symmetric=True, route="gram")
        return terms, _are_exact(residuals)
    starts = tf.stack([g for _, g in (old[1:] if method == "kfac_corrected" else old)])
    steps = tf.where(count > 0, WARM_STEPS, COLD_STEPS)
    terms, _ = operator_terms(
        operator, batch.base, method, symmetric=True, route="power", start=starts, max_steps=steps
    )
    return terms, tf.constant(True)  # Not meant to converge.


def _are_exact(residuals: tf.Tensor) -> tf.Tensor:
    """Whether triples with these residuals may be trusted, as far as the first one tells."""
    return tf.reduce_all(residuals[0] <= TRIPLE_TOLERANCE)


def _new_or_old(new: tf.Tensor, old: tf.Tensor, known: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
    """The new weights where they are finite and there is curvature; whether they are good."""
    good = all_finite(new)
    return [tf.where(known & good, new, old)], good | ~known


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


def assign_last(variables: list[keras.Variable], values: list[tf.Tensor]) -> None:
    """Assigns only once every value is known: what raises on the way leaves all variables as they were."""
    with tf.control_dependencies(values):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
