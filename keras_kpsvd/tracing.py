"""What makes the first step short: nothing is traced in vain, and what many layers need is traced once.

TensorFlow traces a training step again once it has made variables, and only the second trace is ever run. Whatever goes
into the first, which makes the optimizer's state, is time lost.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import tensorflow as tf


def outside_the_trace() -> contextlib.AbstractContextManager:
    """Variables made in here have their values at once, in a tenth of the time that lifting them from a trace takes.

    The trace is thrown away all the same. With a distribution strategy in force it changes nothing: there variables
    belong to replicas.
    """
    return contextlib.nullcontext() if tf.distribute.has_strategy() else tf.init_scope()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection while a graph is traced.

    A trace makes a million objects that stay, and Python's collector goes through all that there are again and again
    as they grow: a tenth of the first step. Executing eagerly it changes nothing.
    """
    if tf.executing_eagerly() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class ThrownAwayTrace:
    """The trace in which it is made, if it is made in one: one that makes variables too, so that it is thrown away."""

    def __init__(self):
        self._graph = None if tf.executing_eagerly() else weakref.ref(tf.compat.v1.get_default_graph())

    def is_being_made(self) -> bool:
        """Whether what is traced now, branches included, is part of it."""
        if self._graph is None or tf.executing_eagerly():
            return False
        thrown_away, graph = self._graph(), tf.compat.v1.get_default_graph()
        while graph is not None and graph is not thrown_away:
            graph = getattr(graph, "outer_graph", None)
        return graph is not None


def traced_once(function: Callable, options: Hashable, *arguments: Any, sizes_matter: bool = False) -> Any:
    """`function(options, *arguments)` as a graph function that all blocks of a kind share, whatever their sizes.

    Traced and optimised for every layer by itself, decompositions took most of the first step.

    Args:
        function: of `options` and nested tuples of tensors and None; returns nested tensors.
        options: hashable, compared by value.
        *arguments: its own.
        sizes_matter: for how it computes: it is traced for each of them.
    """
    flat = tf.nest.flatten(arguments)
    specs = tuple(None if one is None else _spec(one, sizes_matter) for one in flat)
    structure = tf.nest.pack_sequence_as(arguments, range(len(flat)))
    return graph_function(function, options, structure, specs)(*(one for one in flat if one is not None))


@functools.cache
def graph_function(
    function: Callable, options: Hashable, structure: tuple, specs: tuple[tf.TensorSpec | None, ...]
) -> Callable:
    def call(*given):
        values = iter(given)
        flat = [None if spec is None else next(values) for spec in specs]
        return function(options, *tf.nest.pack_sequence_as(structure, flat))

    # Not inlined: else the copies would be optimised one by one after all.
    return tf.function(
        call,
        input_signature=[spec for spec in specs if spec is not None],
        autograph=False,
        experimental_attributes={"_noinline": True},
    )


def _spec(tensor: tf.Tensor, sizes_matter: bool) -> tf.TensorSpec:
    """The type of a tensor, unless all of them matter without the sizes that differ between blocks of a kind.

    Those of samples `[batch, 1, features]`, of vectors and square matrices, and the first of bases `[d, columns]`.
    """
    shape = tensor.shape.as_list()
    if sizes_matter:
        pass
    elif len(shape) == 3:
        shape = [None, 1, None]
    elif len(shape) == 2:
        shape = [None, None if shape[0] == shape[1] else shape[1]]
    elif len(shape) == 1:
        shape = [None]
    return tf.TensorSpec(shape, tensor.dtype)
