"""Copies of Sequential and Functional models, the classes of their layers chosen anew.

`keras.models.clone_model` is not enough: it loses the state, the trainable flags of sub-models and the class of
Sequential models that define a `train_step`, and it takes compiled losses and Python lambdas through serialization,
where they break.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.saving.serialization_lib import SafeModeScope  # Public Keras only has a switch for the whole process.


class ModelCopier:
    """Copies models, layers and optimizers; what is shared in the original is shared in the copy.

    Args:
        classes: the class of a copy for the class of an original, where they differ.
        by: the public function at work, for error messages.

    Attributes:
        copies: `{id of the original: (original, copy)}` of all layers, models and operations copied so far.
    """

    def __init__(self, classes: dict[type, type], by: str):
        self.classes = classes
        self.by = by
        self.copies: dict[int, tuple[Any, Any]] = {}

    def copy(self, model: keras.Model) -> keras.Model:
        """The copy of a model that `is_copyable`, with its state, not compiled."""
        strategy = model.distribute_strategy
        scope = contextlib.nullcontext() if strategy is tf.distribute.get_strategy() else strategy.scope()
        with scope, _reconstruction(model):
            made = self(model)
            self._copy_state(model)
        return made

    def __call__(self, operation: Any) -> Any:
        """The copy of a layer, a model or another operation, made once."""
        if id(operation) not in self.copies:
            if not isinstance(operation, keras.layers.Layer):
                made = _copy_operation(operation)
            elif is_copyable(operation):
                made = self._copy_model(operation)
            else:
                made = self._copy_layer(operation)
            self.copies[id(operation)] = operation, made
        return self.copies[id(operation)][1]

    def _copy_model(self, model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            layers = [self(layer) for layer in model._layers]  # `model.layers` leaves the input layer out.
            made = type(model)(layers, name=model.name)
        elif _takes_inputs_and_outputs(type(model)):
            inputs = keras.tree.map_structure(lambda x: self(x._keras_history.operation).output, model.input)
            outputs = model._run_through_graph(inputs, operation_fn=self)
            made = type(model)(inputs, outputs, name=model.name)
        else:
            made = self._from_config(model)
        made.dtype_policy = model.dtype_policy  # The constructors take the global policy of now.
        return made

    def _copy_layer(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        if type(layer) is keras.layers.Lambda:
            base = keras.layers.Layer.get_config(layer)
            return keras.layers.Lambda(layer.function, layer._output_shape, layer.mask, layer.arguments, **base)
        if type(layer) is keras.layers.TimeDistributed:
            return keras.layers.TimeDistributed(self(layer.layer), **keras.layers.Layer.get_config(layer))
        return self._from_config(layer)

    def _from_config(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        kind = self.classes.get(type(layer), type(layer))
        try:
            made = kind.from_config(live_config(layer))
        except Exception as error:
            raise ValueError(
                f"{self.by}(model) could not copy layer {layer.name!r}: {kind.__name__}.from_config(get_config()) "
                f"raised {type(error).__name__}: {error}. Give the class a `get_config` that holds every argument of "
                "its constructor, as `model.save` needs it too."
            ) from error
        made.autocast = layer.autocast
        return made

    def _copy_state(self, model: keras.Model) -> None:
        """Weights, seeds, and trainable flags."""
        for original, made in list(self.copies.values()):
            if isinstance(original, keras.layers.Layer) and original.built and not made.built:
                made.build_from_config(original.get_build_config())
        self.variables = {}
        for original, made in self.layer_pairs():
            made.name = original.name
            if original._trainable != made._trainable:
                made._trainable = original._trainable
            values, targets = _own_state(original), _own_state(made)
            if [(v.shape, v.dtype) for v in values] != [(v.shape, v.dtype) for v in targets]:
                raise self._different(original, values, targets)
            for value, target in zip(values, targets, strict=True):
                target.assign(value)
                if target.trainable != value.trainable:
                    target.trainable = value.trainable
                self.variables[id(value)] = target
            _copy_vocabulary(original, made)
            if hasattr(made, "finalize_state"):  # Preprocessing computes from the variables once, not in each call.
                made.finalize_state()
        held = {v.path: v for layer in model._flatten_layers() for v in layer.weights}
        left = [path for path, variable in held.items() if id(variable) not in self.variables]
        if left:
            raise ValueError(
                f"{self.by}(model) could not copy these weights of model {model.name!r}, which belong to no layer of "
                f"its graph: {left}. Attach to the copy what is only attached to the model."
            )

    def layer_pairs(self) -> list[tuple[keras.layers.Layer, keras.layers.Layer]]:
        """Each layer of the original and its copy, those inside other layers too."""
        pairs = {}
        for original, made in self.copies.values():
            if not isinstance(original, keras.layers.Layer):
                continue
            inside, copied = (
                [layer] if is_copyable(original) else layer._flatten_layers() for layer in (original, made)
            )
            if len(inside) != len(copied):
                raise self._different(original, *([one.name for one in layers] for layers in (inside, copied)))
            pairs.update((id(one), (one, other)) for one, other in zip(inside, copied, strict=True))
        return list(pairs.values())

    def _different(self, layer: keras.layers.Layer, expected: list, received: list) -> ValueError:
        return ValueError(
            f"{self.by}(model) could not copy layer {layer.name!r} ({type(layer).__qualname__}): the layer made from "
            f"its configuration holds something else. Expected {expected}, received {received}."
        )

    def compile(
        self, model: keras.Model, made: keras.Model, convert: Callable[[Any], Any] = lambda optimizer: None
    ) -> None:
        """Compiles the copy as the original is, with the optimizer's state where it has some.

        Losses are shared, metrics start afresh. `convert` may return another optimizer for a given one.
        """
        if not model.compiled:
            return
        if type(model).compile is not keras.Model.compile:
            warnings.warn(
                f"{self.by}(model) left the copy of {model.name!r} without compiling it, since {type(model).__name__} "
                "has a `compile` of its own: call it on the copy.",
                stacklevel=4,
            )
            return
        arguments = dict(model._compile_config.config)  # The objects themselves; `get_compile_config` serializes them.
        given = arguments["optimizer"]
        with _reconstruction(model):
            optimizer = convert(given) or type(given).from_config(given.get_config())
            metrics = {
                name: keras.tree.map_structure(_fresh_metric, arguments[name])
                for name in ("metrics", "weighted_metrics")
            }
        jit_compile = "auto" if arguments["jit_compile"] else False  # Not True, which warns where it is not supported.
        scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        made.compile(
            **{**arguments, **metrics, "optimizer": optimizer, "jit_compile": jit_compile, "auto_scale_loss": scales}
        )
        made.unrolled_steps_per_execution = model.unrolled_steps_per_execution
        if type(optimizer) is type(given) and model.optimizer.built:
            self._copy_optimizer(model, made)

    def _copy_optimizer(self, model: keras.Model, made: keras.Model) -> None:
        source, target = model.optimizer, made.optimizer
        trained = getattr(source, "inner_optimizer", source)._trainable_variables
        if all(id(variable) in self.variables for variable in trained):
            target.build([self.variables[id(variable)] for variable in trained])
            if [v.shape for v in source.variables] == [v.shape for v in target.variables]:
                for value, variable in zip(source.variables, target.variables, strict=True):
                    variable.assign(value)
                return
        warnings.warn(
            f"{self.by}(model) could not carry the state of optimizer {source.name!r} over to the copy, since the copy "
            "has other variables: the copy's optimizer starts afresh.",
            stacklevel=5,
        )


def is_copyable(layer: Any) -> bool:
    """Whether `ModelCopier` can take a model apart: Sequential, Functional, no constructor of its own or a config."""
    if isinstance(layer, keras.Sequential):
        return type(layer).__init__ is keras.Sequential.__init__
    if not (isinstance(layer, keras.Model) and isinstance(layer, keras.Function)):
        return False
    return _takes_inputs_and_outputs(type(layer)) or _has_own_config(layer)


def _has_own_config(model: keras.Model) -> bool:
    return type(model).get_config.__module__.partition(".")[0] != "keras"


def _takes_inputs_and_outputs(kind: type) -> bool:
    """Whether a class of Functional models is constructed as `keras.Model(inputs, outputs)` is."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    names = [parameter.name for parameter in parameters]
    return names[:3] == ["inputs", "outputs", "name"] or kinds == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }


