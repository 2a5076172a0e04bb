"""On which device a layer's curvature is worked on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import tensorflow as tf

from keras_kpsvd.layers import RecordingLayer


def on(device: str | None) -> contextlib.AbstractContextManager:
    """`tf.device`, or nothing for None."""
    return contextlib.nullcontext() if device is None else tf.device(device)


def spread(costs: dict[RecordingLayer, float], devices: Sequence[str]) -> dict[RecordingLayer, str | None]:
    """A device for each layer, the most expensive first, each where least has been placed; None for a single one."""
    if len(devices) < 2:
        return dict.fromkeys(costs)
    loads = dict.fromkeys(devices, 0.0)
    placed = {}
    for layer in sorted(costs, key=costs.get, reverse=True):
        device = min(loads, key=loads.get)
        loads[device] += costs[layer]
        placed[layer] = device
    return placed
