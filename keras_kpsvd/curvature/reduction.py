"""From the calls of a layer to what a refresh needs of them, within a memory budget.

A convolution's samples are patches, `∏ kernel_size` times as large as its inputs, and are needed only through sums.
They are made a few examples at a time: KFAC's factors are summed up chunk by chunk, and where a layer has more
positions than the smaller side of its weight matrix, the per-example gradients `D_n [d_in, d_out]` replace the samples,
whatever the number of positions: the Fisher block depends on nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import RearrangedFisher, all_finite, size_of

# Bytes that the samples of one layer may take while its curvature is refreshed, their working copies included.
MEMORY_BUDGET = 256 * 2**20

# Examples of a batch that are used by default; see `refresh_rows`.
SVD_ROWS, FEWEST_ROWS, POSITIONS = 128, 32, 4096

# Into how many parts the budget goes for a chunk's patches (slices, their concatenation, the one with the bias column;
# and small chunks lose no speed) and for all D_n (chunks, transposed, balanced, moved by a product), which exist at
# once. What then really is taken is measured by benchmarks/convolution.py.
_PATCH_COPIES, _GRADIENT_COPIES = 16, 5


class LayerCall(NamedTuple):
    """One call of a layer: its inputs and the per-example gradient by its pre-activation, with as many rows."""

    inputs: tf.Tensor
    gradient: tf.Tensor


class BatchCurvature(NamedTuple):
    """What one batch says of one block. Parts that the method does not need, or that follow from others, are None.

    Attributes:
        activations: `[batch, shared, d_in]`.
        gradients: `[batch, shared, d_out]`.
        weight_gradients: `D_n` as `[d_in, batch, d_out]`, in place of the two.
        base: KFAC's factors `A = E_n[Σ_t āāᵀ]`, `G = E_{n,t}[ggᵀ]`; None where they are to be taken from the samples.
        trace: `tr A = E_n[Σ_t ‖ā‖²]`; likewise.
    """

    activations: tf.Tensor | None = None
    gradients: tf.Tensor | None = None
    weight_gradients: tf.Tensor | None = None
    base: tuple[tf.Tensor, tf.Tensor] | None = None
    trace: tf.Tensor | None = None

    @property
    def sums_over_positions(self) -> bool:
        """Whether there are samples and more than one position per example: sizes decide on how these are reduced."""
        several = self.activations is not None and self.activations.shape[1] != 1
        return several or self.weight_gradients is not None

    def finite_or_zero(self) -> tuple[BatchCurvature, tf.Tensor]:
        """Itself and True, or zeros and False where anything is not finite: decompositions raise on NaN in graphs."""
        finite = all_finite(*(value for value in tf.nest.flatten(self) if value is not None))

        def keep(value):
            return None if value is None else tf.where(finite, value, tf.zeros_like(value))

        return tf.nest.map_structure(keep, self), finite

    def compressed(self) -> BatchCurvature:
        """With the `D_n` in place of the samples where they are smaller; KFAC's part of it must have been taken."""
        if self.activations is None or self.activations.shape[1] == 1:
            return self
        if not is_compressed(self.activations.shape[1], self.activations.shape[2], self.gradients.shape[2]):
            return self
        products = tf.matmul(self.activations, self.gradients, transpose_a=True)
        return BatchCurvature(weight_gradients=tf.transpose(products, [1, 0, 2]), base=self.base, trace=self.trace)

    def with_kfac(self, *, base: bool) -> BatchCurvature:
        """With `base`, or else `trace`, taken from the samples where it is not known yet."""
        if base:
            return self if self.base else self._replace(base=kfac_factors(self.activations, self.gradients))
        if self.trace is not None:
            return self
        batch = tf.cast(tf.maximum(tf.shape(self.activations)[0], 1), self.activations.dtype)
        return self._replace(trace=tf.reduce_sum(tf.square(self.activations)) / batch)

    def squared_lengths(self) -> tf.Tensor:
        """`‖D_n‖²` of every row, `[batch]`, from samples or per-example gradients, whichever there are."""
        if self.weight_gradients is not None:
            return tf.reduce_sum(tf.square(self.weight_gradients), [0, 2])
        if self.activations.shape[1] == 1:
            a, g = (tf.reduce_sum(tf.square(values), [1, 2]) for values in (self.activations, self.gradients))
            return a * g
        grams = [tf.matmul(values, values, transpose_b=True) for values in (self.activations, self.gradients)]
        return tf.reduce_sum(grams[0] * grams[1], [1, 2])

    def operator(self) -> RearrangedFisher:
        """The block's rearrangement."""
        if self.weight_gradients is not None:
            return RearrangedFisher.from_weight_gradients(self.weight_gradients)
        return RearrangedFisher(self.activations, self.gradients)