def live_config(layer: keras.layers.Layer) -> dict[str, Any]:
    """`layer.get_config()` with its lambdas themselves: Keras serializes those of activations to what it can't read."""
    lambdas = {name: value for name, value in vars(layer).items() if _is_lambda(value)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*includes a `lambda`.*")
        config = layer.get_config()
    return {name: lambdas.get(name, value) for name, value in config.items()}


def _is_lambda(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value.__name__ == "<lambda>"


def _copy_operation(operation: Any) -> Any:
    """Operations that are no layers, `a + b` say, hold no state but their place in the graph."""
    made = object.__new__(type(operation))
    vars(made).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return made


def _own_state(layer: keras.layers.Layer) -> list[Any]:
    """Variables and seeds of a layer, not of those inside it."""
    seeds = [generator.state for generator in layer._seed_generators]
    return [*layer._trainable_variables, *layer._non_trainable_variables, *seeds]


def _copy_vocabulary(original: keras.layers.Layer, made: keras.layers.Layer) -> None:
    """Lookup layers keep what they have adapted to in files, not in variables."""
    if hasattr(original, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            made.load_assets(folder)


def _fresh_metric(metric: Any) -> Any:
    return type(metric).from_config(metric.get_config()) if isinstance(metric, keras.metrics.Metric) else metric


@contextlib.contextmanager
def _reconstruction(model: keras.Model) -> Iterator[None]:
    """Classes and functions that the model's layers hold are found, registered or not, and lambdas are allowed.

    They are the caller's own code, alive in this process.
    """
    names = {}
    compiled = keras.tree.flatten(model._compile_config.config) if model.compiled else []
    for holder in [*model._flatten_layers(), *compiled]:
        for value in [holder, *getattr(holder, "__dict__", {}).values()]:
            named = value if isinstance(value, types.FunctionType) else type(value)
            if named.__module__.partition(".")[0] not in ("keras", "builtins", "tensorflow", "keras_kpsvd"):
                names[named.__name__] = named
    with keras.saving.custom_object_scope(names), SafeModeScope(safe_mode=False):
        yield
