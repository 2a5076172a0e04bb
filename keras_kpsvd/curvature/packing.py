"""Kronecker terms as optimizers keep them: symmetric factors by their lower triangles."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_kpsvd.curvature.approximations import Pair
from keras_kpsvd.linalg import pack, rows_of, unpack
from keras_kpsvd.tracing import traced_once


def packed(terms: tuple[Pair, ...]) -> list[tf.Tensor]:
    """The lower triangles of all factors in turn, with lengths left open."""
    return [traced_once(_pack, None, factor) for factor in flattened(terms)]


def unpacked(terms: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The symmetric matrices."""
    return tuple((_unpacked_one(a), _unpacked_one(g)) for a, g in terms)


def _pack(_: None, factor: tf.Tensor) -> tf.Tensor:
    return pack(factor)


def _unpack(_: None, packed: tf.Tensor) -> tf.Tensor:
    return unpack(packed)


def _unpacked_one(packed: tf.Tensor) -> tf.Tensor:
    """Traced once for all: it is called for every factor."""
    matrix = traced_once(_unpack, None, packed)
    if packed.shape[0] is not None:
        matrix.set_shape([rows_of(packed.shape[0])] * 2)
    return matrix


def flattened(pairs: Any) -> list:
    return [factor for pair in pairs for factor in pair]
