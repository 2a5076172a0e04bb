"""Ctrl-C waits until a step is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import tensorflow as tf


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off SIGINT until the end of the block, then hands it to whoever handled it before.

    An eager step is many operations, and Python raises KeyboardInterrupt between any two of them. Graphs run whole.
    Only the main thread receives signals; elsewhere, in graphs, and where no Python function handles SIGINT, nothing is
    done.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not tf.executing_eagerly() or threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received = []
    signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[-1])
