"""`instrument` swaps the supported layers of a model for instrumented ones, `uninstrument` swaps them back."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import keras

from keras_kpsvd.layers.convolution import KPSVDConv1D, KPSVDConv2D
from keras_kpsvd.layers.copying import ModelCopier, is_copyable, live_config
from keras_kpsvd.layers.dense import KPSVDDense
from keras_kpsvd.layers.einsum_dense import KPSVDEinsumDense
from keras_kpsvd.layers.recording import RecordingLayer

INSTRUMENTED = {
    keras.layers.Dense: KPSVDDense,
    keras.layers.Conv1D: KPSVDConv1D,
    keras.layers.Conv2D: KPSVDConv2D,
    keras.layers.EinsumDense: KPSVDEinsumDense,
}
STOCK = {recording: stock for stock, recording in INSTRUMENTED.items()}

for _stock, _recording in INSTRUMENTED.items():
    # Keras names the groups of a weights file, and layers that have no name, after `__name__`: with that of the stock
    # class both kinds of model read each other's files. `.keras` files find the class under its registered name, and
    # `__qualname__`, which `repr` and pickle use, stays.
    _recording.__name__ = _stock.__name__


def instrument(model: keras.Model) -> keras.Model:
    """A copy of `model` in which every supported layer reports to the curvature recorder of `keras_kpsvd.KPSVD`.

    Supported are `keras.layers.Dense`, `Conv1D`, `Conv2D` and `EinsumDense` themselves, not classes derived from them,
    wherever they stand: in nested and shared sub-models, and inside other layers (the projections of
    `MultiHeadAttention`, say, or the layer of a `TimeDistributed`). Outputs are the same to the last bit.

    The copy has weights, statistics and seeds, names, trainable flags, regularizers, constraints and dtype policies of
    its own, equal to those of the original, which is left as it is. A compiled model's copy is compiled likewise, with
    the optimizer's state; losses are shared, metrics start afresh. Attributes that a user has set on the model or its
    layers are not copied. Weights files (`save_weights`) of both models fit each other.

    A subclassed model, or a Sequential or Functional one with a constructor of its own and no `get_config`, cannot be
    copied: **it is instrumented in place and returned itself**, and its compiled functions are made anew. Layers that
    it makes later than this call (in a `build` that has not run, say) are not reached. A reloaded `.keras` file holds
    the instrumented layers that the configuration of the model names; layers that other layers make (the projections
    of `MultiHeadAttention`) come back as stock ones, and so do those of a subclassed model: call `instrument` again.

    Layers called inside a loop or a recurrent cell are not recorded and train by plain momentum.

    Args:
        model: a `keras.Model`; built or not, compiled or not. One that is instrumented already is copied as it is.

    Returns:
        The instrumented copy; for a subclassed model, `model`.

    Raises:
        TypeError: `model` is not a `keras.Model`.
        ValueError: it holds no supported layer, or a layer of it cannot be copied.
    """
    _check_model(model, "instrument")
    kinds = {*INSTRUMENTED, *STOCK}
    held = model._flatten_layers(include_self=False)
    if not any(type(layer) in kinds or isinstance(layer, RecordingLayer) for layer in held):
        expected = ", ".join(f"keras.layers.{stock.__name__}" for stock in INSTRUMENTED)
        received = sorted({type(layer).__qualname__ for layer in held}) or "no layers"
        later = "" if model.built else " It is not built: if it makes its layers when it is built, build it first."
        raise ValueError(
            f"instrument(model) found no layer to instrument in model {model.name!r}. Expected one of {expected} "
            f"(classes derived from them are left alone). Received {received}.{later}"
        )
    if not is_copyable(model):
        return _swap_in_place(model, INSTRUMENTED)
    copier = ModelCopier(INSTRUMENTED, "instrument")
    made = copier.copy(model)
    _swap_inside(made, INSTRUMENTED)
    copier.compile(model, made)
    return made


def uninstrument(model: keras.Model) -> keras.Model:
    """The inverse of `instrument`: a copy of `model` with stock layers, to be deployed without this package.

    As `instrument` in all else, in place for subclassed models included. A compiled `keras_kpsvd.KPSVD` becomes the
    `keras.optimizers.SGD` that it is on stock layers, without state; any other optimizer is kept.

    Args:
        model: a `keras.Model`; one without instrumented layers is copied as it is.

    Returns:
        The copy; for a subclassed model, `model`.

    Raises:
        TypeError: `model` is not a `keras.Model`.
        ValueError: a layer of it cannot be copied.
    """
    _check_model(model, "uninstrument")
    if not is_copyable(model):
        return _swap_in_place(model, STOCK)
    copier = ModelCopier(STOCK, "uninstrument")
    with keras.saving.custom_object_scope({f"keras_kpsvd>{kind.__qualname__}": stock for kind, stock in STOCK.items()}):
        made = copier.copy(model)
    _swap_inside(made, STOCK)
    copier.compile(model, made, _stock_optimizer)
    return made


def _check_model(model: Any, by: str) -> None:
    if isinstance(model, keras.Model):
        return
    advice = ""
    if isinstance(model, keras.layers.Layer):
        advice = " For one layer write keras_kpsvd.KPSVDDense and the like, or wrap it: keras.Sequential([layer])."
    raise TypeError(
        f"{by}(model) expects `model` to be a keras.Model (Sequential, Functional or subclassed). "
        f"Received {model!r} of type {type(model).__qualname__}.{advice}"
    )


def _swap_inside(model: keras.Model, classes: dict[type, type]) -> None:
    for layer in model._flatten_layers(include_self=False):
        if type(layer) in classes:
            _swap(layer, classes[type(layer)])


def _swap_in_place(model: keras.Model, classes: dict[type, type]) -> keras.Model:
    for layer in model._flatten_layers(include_self=False):  # First, so that nothing is half swapped.
        if classes is STOCK and type(layer) in STOCK and not layer.built and layer.build.__wrapped__.__func__ is type(layer).build:
            raise ValueError(
                f"uninstrument(model) cannot swap layer {layer.name!r} of the subclassed model {model.name!r} before it "
                "is built. Call the model on a batch first, or write keras.layers."
                f"{type(layer).__name__} in its class instead of {type(layer).__qualname__}."
            )
    _swap_inside(model, classes)
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        if model.jit_compile and not all(layer.supports_jit for layer in model._flatten_layers()):
            model.jit_compile = False
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if _is_ours(optimizer) and (optimizer.built or classes is STOCK):
            warnings.warn(
                f"Model {model.name!r} was changed in place after its KPSVD optimizer was "
                f"{'built' if optimizer.built else 'compiled'}: call `model.compile` again, with a new optimizer.",
                stacklevel=3,
            )
    return model


def _swap(layer: keras.layers.Layer, kind: type) -> None:
    """Makes a layer one of another class that has the same weights and arguments, in place.

    A layer of that class made anew lends what its constructor and its `build` leave on an instance.
    """
    donor = kind.from_config(live_config(layer))
    object.__setattr__(layer, "__class__", kind)
    for name, value in vars(donor).items():
        if name.startswith("_call_") or name in ("call_signature_parameters", "supports_jit"):
            vars(layer)[name] = value
    if layer.built:
        _adopt_build(layer, donor, layer.get_build_config())
        return
    build = layer.build  # The instance's own, which Keras bound to the method of the class that it had.

    @functools.wraps(build)
    def build_and_adopt(*arguments, **keywords):
        build(*arguments, **keywords)
        if type(layer) is kind:
            _adopt_build(layer, donor, layer.get_build_config())

    vars(layer)["build"] = build_and_adopt


def _adopt_build(layer: keras.layers.Layer, donor: keras.layers.Layer, configuration: dict) -> None:
    """What the new class's `build` does beyond the weights, and the claim on them."""
    recording = isinstance(layer, RecordingLayer)
    if not recording:
        for variable in layer.weights:
            vars(variable).pop("_kpsvd_layer", None)
        return
    donor.build_from_config(configuration)
    for name, value in vars(donor).items():
        vars(layer).setdefault(name, value)
    if any(hasattr(variable, "_kpsvd_layer") for variable in donor.weights):
        layer.claim()


def _is_ours(optimizer: Any) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "keras_kpsvd"


def _stock_optimizer(optimizer: Any) -> Any:
    """On stock layers KPSVD is SGD with its rate and momentum; None for an optimizer that may stay."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and _is_ours(optimizer.inner_optimizer):
        inner = _stock_optimizer(optimizer.inner_optimizer)
        return keras.optimizers.LossScaleOptimizer(inner, name=optimizer.name)
    if not _is_ours(optimizer):
        return None
    return keras.optimizers.SGD.from_config(keras.optimizers.SGD.get_config(optimizer))
