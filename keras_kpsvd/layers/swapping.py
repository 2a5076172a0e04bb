"""Which layers have an instrumented twin, and the change from one to the other in place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras

from keras_kpsvd.layers.convolution import KPSVDConv1D, KPSVDConv2D
from keras_kpsvd.layers.copying import live_config
from keras_kpsvd.layers.dense import KPSVDDense
from keras_kpsvd.layers.einsum_dense import KPSVDEinsumDense
from keras_kpsvd.layers.recording import RecordingLayer

RECORDING: dict[type, type] = {
    keras.layers.Dense: KPSVDDense,
    keras.layers.Conv1D: KPSVDConv1D,
    keras.layers.Conv2D: KPSVDConv2D,
    keras.layers.EinsumDense: KPSVDEinsumDense,
}


def name_after(twin: type, stock: type) -> None:
    """Gives a class the `__name__` of its stock twin.

    Keras names the groups of a weights file, and layers that are given no name, after `__name__`: with the same one
    both kinds of model read each other's files. `.keras` files find the class under its registered name, which must be
    given already; `__qualname__`, which the class's `repr` and pickle use, stays.
    """
    twin.__name__ = stock.__name__


for _stock, _twin in RECORDING.items():
    name_after(_twin, _stock)


def swap_inside(layer: keras.layers.Layer, classes: dict[type, type]) -> None:
    """Swaps all layers inside `layer` (not itself) whose class is a key of `classes`, in place."""
    for inner in layer._flatten_layers(include_self=False):
        if type(inner) in classes:
            swap(inner, classes[type(inner)])


def swap(layer: keras.layers.Layer, kind: type) -> None:
    """Makes a layer one of another class that has the same arguments and weights, in place, built or not.

    A layer of that class made anew lends what its constructor and its `build` leave on an instance.
    """
    donor = kind.from_config(live_config(layer))
    object.__setattr__(layer, "__class__", kind)
    for name, value in vars(donor).items():
        if name.startswith("_call_") or name in ("call_signature_parameters", "supports_jit"):
            vars(layer)[name] = value

    def adopt_build() -> None:
        if not isinstance(layer, RecordingLayer):
            for variable in layer.weights:
                vars(variable).pop("_kpsvd_layer", None)
            return
        donor.build_from_config(layer.get_build_config())
        for name, value in vars(donor).items():
            vars(layer).setdefault(name, value)
        if any(hasattr(variable, "_kpsvd_layer") for variable in donor.weights):
            layer.claim()

    forget_after_build(layer)
    if layer.built:
        adopt_build()
    else:
        after_build(layer, adopt_build)


def after_build(layer: keras.layers.Layer, action: Callable[[], None]) -> None:
    """Calls `action` when `layer` has been built."""
    build = layer.build  # Keras binds it to each instance, with the method of the class that the instance had then.

    @functools.wraps(build)
    def build_and_act(*arguments, **keywords):
        build(*arguments, **keywords)
        action()

    build_and_act.after_build = True
    vars(layer)["build"] = build_and_act


def forget_after_build(layer: keras.layers.Layer) -> None:
    """Undoes all calls of `after_build`."""
    while hasattr(layer.build, "after_build"):
        vars(layer)["build"] = layer.build.__wrapped__


def builds_as(layer: keras.layers.Layer) -> type:
    """The class whose `build` an unbuilt layer runs: that of its making, whatever it has been swapped to."""
    build = layer.build
    while hasattr(build, "__wrapped__"):
        build = build.__wrapped__
    return next(kind for kind in type(layer).__mro__ if vars(kind).get("build") is build.__func__)
