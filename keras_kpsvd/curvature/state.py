"""One layer's curvature as an optimizer keeps it: averaged factors, and the preconditioner made of them."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kpsvd.curvature.approximations import KFAC_METHODS, TWO_TERM_METHODS, Pair, operator_terms
from keras_kpsvd.curvature.averaging import average_terms, average_weight
from keras_kpsvd.curvature.corrected import CorrectedEigenvalues, refreshed
from keras_kpsvd.curvature.inverses import RANK, KroneckerInverses
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.packing import flattened, packed, unpacked
from keras_kpsvd.curvature.placement import on
from keras_kpsvd.curvature.probes import is_orthonormal
from keras_kpsvd.curvature.reduction import BatchCurvature, LayerCall, reduce_calls
from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import Inverse, all_finite, curvature_moments, mean_by, packed_size, sum_in_order
from keras_kpsvd.tracing import traced_once

# Exact triples are trusted when the first one's residuals are within this part of its value. Where KFAC leaves hardly
# more than rounding it reaches 1e-2; later triples may be rounding altogether, and are then small.
TRIPLE_TOLERANCE = 0.1

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

        names = [("A", "G"), ("P", "Q")] if options.method in TWO_TERM_METHODS else [("A", "G")]
        self._packed = [(add((packed_size(d_in),), a), add((packed_size(d_out),), g)) for a, g in names]
        self.moments = add((2,), "moments")
        self.count = add_variable(shape=(), dtype="int64", name=f"{prefix}_refreshes", initializer="zeros")
        self.corrects = options.eigenvalues == "corrected"
        if self.corrects:
            self._made = CorrectedEigenvalues(shape, RANK, options.damping_rule, add)
        else:
            self._made = KroneckerInverses(shape, options, add)

    @property
    def factors(self) -> list[Pair]:
        """`(A, G)`, then `(P, Q)` of a second term, as tensors `[d, d]`; kept as their lower triangles."""
        return list(unpacked(self._terms()))

    def _terms(self) -> tuple[Pair, ...]:
        """The same, packed."""
        return tuple((tf.convert_to_tensor(a), tf.convert_to_tensor(g)) for a, g in self._packed)

    def refresh(
        self,
        batch: BatchCurvature,
        turn: tf.Tensor | bool = True,
        repeats: int = 1,
        weighing: tf.Tensor | float = 1.0,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The averaged factors with one more batch in them, and whether they are good.

        Args:
            batch: what it says of the block.
            turn: with corrected eigenvalues, whether to find eigenvectors anew, for a preconditioner that is due.
            repeats: gradients of each example, all rows once before any twice.
            weighing: the part of the examples that weigh something.

        Returns:
            The next values of `refresh_targets`, the old ones where anything was not finite or triples that should be
            exact are not, and a scalar boolean.
        """
        old, count = self._terms(), tf.convert_to_tensor(self.count)
        moments = tf.convert_to_tensor(self.moments)
        spectrum = None
        if self.corrects:
            spectrum = (*self._made.values(), tf.convert_to_tensor(turn), tf.cast(weighing, self.moments.dtype))
        arguments = (batch, old, moments, count, spectrum)
        try:
            return traced_once(_refresh, (self.options, repeats), *arguments, sizes_matter=batch.sums_over_positions)
        except tf.errors.OpError:  # Eagerly decompositions may raise.
            return [tf.convert_to_tensor(variable) for variable in self.refresh_targets], tf.constant(False)

    @property
    def refresh_targets(self) -> list[keras.Variable]:
        """What the values of `refresh` are assigned to."""
        return [*flattened(self._packed), self.moments, *self._made.refresh_targets, self.count]

    @property
    def preconditioner(self) -> list[keras.Variable]:
        """What the values of `invert` are assigned to."""
        return self._made.variables

    def inverses(self) -> tuple[Inverse, Inverse]:
        """`A_λ⁻¹` and `G_λ⁻¹` of the preconditioner, the identity before the first; not with corrected eigenvalues."""
        return self._made.inverses()

    @property
    def kurtosis(self) -> keras.Variable:
        """With corrected eigenvalues, `linalg.length_kurtosis` of the samples, averaged; 0 before the first."""
        return self._made.kurtosis

    def directions_left_free(self, damping: tf.Tensor) -> tf.Tensor:
        """With corrected eigenvalues, in how many directions `damping` damps little, float32 scalar."""
        return self._made.directions_left_free(damping)

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
        return self._made.invert(self._terms(), tf.convert_to_tensor(self.count) > 0, damping, factored)

    def precondition(self, matrix: tf.Tensor) -> tf.Tensor:
        """The preconditioner times a gradient `[d_in, d_out]`."""
        return self._made.precondition(tf.cast(matrix, self._packed[0][0].dtype))


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
        both = tf.stack([tf.reduce_sum(traces), mean_by(traces, along)])
        return both, sum(d_in * d_out for d_in, d_out in self.layer.block_shapes)

    def kurtoses(self) -> tf.Tensor:
        """`BlockCurvature.kurtosis`, `[blocks]` float32."""
        return tf.stack([tf.cast(tf.convert_to_tensor(block.kurtosis), tf.float32) for block in self.blocks])

    def refresh(
        self,
        calls: list[LayerCall],
        turn: tf.Tensor | bool = True,
        repeats: int = 1,
        weighing: tf.Tensor | float = 1.0,
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """`BlockCurvature.refresh` of all blocks, good where all are."""
        method = self.options.method
        samples = method != "kfac" or self.options.eigenvalues == "corrected"
        batches = reduce_calls(self.layer, calls, base=method in KFAC_METHODS, svd=samples)
        return _joined(
            [block.refresh(batch, turn, repeats, weighing) for block, batch in zip(self.blocks, batches, strict=True)]
        )

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
    repeats: int = 1,
    weighing: tf.Tensor | float = 1.0,
) -> list[tf.Tensor]:
    """Folds a batch into the averages of every layer, assigned once all are computed; whether each was good.

    Args:
        layers: the layers.
        calls: of each.
        devices: where to compute each; None leaves it to TensorFlow.
        turn: of `BlockCurvature.refresh`.
        repeats: likewise.
        weighing: likewise.
    """
    results = []
    for one in layers:
        with on((devices or {}).get(one.layer)):
            results.append(one.refresh(calls[one.layer], turn, repeats, weighing))
    assign_last(
        [variable for one in layers for variable in one.refresh_targets],
        [value for values, _ in results for value in values],
    )
    return [good for _, good in results]


