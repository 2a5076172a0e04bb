"""Checks of arguments: each raises a ValueError that names the argument, what it must be and what was received."""

from __future__ import annotations

import math
import numbers
import random
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

# Bound of the paper on the length of a step.
KL_CLIP = 1e-2


def is_number(value: Any) -> bool:
    """Whether `value` is a real number and no boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_choice(argument: str, value: Any, accepted: tuple[str, ...], alternative: str = "") -> None:
    """One of a few names; `alternative` says what else would be accepted."""
    if not isinstance(value, str) or value not in accepted:
        expected = ", ".join(map(repr, accepted))
        raise ValueError(f"`{argument}` must be one of {expected}{alternative}. Received: {argument}={value!r}")


def check_positive(argument: str, value: Any, alternative: str = "") -> None:
    """A finite number greater than 0; `alternative` says what else would be accepted."""
    if not is_number(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"`{argument}` must be a finite number greater than 0{alternative}. Received: {argument}={value!r}"
        )


def check_rate(value: Any) -> None:
    """A learning rate as Keras takes it: a finite number not below 0, a schedule or a callable."""
    usable = math.isfinite(value) and value >= 0 if is_number(value) else callable(value)
    if not usable:
        raise ValueError(
            "`learning_rate` must be a finite number not below 0, a schedule, a callable or 'adaptive'. "
            f"Received: learning_rate={value!r}"
        )


def check_fraction(argument: str, value: Any, *, one: bool) -> None:
    """A number in [0, 1), or in [0, 1] if `one`."""
    if not is_number(value) or not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(f"`{argument}` must be in [0, 1{']' if one else ')'}. Received: {argument}={value!r}")


def check_count(argument: str, value: Any, alternative: str = "") -> None:
    """An integer of 1 or more; `alternative` says what else would be accepted."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{argument}` must be an integer of 1 or more{alternative}. Received: {argument}={value!r}")


def check_strategy(strategy: tf.distribute.Strategy, *, seeded: bool) -> None:
    """A `tf.distribute` strategy under which steps are possible; on several processes only with a given seed."""
    replicas = strategy.num_replicas_in_sync
    known = tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy
    if replicas > 1 and not isinstance(strategy, known):
        raise ValueError(
            "KPSVD trains on several devices under tf.distribute.MirroredStrategy and MultiWorkerMirroredStrategy, "
            f"which keep every variable on every device. Received: {type(strategy).__name__} with {replicas} replicas"
        )
    if replicas > 1 and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and not seeded:
        raise ValueError(
            "`seed` must be an integer, the same in every process, under MultiWorkerMirroredStrategy: each would draw "
            "its own. Received: seed=None"
        )


def check_branches(strategy: tf.distribute.Strategy, **arguments: int | None) -> None:
    """No argument under which Keras lets replicas talk to each other inside a branch of a graph, which raises there."""
    if strategy.num_replicas_in_sync == 1 or tf.executing_eagerly():
        return
    for name, value in arguments.items():
        if value:
            raise ValueError(
                f"`{name}` does not work on several devices: Keras acts on it inside a branch of the graph, where "
                "TensorFlow lets devices not talk to each other. Leave it out, or compile with run_eagerly=True. "
                f"Received: {name}={value} with {strategy.num_replicas_in_sync} replicas"
            )


def check_steps_per_execution(strategy: tf.distribute.Strategy, steps: int) -> None:
    """One batch at a time on several devices, where Keras has no way to take more."""
    replicas = strategy.num_replicas_in_sync
    if replicas > 1 and steps > 1:
        raise ValueError(
            "`steps_per_execution` must be 1 on several devices: Keras takes more batches within a loop, which "
            "TensorFlow ends with an InvalidArgumentError, or eagerly not at all. Leave it out of `compile`. "
            f"Received: steps_per_execution={steps} with {replicas} replicas"
        )


def under_xla() -> bool:
    """Whether the function being traced is to be compiled by XLA."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def check_not_xla() -> None:
    """No step with curvature inside a function that XLA compiles."""
    if under_xla():
        raise ValueError(
            "KPSVD steps of instrumented layers cannot be compiled by XLA, which has no fast decompositions: leave out "
            "`jit_compile` or set it to False. Received: jit_compile=True"
        )


def resolve_seed(seed: int | None) -> int:
    """The seed itself, or one from the state of Python's generator, which `keras.utils.set_random_seed` sets, without
    moving it on.

    A model built after the optimizer thus starts from the weights it would have had without it.
    """
    if seed is not None:
        return int(seed)
    generator = random.Random()
    generator.setstate(random.getstate())
    return generator.randrange(2**31)


def check_switch(argument: str, value: Any) -> None:
    """A boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r}")


def check_seed(value: Any) -> None:
    """An integer or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise ValueError(f"`seed` must be an integer or None. Received: seed={value!r}")


def check_combinations(
    *, adaptive: bool, nesterov: bool, kl_clip: float | None, conjugate_steps: int, fit_interval: int
) -> None:
    """Refuses arguments of `KPSVD` that make no sense together."""
    if not adaptive:
        for argument, value in (("conjugate_steps", conjugate_steps), ("fit_interval", fit_interval)):
            if value > 1:
                raise ValueError(
                    f"`{argument}` says how the adaptive rate is found and has no meaning where `learning_rate` is "
                    "given: leave it out, or give learning_rate='adaptive'. "
                    f"Received: {argument}={value}"
                )
    if adaptive and kl_clip not in (None, KL_CLIP):
        raise ValueError(
            "`kl_clip` bounds steps of a given rate, and learning_rate='adaptive' fits each step to the quadratic "
            "model instead: leave it out, or give `learning_rate` a number or a schedule. "
            f"Received: kl_clip={kl_clip!r}"
        )
    if conjugate_steps > 1 and fit_interval > 1:
        raise ValueError(
            "`fit_interval` must be 1 where `conjugate_steps` is more than 1, which needs an exact model in every "
            "step: leave one of them out, or give conjugate_steps=1. "
            f"Received: conjugate_steps={conjugate_steps}, fit_interval={fit_interval}"
        )
    if adaptive and nesterov:
        raise ValueError(
            "`nesterov`=True has no meaning with learning_rate='adaptive', whose momentum is found in each step: "
            "leave it out, or give `learning_rate` a number. Received: nesterov=True"
        )


def check_terms(eigenvalues: str, method: str, *, two_term: bool) -> None:
    """Refuses corrected eigenvalues of a method with two terms, which has no one eigenbasis."""
    if eigenvalues == "corrected" and two_term:
        raise ValueError(
            "`eigenvalues`='corrected' needs a method of one term, whose factors have one eigenbasis: leave it out, or "
            f"give method='kfac' or 'kpsvd'. Received: method={method!r}"
        )
