"""The forward passes of one step on several replicas as one pass.

Rows of the replicas follow each other as in the batch that was split, so that statistics, draws and the quadratic
model are those of one device with the whole batch, however unevenly it was split. What is large stays where it is: a
replica's tape is differentiated on its own device, and a layer's samples are brought together only for a refresh, on
the device that works on that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf
from tensorflow.python.distribute.values import PerReplica

from keras_kpsvd import likelihoods
from keras_kpsvd.curvature.placement import on
from keras_kpsvd.curvature.reduction import LayerCall
from keras_kpsvd.curvature.samples import cotangents, layer_calls, pass_heads, pull_back
from keras_kpsvd.layers import ForwardPass, RecordingLayer
from keras_kpsvd.linalg import sum_in_order


def joint_pass(
    strategy: tf.distribute.Strategy, passes: Sequence[ForwardPass], likelihood: str | Callable, first: int
) -> JointPass:
    """The passes that one step recorded, in cross-replica context.

    Args:
        strategy: the one in force.
        passes: of the replicas of this process.
        likelihood: as in `KPSVD`.
        first: the number of the first of them among all replicas.

    Raises:
        ValueError: the density of an output can't be known; see `loss_densities.heads`.
    """
    if strategy.num_replicas_in_sync == 1:
        return JointPass(passes, [pass_heads(one, likelihood) for one in passes])
    devices, heads = strategy.extended.worker_devices, []
    for one, device in zip(passes, devices, strict=True):
        with on(device):
            heads.append(pass_heads(one, likelihood))
    elsewhere = len(passes) < strategy.num_replicas_in_sync
    return JointPass(passes, heads, devices, strategy if elsewhere else None, first)


class JointPass:
    """The passes of the replicas of this process, and what joins them to one.

    Args:
        passes: closed ones, of the same calls, in the order of the replicas.
        heads: the outputs of each.
        devices: of each pass; needed for more than one.
        strategy: what brings rows from other processes; None where there are none.
        first: the number of the first pass among all replicas.
    """

    def __init__(
        self,
        passes: Sequence[ForwardPass],
        heads: Sequence[list[likelihoods.Head]],
        devices: Sequence[str] | None = None,
        strategy: tf.distribute.Strategy | None = None,
        first: int = 0,
    ):
        self.passes = list(passes)
        self.devices = [None] * len(self.passes) if devices is None else list(devices)
        self._strategy = strategy
        self._numbers = range(first, first + len(self.passes))
        self._heads = list(heads)

    @property
    def _alone(self) -> bool:
        return len(self.passes) == 1 and self._strategy is None

    @property
    def rows(self) -> tf.Tensor:
        """Examples of all replicas, int32 scalar: what depends on it is the same in every process."""
        return tf.shape(self._heads[0][0].outputs)[0] if self._alone else tf.reduce_sum(self._counts())

    def numbers(self, usual: tf.Tensor) -> tf.Tensor:
        """How many numbers the targets of a batch are (`likelihoods.targets`), of all heads together, float32 scalar.

        Args:
            usual: rows of the usual batch, which count where this one has fewer.
        """
        found = sum_in_order([likelihoods.targets(head) for head in self.heads()])
        return found * tf.maximum(tf.math.divide_no_nan(usual, tf.cast(self.rows, tf.float32)), 1.0)

    def weighing_part(self) -> tf.Tensor:
        """The part of the rows that weigh something in any head, float32 scalar: padding does not."""
        weighing = tf.zeros([1], tf.bool)
        for head in self.heads():
            weights = tf.convert_to_tensor(head.weight, tf.float32)
            weights = weights if weights.shape.rank else weights[tf.newaxis]
            weighing |= tf.reduce_any(weights > 0, [*range(1, weights.shape.rank)])
        rows = tf.cast(tf.size(weighing), tf.float32)
        return tf.math.divide_no_nan(tf.reduce_sum(tf.cast(weighing, tf.float32)), rows)

    def _at(self, index: int, function: Callable, *arguments):
        """What `function` returns, computed on the device of a pass."""
        with on(self.devices[index]):
            return function(*arguments)

    def _joined(
        self, values: Sequence[list[tf.Tensor]], repeats: int = 1, devices: Sequence[str | None] | None = None
    ) -> list[tf.Tensor]:
        """Values of the passes as values of all rows: `values[i]` holds one tensor of each pass.

        Args:
            values: as said.
            repeats: how often a tensor holds every row of its pass, all rows once before any twice.
            devices: where to join each; None leaves it to TensorFlow.
        """
        if self._alone:
            return [parts[0] for parts in values]
        if repeats > 1:
            values = [[_repeats_inside(part, repeats) for part in parts] for parts in values]
        if self._strategy is not None:
            joined = _gather(self._strategy, values)
        else:
            joined = []
            for parts, device in zip(values, devices or [None] * len(values), strict=True):
                with on(device):
                    joined.append(tf.concat(parts, 0))
        return [_repeats_outside(one) for one in joined] if repeats > 1 else joined

    def heads(self) -> list[likelihoods.Head]:
        """The outputs of all replicas, with their densities."""
        if self._alone:
            return self._heads[0]
        values = []
        for of_replicas in zip(*self._heads, strict=True):
            values.append([head.outputs for head in of_replicas])
            values.append([_weight_of_rows(head) for head in of_replicas])
        joined = self._joined(values)
        return [
            head._replace(outputs=outputs, weight=weight)
            for head, outputs, weight in zip(self._heads[0], joined[::2], joined[1::2], strict=True)
        ]

    def _counts(self, head: int = 0) -> tf.Tensor:
        """Examples of every replica, `[replicas]`."""
        counts = [tf.shape(heads[head].outputs)[:1] for heads in self._heads]
        return tf.concat(counts, 0) if self._strategy is None else _all_gather(self._strategy, counts)

    def _split(self, values: tf.Tensor, axis: int, head: int) -> list[tf.Tensor]:
        """The inverse of `_joined`, for the passes at hand."""
        if self._alone:
            return [values]
        counts = self._counts(head)
        ends = tf.cumsum(counts)
        return [tf.gather(values, tf.range(ends[at] - counts[at], ends[at]), axis=axis) for at in self._numbers]

    def calls(
        self,
        fisher: str,
        seed: tf.Tensor,
        rows: Callable[..., int | None],
        devices: dict[RecordingLayer, str | None],
    ) -> dict[RecordingLayer, list[LayerCall]]:
        """The calls of every recorded layer with their gradients, of all replicas together.

        Args:
            fisher: as `samples.preactivation_gradients`.
            seed: likewise.
            rows: as `samples.layer_calls`.
            devices: where to bring the rows of a layer together.
        """
        heads = self.heads()
        repeats = likelihoods.draws_per_example(heads) if fisher == "exact" else 1
        axis = 1 if fisher == "exact" else 0
        of_heads = [self._split(one, axis, index) for index, one in enumerate(cotangents(heads, fisher, seed))]
        counts, parts = self._counts(), []
        for index, (one, own) in enumerate(zip(self.passes, self._heads, strict=True)):
            # What a loss is a mean over: Keras's own is a mean over the replica's part, and those are averaged.
            mean_over = tf.reduce_sum(counts) if one.batch is None else counts[self._numbers[index]] * tf.size(counts)
            with on(self.devices[index]):
                parts.append(pull_back(one, own, [split[index] for split in of_heads], fisher, mean_over))
        records = self.passes[0].records
        places = [devices.get(record.layer) for record in records]
        inputs = self._joined(
            [[one.records[at].inputs for one in self.passes] for at in range(len(records))], 1, places
        )
        gradients = self._joined([list(of_record) for of_record in zip(*parts, strict=True)], repeats, places)
        joined = [record._replace(inputs=value) for record, value in zip(records, inputs, strict=True)]
        return layer_calls(joined, gradients, rows, repeats)

    def outputs_by(self, function: Callable[[ForwardPass, list[likelihoods.Head]], list[tf.Tensor]]) -> list[tf.Tensor]:
        """What `function` makes of each pass and its heads, on its device: a tensor for each head, rows joined."""
        results = []
        for one, own, device in zip(self.passes, self._heads, self.devices, strict=True):
            with on(device):
                results.append(function(one, own))
        return self._joined([list(of_head) for of_head in zip(*results, strict=True)])

    def sums_by(
        self,
        function: Callable[[ForwardPass, list[likelihoods.Head], list[tf.Tensor]], list[tf.Tensor]],
        of_heads: list[tf.Tensor],
    ) -> list[tf.Tensor]:
        """What `function` makes of each pass, its heads and its own rows of `of_heads`, on its device, added up.

        Args:
            function: as said; returns tensors of fixed shapes.
            of_heads: a tensor of all rows for each head.
        """
        splits = [self._split(one, 0, index) for index, one in enumerate(of_heads)]
        results = []
        for index, (one, own) in enumerate(zip(self.passes, self._heads, strict=True)):
            with on(self.devices[index]):
                results.append(function(one, own, [split[index] for split in splits]))
        if self._alone:
            return results[0]
        values = [list(of_value) for of_value in zip(*results, strict=True)]
        if self._strategy is None:
            return [sum_in_order(parts) for parts in values]
        rows = _gather(self._strategy, [[part[tf.newaxis] for part in parts] for parts in values])
        return [tf.reduce_sum(one, 0) for one in rows]


def _weight_of_rows(head: likelihoods.Head) -> tf.Tensor:
    """The weight of a head with a row for each of its examples."""
    weight = tf.convert_to_tensor(head.weight, tf.float32)
    return tf.fill(tf.shape(head.outputs)[:1], weight) if weight.shape.rank == 0 else weight


def _repeats_inside(values: tf.Tensor, repeats: int) -> tf.Tensor:
    """`[repeats · rows, ...]` as `[rows, repeats, ...]`."""
    shape = tf.shape(values)
    apart = tf.reshape(values, tf.concat([[repeats, shape[0] // repeats], shape[1:]], 0))
    apart = tf.ensure_shape(apart, [repeats, None, *values.shape[1:]])
    return tf.transpose(apart, [1, 0, *range(2, apart.shape.rank)])


def _repeats_outside(values: tf.Tensor) -> tf.Tensor:
    """The inverse of `_repeats_inside`."""
    apart = tf.transpose(values, [1, 0, *range(2, values.shape.rank)])
    return tf.ensure_shape(tf.reshape(apart, tf.concat([[-1], tf.shape(apart)[2:]], 0)), [None, *values.shape[2:]])


def _gather(strategy: tf.distribute.Strategy, values: Sequence[list[tf.Tensor]]) -> list[tf.Tensor]:
    """`JointPass._joined` over processes: packed into one matrix, since every gather has its latency.

    A row is put before those of each replica and taken out again: TensorFlow 2.21 ends the process where no replica has
    any.
    """
    dtype = tf.float64 if any(parts[0].dtype == tf.float64 for parts in values) else tf.float32
    shapes = [tf.TensorShape([None]).concatenate(parts[0].shape[1:]) for parts in values]
    for parts, shape in zip(values, shapes, strict=True):
        if not shape[1:].is_fully_defined():
            raise ValueError(
                "KPSVD needs inputs of fixed size, but for the batch, on several processes. "
                f"Received a layer's input of shape {parts[0].shape}."
            )
    widths = [shape[1:].num_elements() for shape in shapes]
    packed = []
    for of_replica in zip(*values, strict=True):
        rows = tf.shape(of_replica[0])[0]
        flat = [tf.reshape(tf.cast(one, dtype), [rows, width]) for one, width in zip(of_replica, widths, strict=True)]
        packed.append(tf.pad(tf.concat([tf.ones([rows, 1], dtype), *flat], 1), [[1, 0], [0, 0]]))
    everything = tf.ensure_shape(_all_gather(strategy, packed), [None, 1 + sum(widths)])
    everything = tf.boolean_mask(everything[:, 1:], everything[:, 0] > 0.5)
    apart = tf.split(everything, widths, axis=1)
    return [tf.reshape(one, [-1, *shape[1:]]) for one, shape in zip(apart, shapes, strict=True)]


def _all_gather(strategy: tf.distribute.Strategy, parts: list[tf.Tensor]) -> tf.Tensor:
    return strategy.gather(parts[0] if len(parts) == 1 else PerReplica(parts), axis=0)
