"""What a monitor sees of a step that refreshes: its mathematics, and its way out of the graph.

An `Observer` lives in the optimizer and in the step that was traced with it. It makes no variables: what it computes
goes to a `Sink` in Python, which also says, refresh by refresh, whether anything is computed at all.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from keras_kpsvd.curvature.approximations import Pair
from keras_kpsvd.curvature.placement import on
from keras_kpsvd.curvature.reduction import (
    MEMORY_BUDGET,
    BatchCurvature,
    LayerCall,
    positions_of,
    reduce_calls,
    rows_within,
)
from keras_kpsvd.curvature.state import BlockCurvature, LayerCurvature
from keras_kpsvd.layers import RecordingLayer
from keras_kpsvd.linalg import Inverse, TruncatedInverse, all_finite, leading_triples
from keras_kpsvd.linalg.decompositions import eigh
from keras_kpsvd.linalg.scaling import unit_rows

OF_SAMPLES = ("error_1", "sigma_1", "sigma_2")
OF_PRECONDITIONER = ("eigenvalue_max", "eigenvalue_min")
OF_STEP = ("update", "damping", "rate", "momentum", "kl_scale", "refresh_seconds")
QUANTITIES = (*OF_SAMPLES, *OF_PRECONDITIONER, *OF_STEP)

# Of Lanczos's iteration, for several positions: the residual relative to σ₁, and products with R(F) and its transpose.
SIGMA_TOLERANCE, SIGMA_STEPS = 1e-2, 30


def observe_samples(batch: BatchCurvature, terms: Sequence[Pair]) -> tf.Tensor:
    """How far `F̂ = Σ A ⊗ G` is from the Fisher block `F` of some samples, and how well `F` could be approximated.

    With one position per example all of it comes from `N × N` Gram matrices (`linalg.gram`), and singular values are
    exact down to about 1e-6 `σ₁`. With several they come from at most `SIGMA_STEPS` Lanczos steps: within
    `SIGMA_TOLERANCE · σ₁` of a singular value where those suffice, as a rule within 1e-4 of it, since the error is of
    second order; and never above the true one by more than rounding.

    Args:
        batch: the samples.
        terms: `(A [d_in, d_in], G [d_out, d_out])` of each term.

    Returns:
        `[3]`, float64: error 1 `‖F − F̂‖_F / ‖F‖_F` (Koroko et al. 2023, §5.1) and `σ₁ ≥ σ₂`, the two leading singular
        values of `R(F)` (§3). Of a dead block the error is 0 where the approximation is zero too, else infinite. NaN
        where samples or terms are not finite.
    """
    finite = all_finite(*(factor for pair in terms for factor in pair)) & batch.finite_or_zero()[1]
    batch = batch.finite_or_zero()[0]
    terms = [tuple(tf.where(finite, factor, tf.zeros_like(factor)) for factor in pair) for pair in terms]
    alone = batch.activations is not None and batch.activations.shape[1] == 1
    norm, rest, sigmas = (_of_one_position if alone else _of_several_positions)(batch, terms)
    infinite = tf.constant(float("inf"), tf.float64)
    error = tf.where(norm > 0, tf.math.divide_no_nan(rest, norm), tf.where(rest > 0, infinite, tf.zeros_like(rest)))
    return tf.where(finite, tf.concat([error[tf.newaxis], sigmas], 0), tf.constant(float("nan"), tf.float64))


def _of_one_position(batch: BatchCurvature, terms: Sequence[Pair]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`‖F‖`, `‖F − F̂‖`, `(σ₁, σ₂)`. A difference of squares, summed in the samples' dtype: 1e-3 of `‖F‖` in float32."""
    samples = [tf.squeeze(values, 1) for values in (batch.activations, batch.gradients)]
    (a_rows, a_lengths), (g_rows, g_lengths) = (unit_rows(values) for values in samples)
    count = tf.cast(tf.maximum(tf.shape(a_rows)[0], 1), tf.float64)
    weights = tf.square(tf.cast(a_lengths, tf.float64) * tf.cast(g_lengths, tf.float64)) / count
    unit = tf.reduce_max(tf.concat([weights, [0.0]], 0))
    unit = tf.where(unit > 0, unit, tf.ones_like(unit))
    grams = [
        tf.matmul(rows, rows, transpose_b=True) for rows in (tf.cast(a_rows, tf.float64), tf.cast(g_rows, tf.float64))
    ]
    norm, sigmas = _of_grams(*grams, weights / unit)
    # In units of the largest sample's own block, so that no square overflows.
    rest = tf.square(norm)
    for a, g in terms:
        inner = [tf.reduce_sum(tf.matmul(rows, one) * rows, 1) for rows, one in ((a_rows, a), (g_rows, g))]
        inner = [tf.cast(values, tf.float64) for values in inner]
        rest -= 2 * tf.reduce_sum(weights / unit * inner[0] * inner[1]) / unit
        for a_other, g_other in terms:
            products = [tf.cast(tf.reduce_sum(one * other), tf.float64) for one, other in ((a, a_other), (g, g_other))]
            rest += products[0] / unit * products[1] / unit
    return unit * norm, unit * tf.sqrt(tf.maximum(rest, 0)), unit * sigmas