def kfac_factors(activations: tf.Tensor, gradients: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """KFAC's factors: `A = E_n[Σ_t āāᵀ]` and `G = E_{n,t}[ggᵀ]` (Grosse & Martens 2016, eq. 31–32; one position: KFAC).

    Args:
        activations: `[batch, shared, d_in]`.
        gradients: `[batch, shared, d_out]`.

    Returns:
        `(A [d_in, d_in], G [d_out, d_out])`, symmetric positive semi-definite.
    """
    batch = tf.shape(activations)[0]
    return _normalised(*_second_moments(activations, gradients), batch, tf.shape(activations)[1])


def refresh_rows(
    method: str,
    block_shapes: list[tuple[int, int]],
    positions: int | None,
    wanted: int | None = None,
    repeats: int = 1,
    corrected: bool = False,
) -> int | None:
    """How many examples of a batch a refresh uses.

    Args:
        method: one of the five; all but "kfac" hold samples, and are kept within `MEMORY_BUDGET`.
        block_shapes: `(d_in, d_out)` of the layer's blocks.
        positions: per example, None if unknown.
        wanted: what the user asked for. None: of a layer with one position all for "kfac", `SVD_ROWS` for the others;
            with more, whose second moments average over positions too, as many as have `POSITIONS` of them, between
            `FEWEST_ROWS` and `SVD_ROWS`.
        repeats: gradients of each example (as many as outputs for the exact Fisher), which count towards the budget.
        corrected: eigenvalues are, for which "kfac" too holds samples of several positions.

    Returns:
        The number; None for all.
    """
    if wanted is None and positions == 1:
        wanted = None if method == "kfac" else SVD_ROWS
    elif wanted is None:
        wanted = min(max(FEWEST_ROWS, -(-POSITIONS // (positions or POSITIONS))), SVD_ROWS)
    if method == "kfac" and (positions == 1 or not corrected):
        return wanted
    return min(wanted, rows_within(MEMORY_BUDGET // repeats, block_shapes, positions))


def rows_within(budget: int, block_shapes: list[tuple[int, int]], positions: int | None) -> int:
    """How many examples an SVD method may use so that its samples and their copies stay within `budget` bytes.

    Args:
        budget: bytes.
        block_shapes: `(d_in, d_out)` of the layer's blocks, worked on one after another but reduced together.
        positions: per example, None if unknown.

    Returns:
        At least 1, also where one example alone takes more.
    """
    floats = 0
    for d_in, d_out in block_shapes:
        floats += d_in * d_out if is_compressed(positions, d_in, d_out) else positions * (d_in + d_out)
    return max(1, budget // (4 * _GRADIENT_COPIES * floats))


def is_compressed(positions: int | None, d_in: int, d_out: int) -> bool:
    """Whether the `D_n` are smaller than the samples, and products with them cheaper. True for unknown positions."""
    return positions is None or positions > min(d_in, d_out)


def positions_of(layer: RecordingLayer, calls: list[LayerCall]) -> int | None:
    """Positions per example, of all calls together; None if unknown statically."""
    width = sum(d_out for _, d_out in layer.block_shapes)
    sizes = [call.gradient.shape[1:].num_elements() for call in calls]
    return None if None in sizes else sum(sizes) // width


def reduce_calls(
    layer: RecordingLayer, calls: list[LayerCall], *, base: bool, svd: bool, budget: int = MEMORY_BUDGET
) -> list[BatchCurvature]:
    """What a refresh needs of the calls of a layer.

    Args:
        layer: the layer.
        calls: of equal batch size; their contributions to `D_n` add up.
        base: KFAC's factors are needed.
        svd: samples or per-example gradients are needed.
        budget: bytes for patches at a time.

    Returns:
        One `BatchCurvature` for each block.
    """
    if not layer.expands:
        return [BatchCurvature(*samples) for samples in side_by_side(layer, calls)]
    positions = positions_of(layer, calls)
    compressed = [is_compressed(positions, *shape) for shape in layer.block_shapes]
    batch = tf.shape(calls[0].inputs)[0]

    def of_rows(start, stop):
        """Sums of one chunk, and its rows of what is kept of every example."""
        chunk = [LayerCall(call.inputs[start:stop], call.gradient[start:stop]) for call in calls]
        sums, kept = [], []
        for (activations, gradients), small in zip(side_by_side(layer, chunk), compressed, strict=True):
            sums += _second_moments(activations, gradients) if base else [tf.reduce_sum(tf.square(activations))]
            if svd:
                product = tf.matmul(activations, gradients, transpose_a=True) if small else None
                kept += [product] if small else [activations, gradients]
        return sums, kept

    sums, kept = _by_chunks(of_rows, batch, _chunk_rows(layer, calls, budget))
    shared = sum(tf.size(call.gradient[:1]) for call in calls) // sum(d_out for _, d_out in layer.block_shapes)
    reduced, sums, kept = [], iter(sums), iter(kept)
    for small in compressed:
        if base:
            one = BatchCurvature(base=_normalised(next(sums), next(sums), batch, shared))
        else:
            total = next(sums)
            one = BatchCurvature(trace=total / tf.cast(tf.maximum(batch, 1), total.dtype))
        if svd and small:
            one = one._replace(weight_gradients=tf.transpose(next(kept), [1, 0, 2]))
        elif svd:
            one = one._replace(activations=next(kept), gradients=next(kept))
        reduced.append(one)
    return reduced


def side_by_side(layer: RecordingLayer, calls: list[LayerCall]) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """`(activations, gradients)` of each block, the calls side by side along `shared`, so that they add up in `D_n`."""
    of_calls = [layer.samples(*call) for call in calls]
    if len(calls) == 1:
        return of_calls[0]
    return [
        tuple(tf.concat(parts, axis=1) for parts in zip(*block, strict=True)) for block in zip(*of_calls, strict=True)
    ]


def _second_moments(activations: tf.Tensor, gradients: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    flat = [tf.reshape(values, [-1, size_of(values, -1)]) for values in (activations, gradients)]
    return tuple(tf.matmul(rows, rows, transpose_a=True) for rows in flat)


def _normalised(a: tf.Tensor, g: tf.Tensor, batch: tf.Tensor, shared: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    batch, shared = (tf.cast(tf.maximum(count, 1), a.dtype) for count in (batch, shared))
    return a / batch, g / (batch * shared)


def _chunk_rows(layer: RecordingLayer, calls: list[LayerCall], budget: int) -> tf.Tensor:
    """How many examples' patches fit, at least one."""
    width = sum(d_in for d_in, _ in layer.block_shapes)
    shared = sum(tf.size(call.gradient[:1], out_type=tf.int64) for call in calls)
    shared //= sum(d_out for _, d_out in layer.block_shapes)
    itemsize = 8 if calls[0].inputs.dtype == tf.float64 else 4
    rows = budget // (itemsize * _PATCH_COPIES * width * tf.maximum(shared, 1))
    return tf.cast(tf.maximum(rows, 1), tf.int32)


def _by_chunks(of_rows, batch: tf.Tensor, rows: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Adds up the first of what `of_rows(start, stop)` returns over all chunks, and stacks the second."""
    first_sums, first_kept = of_rows(0, tf.minimum(rows, batch))
    size = 1 + tf.maximum(batch - 1, 0) // rows
    arrays = [
        tf.TensorArray(one.dtype, size, element_shape=[None, *one.shape[1:]], infer_shape=False).write(0, one)
        for one in first_kept
    ]

    def advance(index, sums, arrays):
        more, kept = of_rows(index * rows, tf.minimum((index + 1) * rows, batch))
        sums = [one + other for one, other in zip(sums, more, strict=True)]
        return index + 1, sums, [array.write(index, one) for array, one in zip(arrays, kept, strict=True)]

    # One chunk at a time: its patches are gone before the next are made.
    _, sums, arrays = tf.while_loop(
        lambda index, *_: index < size, advance, [tf.constant(1), first_sums, arrays], parallel_iterations=1
    )
    return sums, [
        tf.ensure_shape(array.concat(), [None, *one.shape[1:]]) for array, one in zip(arrays, first_kept, strict=True)
    ]
