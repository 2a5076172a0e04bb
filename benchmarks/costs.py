"""Floating-point operations and bytes of the parts of a step, counted by formula for each layer.

With `n` rows of a batch, `T` positions a row (1 of a dense layer), a block of `d_in × d_out` weights (bias row
included), and `k` eigenpairs of a truncated factor. A product of `[m, k]` and `[k, n]` takes `2 m k n` operations and
moves each of the three matrices once; what works entry by entry moves what it reads and writes. All is in float32.

Parts of `kfac` with corrected eigenvalues:

- gradient: a product forward, one for the weights' gradient, and but in the first layer one for the inputs'.
- `Jδ` (`step_control.linearised_outputs`): `ā δ`, and but in the first layer the tangent times the weights.
- `Jᵀu` (`conjugate.weight_products`): as the gradient without the forward product.
- preconditioner: into the basis of eigenvectors of either side, all of them or `k`, and back.
- vectors: what a conjugate step does with whole directions; an update of the weights.
- refresh: the gradient by drawn targets without the weights' part, both second moments, their averages, and the
  diagonal in the eigenbasis: of one position samples times both bases and a product of squares, of several from `D_n`.
- inversion: of either side eigenvectors anew, by one step of subspace iteration with Rayleigh–Ritz if not all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

ITEM = 4  # bytes

# Passes over a direction, counted in the code; a test counts them in the graph. An inner product takes four, since the
# product of the two is written, one with itself a single one. Of the first conjugate step two inner products and a
# square, and its part of the solution (2). Of each further one the same and three more of the solution, the residual
# (two parts of the image times their factors, 2 each, their sum and the difference, 3 each) and the direction (5).
FIRST_PASSES, CONJUGATE_PASSES = 11, 29
UPDATE_PASSES = 12  # The new velocity, and both assignments.
# Of a factor: out of its packed form and into it, the average, and whether all is finite.
REFRESH_PASSES, UNPACK_PASSES = 16, 6
# Of a truncated inversion besides its products: whether all is finite, the largest entry, the norm for the probe.
TRUNCATED_PASSES = 8


@dataclass(frozen=True)
class Cost:
    """What an operation takes: floating-point operations, and bytes read and written."""

    flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The time it takes at `rate` operations and `bandwidth` bytes a second, whichever is the longer."""
        return max(self.flops / rate, self.moved / bandwidth)


@dataclass(frozen=True)
class Block:
    """One block of an instrumented layer.

    Attributes:
        name: of the layer.
        d_in, d_out: of its matrix, bias row included.
        positions: per example.
        inputs: entries of an example's inputs.
        first: whether nothing before it has a gradient.
    """

    name: str
    d_in: int
    d_out: int
    positions: int
    inputs: int
    first: bool


def product(m: float, k: float, n: float) -> Cost:
    """A matrix product `[m, k] [k, n]`."""
    return Cost(2 * m * k * n, ITEM * (m * k + k * n + m * n))


def passes(entries: float, count: float) -> Cost:
    """`count` tensors of so many entries read or written, an operation for each."""
    return Cost(entries * count, ITEM * entries * count)


def _with_rows(block: Block, rows: int) -> Cost:
    """A product of the block's inputs or gradients with its matrix: patches are made in cache and not counted."""
    at = rows * block.positions
    weights = block.d_in * block.d_out
    return Cost(2.0 * at * weights, ITEM * (rows * block.inputs + weights + at * block.d_out))


def gradient(block: Block, rows: int) -> list[Cost]:
    """Forward and backward pass, activation included."""
    count = 2 if block.first else 3
    return [*[_with_rows(block, rows)] * count, passes(rows * block.positions * block.d_out, 5)]


def tangent(block: Block, rows: int) -> list[Cost]:
    """`Jδ`."""
    return [*[_with_rows(block, rows)] * (1 if block.first else 2), passes(rows * block.positions * block.d_out, 5)]


def cotangent(block: Block, rows: int) -> list[Cost]:
    """`Jᵀu`."""
    return [*[_with_rows(block, rows)] * (1 if block.first else 2), passes(rows * block.positions * block.d_out, 3)]


