"""Steps of `KPSVD` without guards: what the guards are, and how each is taken out.

A guard is what a step does only in case numbers are not finite or a decomposition fails; `GUARDS` lists them. Names of
the package's modules are replaced while a step is traced, and checks whose answer is then known are decided while
tracing, so that their operations never enter the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd import steps
from keras_kpsvd.curvature import averaging, corrected, inverses, natural_gradient, reduction, state
from keras_kpsvd.curvature.failures import Failures
from keras_kpsvd.linalg import eigenbasis, gram, kronecker, lanczos, rearrangement, singular, solve, triples, truncated
from keras_kpsvd.tracing import graph_function

# A module, or a class; a name in it; what stands there while a step is traced.
Replacement = tuple[Any, str, Any]


class Folding:
    """TensorFlow, but what depends on an answer known while tracing (a NumPy boolean) is decided there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tf, name)

    @staticmethod
    def where(condition: Any, *values: Any, **options: Any) -> Any:
        """`tf.where`, or one of the values."""
        if isinstance(condition, np.bool_):
            return values[0] if condition else values[1]
        return tf.where(condition, *values, **options)

    @staticmethod
    def cond(condition: Any, true_fn: Callable, false_fn: Callable) -> Any:
        """`tf.cond`, or what one of the branches returns."""
        if isinstance(condition, np.bool_):
            return true_fn() if condition else false_fn()
        return tf.cond(condition, true_fn, false_fn)

    @staticmethod
    def stack(values: Any, *arguments: Any, **options: Any) -> Any:
        """`tf.stack`, or a NumPy array."""
        if isinstance(values, list) and values and all(isinstance(value, np.bool_) for value in values):
            return np.array(values)
        return tf.stack(values, *arguments, **options)

    @staticmethod
    def reduce_all(values: Any, *arguments: Any, **options: Any) -> Any:
        """`tf.reduce_all`, or a NumPy boolean."""
        if isinstance(values, np.bool_ | np.ndarray):
            return np.all(values)
        return tf.reduce_all(values, *arguments, **options)


class Trusting(Folding):
    """The same, and every number is taken to be finite."""

    def __init__(self):
        self.math = _TrustingMath()


class _TrustingMath:
    def __getattr__(self, name: str) -> Any:
        return getattr(tf.math, name)

    is_finite = staticmethod(lambda values: np.True_)


def passes(*_: Any) -> np.bool_:
    """Stands for a check: it holds, which is known while tracing."""
    return np.True_


def ignored(*_: Any) -> None:
    """Stands for what is done for its effect alone."""


def trusting(*modules: Any) -> list[Replacement]:
    """All checks for finite numbers in `modules`."""
    checks = [(module, "all_finite", passes) for module in modules if hasattr(module, "all_finite")]
    return [*checks, *((module, "tf", Trusting()) for module in modules)]


def assign(variables: list[keras.Variable], values: list[tf.Tensor]) -> None:
    """`assign_last` without its order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _while_tracing(kernel: Callable, replacements: list[Replacement]) -> Callable:
    """`kernel` with what it finds in its own module replaced: two kernels there have guards of their own."""

    def traced(*arguments: Any) -> Any:
        with _replaced(replacements):
            return kernel(*arguments)

    return traced


def _inverting(options: Any, terms: Any, old: Any, known: Any, damping: Any) -> Any:
    return _STOCK_INVERT(options, terms, old, np.True_, damping)


_STOCK_INVERT = inverses._invert
_LINALG = (eigenbasis, gram, kronecker, lanczos, rearrangement, singular, solve, triples, truncated)

# Name and what it is, then what takes it out.
GUARDS: dict[str, tuple[str, list[Replacement]]] = {
    "gradient": (
        "the gradient is finite, else the step is skipped",
        [(steps, "_is_finite", passes), (steps, "tf", Folding())],
    ),
    "step": (
        "the preconditioned gradient and its length are finite, else the step is skipped",
        [*trusting(natural_gradient), (steps, "tf", Folding())],
    ),
    "factors": (
        "samples and new factors are finite, exact triples exact and bases orthonormal, else the old ones stay",
        [
            *trusting(reduction),
            (
                state,
                "_refresh",
                _while_tracing(
                    state._refresh,
                    [*trusting(state), (state, "_are_exact", passes), (state, "is_orthonormal", passes)],
                ),
            ),
        ],
    ),
    "probes": (
        "new preconditioners are finite and reproduce a probe vector, else the old ones stay",
        [
            (
                inverses,
                "_invert",
                _while_tracing(
                    _inverting,
                    [*trusting(inverses), (inverses, "inverts", passes), (inverses, "orthonormalises", passes)],
                ),
            ),
            (corrected, "_new_or_old", lambda new, *_: ([new], np.True_)),
        ],
    ),
    "linear algebra": (
        "what decompositions get is finite, and factors are not indefinite",
        trusting(*_LINALG, averaging),
    ),
    "eigh": (
        "eigendecompositions that fail are caught, in Python",
        [(module, "eigh", tf.linalg.eigh) for module in _LINALG if hasattr(module, "eigh")],
    ),
    "counters": (
        "failures in a row are counted and told",
        [(Failures, name, ignored) for name in ("no_step_skipped", "of_refresh", "of_inversion")],
    ),
    "order": (
        "nothing is assigned before everything is computed",
        [(module, "assign_last", assign) for module in (state, natural_gradient)],
    ),
}


@contextlib.contextmanager
def _replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


@contextlib.contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Steps that are traced within have none of the guards `names`; steps traced before or after have all of them."""
    with _replaced(replacement for name in names for replacement in GUARDS[name][1]):
        graph_function.cache_clear()  # They would be shared with steps that have other guards.
        try:
            yield
        finally:
            graph_function.cache_clear()
