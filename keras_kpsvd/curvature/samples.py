"""From a recorded forward pass to per-example samples `(activations, gradients)` of every instrumented layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd import likelihoods, loss_densities
from keras_kpsvd.curvature.reduction import LayerCall, positions_of, side_by_side
from keras_kpsvd.layers import ForwardPass, Record, Recorder, RecordingLayer

Samples = tuple[tf.Tensor, tf.Tensor]

FISHERS = ("sampled", "empirical", "exact")


def check_fisher(fisher: str) -> None:
    """Raises a ValueError that names `fisher` if it is none of the accepted values."""
    if fisher not in FISHERS:
        raise ValueError(f"`fisher` must be one of {', '.join(map(repr, FISHERS))}. Received: fisher={fisher!r}")


def pass_heads(forward_pass: ForwardPass, likelihood: str | Callable) -> list[likelihoods.Head]:
    """The outputs of a recorded pass with their densities; see `loss_densities.heads`."""
    outputs = forward_pass.outputs if forward_pass.outputs is not None else forward_pass.last_output
    sample_weight = None if forward_pass.batch is None else forward_pass.batch["sample_weight"]
    return loss_densities.heads(likelihood, forward_pass.model, outputs, sample_weight)


def preactivation_gradients(
    forward_pass: ForwardPass, heads: list[likelihoods.Head], fisher: str, seed: tf.Tensor
) -> list[tf.Tensor]:
    """Per-example gradients `g` by each recorded pre-activation, scaled so that `E[vec(D_n) vec(D_n)ᵀ]` is the
    curvature.

    Args:
        forward_pass: a closed pass.
        heads: its outputs.
        fisher: "sampled": one backward pass at targets drawn from the predictive distribution; "exact": one for each
            output or class, side by side along the batch and scaled by `√k`; "empirical": the gradients at the actual
            targets.
        seed: `[2]` integers for "sampled".

    Returns:
        For each record a tensor of the shape of its pre-activation, `k` times as many rows for "exact".

    Raises:
        ValueError: no output depends on a recorded layer, or `fisher` can't be had here.
    """
    return pull_back(forward_pass, heads, cotangents(heads, fisher, seed), fisher)


def cotangents(heads: list[likelihoods.Head], fisher: str, seed: tf.Tensor) -> list[tf.Tensor]:
    """What `pull_back` is to pull back for each head: `[batch, ...]` for "sampled", `[k, batch, ...]` for "exact".

    Nothing for "empirical", where the loss itself is differentiated.
    """
    if fisher == "empirical":
        return []
    if fisher == "exact":
        return [likelihoods.exact_cotangents(head) for head in heads]
    return [
        likelihoods.sampled_cotangent(head, seed + tf.constant([0, index], seed.dtype))
        for index, head in enumerate(heads)
    ]


def pull_back(
    forward_pass: ForwardPass,
    heads: list[likelihoods.Head],
    of_heads: list[tf.Tensor],
    fisher: str,
    examples: tf.Tensor | None = None,
) -> list[tf.Tensor]:
    """The gradients of `preactivation_gradients` for given `cotangents`.

    `examples` is the number that the recorded loss is a mean over, where this pass is one of several; without it, that
    of its own examples.
    """
    sources = [record.preactivation for record in forward_pass.records]
    if fisher == "empirical":
        return _empirical(forward_pass, heads, sources, examples)
    if fisher == "sampled":
        return _backward(forward_pass.tape, [head.outputs for head in heads], sources, of_heads)
    blocks, reached = [], []
    for head, each in zip(heads, of_heads, strict=True):
        gradients = tf.map_fn(
            lambda cotangent, output=head.outputs: _backward(
                forward_pass.tape, [output], sources, [cotangent], reached
            ),
            each,
            fn_output_signature=[tf.TensorSpec(source.shape, source.dtype) for source in sources],
        )
        blocks.append([(each.shape[0], gradient) for gradient in gradients])
    _check_reached(reached)
    total = sum(block[0][0] for block in blocks)
    merged = []
    for of_source in zip(*blocks, strict=True):
        stacked = tf.concat([gradient for _, gradient in of_source], axis=0)
        flat = tf.reshape(stacked, tf.concat([[-1], tf.shape(stacked)[2:]], 0))
        flat.set_shape([None, *stacked.shape[2:]])
        merged.append(flat * tf.cast(float(total) ** 0.5, flat.dtype))
    return merged


def layer_calls(
    records: list[Record],
    gradients: list[tf.Tensor],
    rows: Callable[..., int | None] | None = None,
    repeats: int = 1,
) -> dict[RecordingLayer, list[LayerCall]]:
    """The calls of every recorded layer with their gradients.

    Args:
        records: of a pass.
        gradients: one for each record; with `k` times as many rows as the batch the inputs are repeated.
        rows: from the shapes of a layer's blocks and its positions per example (None if unknown) to how many examples
            to use, the first of the batch; None for all.
        repeats: that `k`, handed on to `rows` by name.

    Returns:
        `{layer: calls}`, in the order of the calls.
    """
    collected: dict[RecordingLayer, list[LayerCall]] = {}
    for record, gradient in zip(records, gradients, strict=True):
        collected.setdefault(record.layer, []).append(LayerCall(record.inputs, gradient))
    for layer, calls in collected.items():
        limit = None if rows is None else rows(layer.block_shapes, positions_of(layer, calls), repeats=repeats)
        collected[layer] = [_first_rows(*call, limit) for call in calls]
    return collected


def _first_rows(inputs: tf.Tensor, gradient: tf.Tensor, rows: int | None) -> LayerCall:
    """The first examples, the inputs repeated where the gradient holds several rows of each."""
    batch = tf.shape(inputs)[0]
    repeats = tf.math.floordiv(tf.shape(gradient)[0], tf.maximum(batch, 1))
    if rows is not None:
        inputs = inputs[:rows]
        gradient = tf.boolean_mask(gradient, tf.tile(tf.range(batch) < rows, [repeats]))
    multiples = tf.concat([[repeats], tf.ones([inputs.shape.rank - 1], tf.int32)], 0)
    return LayerCall(tf.tile(inputs, multiples), gradient)


def layer_samples(
    forward_pass: ForwardPass, gradients: list[tf.Tensor], rows: int | None = None
) -> dict[RecordingLayer, list[Samples]]:
    """Samples of every recorded layer, in the one format; as `layer_calls`, with `rows` the same for all layers.

    Returns:
        `{layer: [(activations [batch, shared, d_in], gradients [batch, shared, d_out]) of each block]}`; the calls of a
        layer stand side by side along `shared`, so that their contributions to `D_n` add up.
    """
    calls = layer_calls(forward_pass.records, gradients, lambda shapes, positions, repeats: rows)
    return {layer: side_by_side(layer, of_layer) for layer, of_layer in calls.items()}


def whole_layer(blocks: list[Samples]) -> Samples:
    """The samples of several blocks as those of one matrix, the blocks' columns side by side.

    Blocks stand side by side along `shared`, their gradients zero in the columns of the others, so that `D_n` is the
    gradient of the whole.
    """
    if len(blocks) == 1:
        return blocks[0]
    widths = [gradients.shape[-1] for _, gradients in blocks]
    padded = [
        tf.pad(gradients, [[0, 0], [0, 0], [sum(widths[:index]), sum(widths[index + 1 :])]])
        for index, (_, gradients) in enumerate(blocks)
    ]
    return tf.concat([activations for activations, _ in blocks], axis=1), tf.concat(padded, axis=1)


def fisher_samples(
    model: keras.Model,
    x: Any,
    y: Any = None,
    seed: int | None = None,
    *,
    fisher: str = "sampled",
    likelihood: str | Callable = "auto",
) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
    """Per-example activations and pre-activation gradients of every instrumented layer of a compiled model.

    One forward pass in training mode; whatever it changes besides (moving averages, random states, metrics) is put
    back.

    Args:
        model: a compiled model with instrumented layers, built or not.
        x: inputs as the model takes them.
        y: targets. Given, the gradients are those at `y`, scaled so that the batch mean of `D_n = Σ_t ā_t g_tᵀ` is
            exactly the gradient of the compiled loss (regularizers of the weights apart). Not given, targets are drawn
            from the model's predictive distribution and the scale is such that `E[vec(D_n) vec(D_n)ᵀ]` is the curvature
            of the compiled loss: its generalised Gauss–Newton matrix, for a loss that averages over `c` outputs `E[∇log
            p ∇log pᵀ]/c`.
        seed: for the drawn targets; None draws afresh.
        fisher: "sampled", or "exact" for the expectation over targets, which has `k` rows for each example, one for
            each output or class. Of no meaning with `y`.
        likelihood: as in `KPSVD`.

    Returns:
        `{layer name: (activations [batch, shared, d_in], gradients [batch, shared, d_out])}`, float32 (float64 for
        layers of that dtype), bias column last, patches of convolutions in the kernel's own row order. A layer called
        twice has its calls side by side along `shared`. So has a grouped convolution its groups, with gradients that
        are zero outside the group's own filters, so that `D_n` is the gradient of the whole kernel. Layers with the
        same name are told apart by their paths.

    Raises:
        ValueError: the model is not compiled with a loss, holds no instrumented layer, or its density can't be known.
    """
    samples = block_samples(model, x, y, seed, fisher=fisher, likelihood=likelihood)
    return {name: whole_layer(blocks) for name, blocks in samples.items()}


def block_samples(
    model: keras.Model, x: Any, y: Any, seed: int | None, *, fisher: str, likelihood: str | Callable
) -> dict[str, list[Samples]]:
    """`fisher_samples` with a list for each layer: the samples of each of its blocks."""
    check_fisher(fisher)
    likelihoods.check(likelihood, fisher)
    if fisher == "empirical":
        raise ValueError("`fisher`='empirical' needs targets: pass `y` instead.")
    if not getattr(model, "compiled", False) or model.loss is None:
        raise ValueError("`model` must be compiled with a loss: call `model.compile(loss=…)` before `fisher_samples`.")
    x = keras.tree.map_structure(tf.convert_to_tensor, x)
    if not all(layer.built for layer in model._flatten_layers()):
        model(x, training=False)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, RecordingLayer)]
    if not layers:
        raise ValueError(f"`model` holds no instrumented layer. Received: model={model.name!r}")
    recorder = Recorder(keep_loss=y is not None, persistent=fisher == "exact", always=True)
    forward_pass = _forward(model, x, y, layers, recorder)
    if y is not None:
        sources = [record.preactivation for record in forward_pass.records]
        gradients = _backward(forward_pass.tape, [forward_pass.loss], sources, None)
        gradients = [gradient * tf.cast(tf.shape(gradient)[0], gradient.dtype) for gradient in gradients]
    else:
        drawn = np.random.default_rng(seed).integers(2**31, size=2)
        heads = pass_heads(forward_pass, likelihood)
        gradients = preactivation_gradients(forward_pass, heads, fisher, tf.constant(drawn, tf.int32))
    samples = layer_samples(forward_pass, gradients)
    names = [layer.name for layer in samples]
    return {(layer.name if names.count(layer.name) == 1 else layer.path): found for layer, found in samples.items()}


def _forward(model: keras.Model, x: Any, y: Any, layers: list[RecordingLayer], recorder: Recorder) -> ForwardPass:
    """One recorded training-mode pass that leaves the model as it was."""
    state = {id(variable): variable for variable in [*model.non_trainable_variables, *model.metrics_variables]}
    before = [(variable, variable.numpy()) for variable in state.values()]
    attached = [(layer, layer._recorders) for layer in layers]
    try:
        for layer in layers:
            object.__setattr__(layer, "_recorders", (weakref.ref(recorder),))
        outputs = model(x, training=True)
        if y is not None:
            y = keras.tree.map_structure(tf.convert_to_tensor, y)
            model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=None)
    finally:
        for layer, recorders in attached:
            object.__setattr__(layer, "_recorders", recorders)
        forward_pass = recorder.take()
        for variable, value in before:
            variable.assign(value)
    if forward_pass is None:
        raise ValueError(f"No instrumented layer was called in training mode by `model`={model.name!r}.")
    if forward_pass.outputs is None:
        forward_pass.outputs = outputs
    return forward_pass


def _backward(
    tape: tf.GradientTape,
    targets: list[tf.Tensor],
    sources: list[tf.Tensor],
    cotangents: list[tf.Tensor] | None,
    reached: list[bool] | None = None,
) -> list[tf.Tensor]:
    """Gradients by `sources`, zeros where there is no path.

    Whether there was one at all is added to `reached`; without that list there must be one.
    """
    if cotangents is not None:
        cotangents = [
            tf.cast(tf.reshape(cotangent, tf.shape(target)), target.dtype)
            for cotangent, target in zip(cotangents, targets, strict=True)
        ]
    gradients = tape.gradient(targets, sources, output_gradients=cotangents)
    found = [any(gradient is not None for gradient in gradients)]
    if reached is None:
        _check_reached(found)
    else:
        reached += found
    # Some operations between (reshapes to sizes read at run time) lose the static shape, which samples rely on.
    return [
        tf.zeros_like(source) if gradient is None else tf.ensure_shape(tf.convert_to_tensor(gradient), source.shape)
        for gradient, source in zip(gradients, sources, strict=True)
    ]


def _check_reached(reached: list[bool]) -> None:
    if not any(reached):
        raise ValueError(
            "No output of the model depends on an instrumented layer of this forward pass: "
            "curvature needs the output that the loss is made of."
        )


def _empirical(
    forward_pass: ForwardPass, heads: list[likelihoods.Head], sources: list[tf.Tensor], examples: tf.Tensor | None
) -> list[tf.Tensor]:
    """`√κ ∇(−log p(y_n|z_n))` at the actual targets, from the gradient of the loss itself, which carries `κ`."""
    if forward_pass.loss is None:
        raise ValueError(
            "`fisher`='empirical' needs the loss: in a hand-written loop pass it through `optimizer.scale_loss(loss)` "
            "before the gradient is taken."
        )
    if len(heads) != 1:
        raise ValueError(
            f"`fisher`='empirical' needs a model with one output. Received {len(heads)} outputs with a loss."
        )
    gradients = _backward(forward_pass.tape, [tf.convert_to_tensor(forward_pass.loss)], sources, None)
    weight = tf.cast(heads[0].weight, tf.float32)
    if weight.shape.rank > 1:
        weight = tf.reduce_mean(weight, axis=list(range(1, weight.shape.rank)))
    scaled = []
    for gradient in gradients:
        rows = tf.cast(tf.shape(gradient)[0] if examples is None else examples, gradient.dtype)
        inverse = tf.cast(tf.math.divide_no_nan(1.0, tf.sqrt(weight)), gradient.dtype)
        if inverse.shape.rank == 1:
            inverse = tf.reshape(
                inverse, tf.concat([tf.shape(inverse), tf.ones([gradient.shape.rank - 1], tf.int32)], 0)
            )
        scaled.append(gradient * rows * inverse)
    return scaled