def precondition(block: Block, rank: int) -> list[Cost]:
    """`linalg.apply_diagonal`."""
    d_in, d_out = block.d_in, block.d_out
    k_in, k_out = kept(d_in, rank), kept(d_out, rank)
    costs = [passes(d_in * d_out, 4)]  # The bias row joined to the kernel, and cut off again.
    truncated = k_in < d_in, k_out < d_out
    costs += [passes(d_in * d_out, 5)] * any(truncated)
    if all(truncated):  # Into either basis of the whole, and into both of a part.
        costs += [product(k_in, d_out, k_out), product(k_in, k_out, d_out)]
    for kept_here, size, other in ((k_in, d_in, d_out), (k_out, d_out, d_in)):
        costs += [product(kept_here, size, other), product(size, kept_here, other)]
    return costs


def kept(size: int, rank: int) -> int:
    """How many eigenvectors of a factor are."""
    return size if size <= 2 * rank else rank


def conjugate_vectors(block: Block) -> list[Cost]:
    """What a conjugate step does with directions."""
    return [passes(block.d_in * block.d_out, CONJUGATE_PASSES)]


def update(block: Block) -> list[Cost]:
    """The step taken, with momentum."""
    return [passes(block.d_in * block.d_out, UPDATE_PASSES)]


def refresh(block: Block, rows: int, used: int | None, rank: int) -> list[Cost]:
    """KFAC's factors and the diagonal from a batch of `rows`, of which `used` enter (None: all)."""
    examples = rows if used is None else min(used, rows)
    at = examples * block.positions
    costs = [] if block.first else [_with_rows(block, rows)]
    for size in (block.d_in, block.d_out):
        costs += [product(size, at, size), passes(size * size, REFRESH_PASSES)]
    d_in, d_out = block.d_in, block.d_out
    k_in, k_out = kept(d_in, rank), kept(d_out, rank)
    if block.positions == 1:
        return [*costs, product(at, d_in, k_in), product(at, d_out, k_out), product(k_in, at, k_out)]
    costs.append(passes(at * d_in, 4))  # Patches.
    costs.append(Cost(2.0 * at * d_in * d_out, ITEM * examples * d_in * d_out))
    costs += [product(k_in, d_in, examples * d_out), product(examples * d_in, d_out, k_out)]
    return [*costs, product(k_in * examples, d_out, k_out)]


def inversion(block: Block, rank: int) -> list[Cost]:
    """Both bases."""
    costs = []
    for size in (block.d_in, block.d_out):
        costs.append(passes(size * size, UNPACK_PASSES))
        if size <= 2 * rank:
            costs.append(Cost(9 * size**3, 4 * ITEM * size**2))  # eigh
        else:
            costs.append(passes(size * size, TRUNCATED_PASSES))
            costs += [product(size, size, rank)] * 2 + [product(rank, size, rank), product(size, rank, rank)]
            costs.append(Cost(4 * size * rank**2, 4 * ITEM * size * rank))  # QR.
            costs += [Cost(9 * rank**3, 4 * ITEM * rank**2), product(size, size, 1)]  # eigh, probe.
    # What is known carried over: both old bases times the new ones.
    for size in (block.d_in, block.d_out):
        costs.append(product(kept(size, rank), size, kept(size, rank)))
    return costs


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return sum(costs, Cost())


def blocks_of(model: keras.Model) -> list[Block]:
    """Every block of a built Sequential model, in order."""
    from keras_kpsvd.layers import RecordingLayer

    found = []
    for layer in model.layers:
        if isinstance(layer, RecordingLayer):
            width = sum(d_out for _, d_out in layer.block_shapes)
            positions = _entries(layer.output.shape) // width
            inputs = _entries(layer.input.shape) // len(layer.block_shapes)
            first = not found
            found += [Block(layer.name, *shape, positions, inputs, first) for shape in layer.block_shapes]
    return found


def _entries(shape: tuple) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count