@tf.function(
    input_signature=[tf.TensorSpec([None, None], tf.float64)] * 2 + [tf.TensorSpec([None], tf.float64)],
    autograph=False,
    experimental_attributes={"_noinline": True},
)
def _of_grams(a_gram: tf.Tensor, g_gram: tf.Tensor, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`‖F‖` and `(σ₁, σ₂)` from the Gram matrices of unit rows, one graph function for layers of all shapes.

    `F = Σ_n w_n (â_n ⊗ ĝ_n)(â_n ⊗ ĝ_n)ᵀ` and `R(F) = 𝒜̂ᵀ W 𝒢̂`, whose singular values are those of `C_Aᵀ W C_G` with
    `C Cᵀ` the Gram matrices of the rows of `𝒜̂` and `𝒢̂`, which are the squares of these entries.
    """
    squares = [tf.square(a_gram), tf.square(g_gram)]
    norm = tf.sqrt(tf.reduce_sum(weights[:, tf.newaxis] * squares[0] * squares[1] * weights))
    size = tf.cast(tf.shape(a_gram)[0], tf.float64)
    jitter = 10 * 2.0**-52 * size
    factors = [tf.linalg.cholesky(tf.linalg.set_diag(one, tf.linalg.diag_part(one) + jitter)) for one in squares]
    core = tf.matmul(factors[0], weights[:, tf.newaxis] * factors[1], transpose_a=True)
    # The jitter leaves noise of about its root.
    values = tf.sqrt(tf.maximum(tf.reverse(eigh(tf.matmul(core, core, transpose_a=True))[0], [0]), 0))
    values = tf.concat([values, tf.zeros([2], tf.float64)], 0)[:2]
    return norm, tf.where(values > 4 * tf.sqrt(jitter) * values[0], values, tf.zeros_like(values))


def _of_several_positions(batch: BatchCurvature, terms: Sequence[Pair]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    (a, g), *_ = terms
    return _kernel((a.shape[0], g.shape[0]), len(terms))(batch, terms)


@functools.cache
def _kernel(shape: tuple[int, int], terms: int) -> Callable:
    """The computation for blocks of one shape as a graph function, as `tracing.traced_once`."""

    def compute(batch: BatchCurvature, terms: Sequence[Pair]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        operator = batch.compressed().operator()
        triples = leading_triples(operator, 2, route="lanczos", tolerance=SIGMA_TOLERANCE, max_steps=SIGMA_STEPS)
        norm = operator.frobenius_norm()
        for a, g in terms:
            operator = operator.deflate(a, g)
        return tuple(tf.cast(one, tf.float64) for one in (norm, operator.frobenius_norm(), triples.values))

    return tf.function(compute, autograph=False, experimental_attributes={"_noinline": True})


def extreme_eigenvalues(a_inverse: Inverse, g_inverse: Inverse) -> tf.Tensor:
    """The largest and the smallest eigenvalue of `A_λ ⊗ G_λ`, from what a preconditioner has of its inverse.

    Those of an inverse that is kept whole come from its own eigenvalues. It is known to the rounding of its dtype, so
    that the largest eigenvalue is good to about `ε` times the condition number of its factor.

    Args:
        a_inverse: `A_λ⁻¹`, whole or truncated.
        g_inverse: `G_λ⁻¹`.

    Returns:
        `[2]`, float64.
    """
    ranges = []
    for inverse in (a_inverse, g_inverse):
        if isinstance(inverse, TruncatedInverse):
            shift = tf.cast(inverse.shift, tf.float64)
            values = tf.concat([shift + tf.cast(inverse.weights, tf.float64), shift[tf.newaxis]], 0)
        else:
            values = eigh(tf.cast(inverse, tf.float64))[0]
        # Rounding may leave the smallest at or below zero: then the factor's largest is beyond what is known.
        values = 1 / tf.where(values < 0, tf.zeros_like(values), values)
        ranges.append(tf.stack([tf.reduce_max(values), tf.reduce_min(values)]))
    return ranges[0] * ranges[1]


def _extremes(block: BlockCurvature) -> tf.Tensor:
    """The largest and the smallest eigenvalue of what a block's preconditioner inverts, `[2]`, float64."""
    if block.corrects:
        weights = tf.cast(tf.convert_to_tensor(block.preconditioner[0]), tf.float64)
        return 1 / tf.stack([tf.reduce_min(weights), tf.reduce_max(weights)])
    return extreme_eigenvalues(*block.inverses())


def block_names(layers: Sequence[LayerCurvature]) -> dict[LayerCurvature, list[str]]:
    """What records call each block: the layer's name (its path where several have that name), `/block_i` of several."""
    taken = [one.layer.name for one in layers]
    names = {}
    for one in layers:
        name = one.layer.name if taken.count(one.layer.name) == 1 else one.layer.path
        count = len(one.blocks)
        names[one] = [name] if count == 1 else [f"{name}/block_{index}" for index in range(count)]
    return names


def observe_layer(layer: LayerCurvature, calls: list[LayerCall], rows: tf.Tensor, repeats: int = 1) -> tf.Tensor:
    """`observe_samples` of every block, `[blocks, 3]`, of the first of the samples, within `reduction.MEMORY_BUDGET`.

    Args:
        layer: its averaged factors are the terms.
        calls: of a refresh.
        rows: how many samples to use, int32 scalar.
        repeats: samples of each example, all examples once before any twice; an example is used with all or none.
    """
    # Half the budget: norms are computed in float64.
    most = rows_within(MEMORY_BUDGET // (2 * repeats), layer.layer.block_shapes, positions_of(layer.layer, calls))
    examples = tf.minimum(tf.maximum(rows // repeats, 1), most)
    used = [LayerCall(*(_first_examples(values, examples, repeats) for values in call)) for call in calls]
    observed = []
    for block, batch in zip(layer.blocks, reduce_calls(layer.layer, used, base=False, svd=True), strict=True):
        observed.append(observe_samples(batch, block.factors))
    return tf.stack(observed)


def _first_examples(values: tf.Tensor, examples: tf.Tensor, repeats: int) -> tf.Tensor:
    if repeats == 1:
        return values[:examples]
    apart = tf.reshape(values, tf.concat([[repeats, -1], tf.shape(values)[1:]], 0))[:, :examples]
    return tf.ensure_shape(tf.reshape(apart, tf.concat([[-1], tf.shape(values)[1:]], 0)), [None, *values.shape[1:]])


class StepValues(NamedTuple):
    """Of the step that a refresh was made for; scalars, as `OF_STEP`."""

    update: tf.Tensor
    damping: tf.Tensor
    rate: tf.Tensor
    momentum: tf.Tensor
    kl_scale: tf.Tensor


class Sink(Protocol):
    """Where observations go."""

    def due(self) -> int:
        """How many samples of the refresh that begins are to be used; 0: it is not observed."""

    def receive(self, records: list[dict[str, Any]], seconds: float) -> None:
        """An observed refresh: for each block its name as `layer` and `QUANTITIES`; and the seconds it took to observe.

        Comes before the step is taken.
        """


class Observer:
    """The observing part of a traced step. Its methods add operations, in the order in which they stand here.

    Attributes:
        sink: where observations go; None: nothing is observed, and one call of Python a refresh is all that it costs.
        functions: those that were made when the observer was there.
    """

    def __init__(self):
        self.sink: Sink | None = None
        self.functions: weakref.WeakSet = weakref.WeakSet()
        self._moments: dict[str, float] = {}
        self._of_samples: dict[str, np.ndarray] = {}
        self._of_preconditioner: dict[str, np.ndarray] = {}

    def refresh_begins(self) -> tf.Tensor:
        """Asks the sink; how many samples to use, int32 scalar, 0 for a refresh that is not observed."""

        def begin() -> np.int32:
            rows = 0 if self.sink is None else self.sink.due()
            self._of_samples, self._of_preconditioner = {}, {}
            self._moments = {"begun": time.perf_counter()}
            return np.int32(rows)

        return _python(begin, [], tf.int32)

    def factors_are_averaged(
        self,
        rows: tf.Tensor,
        names: dict[LayerCurvature, list[str]],
        calls: dict[RecordingLayer, list[LayerCall]],
        good: list[tf.Tensor],
        places: dict[RecordingLayer, str | None],
        repeats: int,
    ) -> tf.Tensor:
        """Observes the samples.

        Args:
            rows: of `refresh_begins`.
            names: of the blocks of the layers that were refreshed.
            calls: what they were refreshed with.
            good: of `state.refresh_layers`, which is waited for.
            places: where to compute each layer.
            repeats: see `observe_layer`.

        Returns:
            `rows`, once that is done.
        """

        def observe() -> tf.Tensor:
            values = []
            with tf.control_dependencies([self._now("refreshed", tf.stack(good))]):
                for one in names:
                    with on(places.get(one.layer)):
                        values.append(observe_layer(one, calls[one.layer], rows, repeats))

            def keep(*of_layers: np.ndarray) -> np.int32:
                flat = np.concatenate(of_layers)
                self._of_samples = dict(zip(_flat(names), flat, strict=True))
                self._moments["sampled"] = time.perf_counter()
                return np.int32(0)

            return rows + _python(keep, values, tf.int32)

        return tf.cond(rows > 0, observe, lambda: tf.identity(rows)) if names else tf.zeros_like(rows)

    def preconditioners_are_made(
        self, rows: tf.Tensor, names: dict[LayerCurvature, list[str]], rebuilt: tf.Tensor
    ) -> tf.Tensor:
        """Observes the preconditioners in force, whether new ones were `rebuilt` or not; `rows` once that is done."""

        def observe() -> tf.Tensor:
            with tf.control_dependencies([rebuilt]):
                blocks = [block for one in names for block in one.blocks]
                # A value of each, so that a device which runs ahead is waited for.
                parts = [tf.convert_to_tensor(part) for block in blocks for part in block.preconditioner]
                first = [tf.reshape(part, [-1])[0] for part in parts]
                made = self._now("inverted", tf.stack([tf.cast(one, tf.float64) for one in first]))
            with tf.control_dependencies([made]):
                values = tf.stack([_extremes(block) for block in blocks])

            def keep(values: np.ndarray) -> np.int32:
                self._of_preconditioner = dict(zip(_flat(names), values, strict=True))
                self._moments["seen"] = time.perf_counter()
                return np.int32(0)

            return rows + _python(keep, [values], tf.int32)

        return tf.cond(rows > 0, observe, lambda: tf.identity(rows))

    def step_is_computed(self, rows: tf.Tensor, step: StepValues) -> None:
        """Hands the observation to the sink."""

        def hand_over(*values: np.ndarray) -> np.int32:
            began = time.perf_counter()
            at = self._moments
            of_step = dict(zip(OF_STEP, map(float, values), strict=False))
            of_step["update"] = int(values[0])
            of_step["refresh_seconds"] = at["refreshed"] - at["begun"] + at["inverted"] - at["sampled"]
            unknown = np.full(len(OF_SAMPLES), np.nan)
            records = []
            for name, of_preconditioner in self._of_preconditioner.items():
                numbers = [*self._of_samples.get(name, unknown), *of_preconditioner]
                of_block = dict(zip((*OF_SAMPLES, *OF_PRECONDITIONER), map(float, numbers), strict=True))
                records.append({"layer": name, **of_block, **of_step})
            if self.sink is not None:
                seconds = at["sampled"] - at["refreshed"] + at["seen"] - at["inverted"] + time.perf_counter() - began
                self.sink.receive(records, seconds)
            return np.int32(0)

        tf.cond(rows > 0, lambda: _python(hand_over, list(step), tf.int32), lambda: tf.constant(0))

    def _now(self, name: str, after: tf.Tensor) -> tf.Tensor:
        """Keeps the time at which `after` is known."""

        def keep(_: np.ndarray) -> np.int32:
            self._moments[name] = time.perf_counter()
            return np.int32(0)

        return _python(keep, [after], tf.int32)


def _flat(names: dict[LayerCurvature, list[str]]) -> list[str]:
    return [name for of_layer in names.values() for name in of_layer]


def _python(function: Callable, arguments: list[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    """Calls Python when the surrounding branch runs; a scalar."""
    # Variables of several replicas are no tensors yet.
    tensors = [tf.convert_to_tensor(argument) for argument in arguments]
    value = tf.numpy_function(function, tensors, dtype, stateful=True)
    return tf.ensure_shape(value, [])
