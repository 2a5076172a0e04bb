"""`instrument` swaps the supported layers of a model for instrumented ones, `uninstrument` swaps them back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_kpsvd.layers.attention import KPSVDGroupQueryAttention, KPSVDMultiHeadAttention
from keras_kpsvd.layers.copying import ModelCopier, is_copyable
from keras_kpsvd.layers.recording import RecordingLayer
from keras_kpsvd.layers.swapping import RECORDING, after_build, builds_as, forget_after_build, swap_inside

INSTRUMENTED: dict[type, type] = {
    **RECORDING,
    keras.layers.MultiHeadAttention: KPSVDMultiHeadAttention,
    keras.layers.GroupQueryAttention: KPSVDGroupQueryAttention,
}
STOCK = {twin: stock for stock, twin in INSTRUMENTED.items()}


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
    held = model._flatten_layers(include_self=False)
    if not any(
        type(layer) in INSTRUMENTED or type(layer) in STOCK or isinstance(layer, RecordingLayer) for layer in held
    ):
        expected = ", ".join(f"keras.layers.{stock.__name__}" for stock in RECORDING)
        received = sorted({type(layer).__qualname__ for layer in held}) or "no layers"
        later = "" if model.built else " It is not built: if it makes its layers when it is built, build it first."
        raise ValueError(
            f"instrument(model) found no layer to instrument in model {model.name!r}. Expected one of {expected} "
            f"(classes derived from them are left alone). Received {received}.{later}"
        )
    if not is_copyable(model):
        return _in_place(model, _instrument_in_place)
    copier = ModelCopier(INSTRUMENTED, "instrument")
    made = copier.copy(model)
    swap_inside(made, RECORDING)
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
        return _in_place(model, _uninstrument_in_place)
    copier = ModelCopier(STOCK, "uninstrument")
    with keras.saving.custom_object_scope({f"keras_kpsvd>{kind.__qualname__}": stock for kind, stock in STOCK.items()}):
        made = copier.copy(model)
    swap_inside(made, STOCK)
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


def _instrument_in_place(model: keras.Model) -> None:
    for layer in model._flatten_layers():
        if not layer.built and type(layer) not in RECORDING:  # It may make more layers then.
            after_build(layer, functools.partial(swap_inside, layer, RECORDING))
    swap_inside(model, RECORDING)


def _uninstrument_in_place(model: keras.Model) -> None:
    for layer in model._flatten_layers(include_self=False):  # First, so that nothing is half swapped.
        if not layer.built and builds_as(layer) in STOCK:
            raise ValueError(
                f"uninstrument(model) cannot swap layer {layer.name!r} of the subclassed model {model.name!r} before "
                "it is built. Call the model on a batch first, or write keras.layers."
                f"{type(layer).__name__} in its class."
            )
    for layer in model._flatten_layers():
        forget_after_build(layer)
    swap_inside(model, STOCK)


def _in_place(model: keras.Model, change: Callable[[keras.Model], None]) -> keras.Model:
    """Changes the layers of a model that cannot be copied, and what it has computed from them."""
    change(model)
    model.train_function = model.test_function = model.predict_function = None
    if not model.compiled:
        return model
    if model.jit_compile and not all(layer.supports_jit for layer in model._flatten_layers()):
        model.jit_compile = False
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if _is_ours(optimizer) and optimizer.built:
        warnings.warn(
            f"The layers of model {model.name!r} were changed in place, but its KPSVD optimizer was built for those it "
            "had: call `model.compile` again, with a new optimizer.",
            stacklevel=3,
        )
    return model


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