def invert_layers(
    layers: list[LayerCurvature],
    dampings: dict[RecordingLayer, tf.Tensor],
    devices: dict[RecordingLayer, str | None] | None = None,
    factored: tf.Tensor | float = 1.0,
) -> list[tf.Tensor]:
    """Makes the preconditioners of every layer anew, likewise.

    Args:
        layers: the layers.
        dampings: λ of each.
        devices: where to compute each; None leaves it to TensorFlow.
        factored: of `BlockCurvature.invert`.
    """
    results = []
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
    options: tuple[CurvatureOptions, int],
    batch: BatchCurvature,
    old: tuple[Pair, ...],
    moments: tf.Tensor,
    count: tf.Tensor,
    spectrum: tuple | None,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    options, repeats = options
    batch, finite = batch.finite_or_zero()
    triangles, old = old, unpacked(old)
    factorwise = options.method in KFAC_METHODS
    batch = batch.with_kfac(base=factorwise).compressed()
    new, sound = _batch_terms(options.method, batch, old, count)
    trace = None
    weight = average_weight(count, options.factor_decay)
    if not factorwise:
        # The free scale of an SVD term is fixed by KFAC's: tr A is the mean squared length of the activations.
        part = tf.cast(weight, batch.trace.dtype)
        trace = (1 - part) * tf.linalg.trace(old[0][0]) + part * batch.trace
    averaged = average_terms(old, new, weight, factorwise=factorwise, trace=trace)
    new, before = [*packed(averaged), curvature_moments(*averaged[0])], [*flattened(triangles), moments]
    if spectrum is not None:
        *kept, diagonal, kurtosis, turn, weighing = spectrum
        kept = [*kept, tf.squeeze(diagonal, 1), kurtosis]
        now = refreshed(batch, averaged[0], kept, count, options.factor_decay, turn, repeats, weighing)
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
    operator = batch.operator()
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


def assign_last(variables: list[keras.Variable], values: list[tf.Tensor]) -> None:
    """Assigns only once every value is known: what raises on the way leaves all variables as they were."""
    with tf.control_dependencies([tf.group(*values)]):  # One operation waits for all, and the others for it.
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
