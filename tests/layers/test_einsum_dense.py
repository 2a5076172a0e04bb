"""`KPSVDEinsumDense` is `keras.layers.EinsumDense`, bit for bit, and its samples are its gradient, for any equation."""

import math
import string
from typing import NamedTuple

import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given, settings
from keras.src.layers.attention import multi_head_attention

from keras_kpsvd import KPSVD, KPSVDDense, KPSVDEinsumDense, fisher_samples
from keras_kpsvd.layers import Recorder, layers_of


class Case(NamedTuple):
    """A layer: inputs without the batch, arguments, and what its curvature is of; no blocks: it has none."""

    equation: str
    inputs: tuple[int, ...]
    output_shape: int | tuple[int | None, ...]
    bias_axes: str | None
    blocks: list[tuple[int, int]] = ()
    bias_is_row: bool = True

    def layer(self, kind=KPSVDEinsumDense, bias=True, **arguments):
        """Built, with a bias that is not zero."""
        keras.utils.set_random_seed(3)
        layer = kind(self.equation, self.output_shape, bias_axes=self.bias_axes if bias else None, **arguments)
        layer.build((None, *self.inputs))
        if layer.bias is not None:
            layer.bias.assign(np.random.default_rng(5).normal(size=layer.bias.shape))
        return layer

    def rows(self, count=3, dtype="float64"):
        return np.random.default_rng(1).normal(size=(count, *(size or 7 for size in self.inputs))).astype(dtype)


CASES = {
    "dense": Case("ab,bc->ac", (5,), 3, "c", [(6, 3)]),
    "kernel transposed": Case("ab,cb->ac", (5,), 3, "c", [(6, 3)]),
    "sequence": Case("abc,cd->abd", (3, 5), (None, 7), "d", [(6, 7)]),
    "first axis contracted": Case("abc,bd->acd", (3, 5), (5, 7), "d", [(4, 7)]),
    "output permuted": Case("abc,cd->adb", (3, 5), (7, 3), "d", [(6, 7)]),
    "shared axes swapped": Case("abcd,de->acbe", (3, 2, 5), (2, 3, 7), "e", [(6, 7)]),
    "query of rank 3": Case("abc,cde->abde", (3, 5), (None, 2, 7), "de", [(6, 14)]),
    "query of rank 4": Case("abcd,def->abcef", (3, 2, 5), (None, None, 3, 2), "ef", [(6, 6)]),
    "attention output of rank 3": Case("abcd,cde->abe", (3, 2, 5), (None, 7), "e", [(11, 7)]),
    "attention output of rank 4": Case("abcde,def->abcf", (3, 2, 2, 5), (None, None, 7), "f", [(11, 7)]),
    "ellipsis left": Case("...b,bc->...c", (3, 2, 5), 7, "c", [(6, 7)]),
    "ellipsis left, batch alone": Case("...b,bc->...c", (5,), 7, "c", [(6, 7)]),
    "ellipsis left, two produced": Case("...bc,cbde->...ed", (3, 2, 5), (3, 7), "ed", [(11, 21)]),
    "ellipsis right": Case("ab...,bc->ac...", (5, 3, 2), 7, "c", [(6, 7)]),
    "ellipsis right, positions unknown": Case("ab...,bc->ac...", (5, None), 7, "c", [(5, 7)], False),
    "ellipsis right, nothing elided": Case("ab...,bc->ac...", (5,), 7, "c", [(6, 7)]),
    "weights of each head": Case("bnd,ndh->bnh", (3, 5), (3, 7), "nh", [(6, 7)] * 3),
    "weights of each head, shared axis": Case("btnd,hnd->bhtn", (2, 3, 5), (7, 2, 3), "hn", [(6, 7)] * 3),
    "weights of each of two axes": Case("bmnd,dmhn->bnhm", (2, 3, 5), (3, 7, 2), "nhm", [(6, 7)] * 6),
    "nothing contracted": Case("ab,cd->abcd", (5,), (5, 2, 3), "cd", [(2, 6)]),
    "one output": Case("abc,bc->a", (3, 5), (), None, [(15, 1)]),
    "locally connected": Case("abc,bcd->abd", (3, 5), (3, 7), "bd", [(6, 7)] * 3),
    "bias of some produced axes": Case("abc,cde->abde", (3, 5), (None, 2, 7), "e", [(5, 14)], False),
    "bias of a position": Case("abc,cd->abd", (3, 5), (3, 7), "bd", [(6 - 1, 7)], False),
    "bias without the heads": Case("bnd,ndh->bnh", (3, 5), (3, 7), "h", [(5, 7)] * 3, False),
    "bias that Keras adds to the last axis": Case("abc,cd->adb", (3, 5), (3, 3), "d", [(5, 3)], False),
    "bias that Keras adds to the second axis": Case("abc,cde->abde", (3, 5), (None, 3, 1), "de", [(5, 3)], False),
    "batch of the output elsewhere": Case("abc,cd->bad", (3, 5), (None, 7), "d"),
    "input axis summed up": Case("abc,cd->ad", (3, 5), 7, "d"),
    "diagonal of the input": Case("abb,bc->ac", (5, 5), 3, "c"),
    "scale of elements": Case("abc,c->abc", (3, 5), (None, 5), "c"),
    "scale of diagonal blocks": Case("abc,bc->abc", (3, 5), (3, 5), "bc"),
}
CURVED = {name: case for name, case in CASES.items() if case.blocks}
PLAIN = {name: case for name, case in CASES.items() if not case.blocks and name != "batch of the output elsewhere"}


def _recorded(layer, x, slope):
    """The samples of one recorded call whose output is multiplied with `slope`."""
    recorder = Recorder(always=True)
    layer.attach(recorder)
    output = layer(x, training=True)
    forward_pass = recorder.take()
    layer.detach(recorder)
    (record,) = forward_pass.records
    return layer.samples(record.inputs, forward_pass.tape.gradient(output, record.preactivation, slope))


def _per_example(layer, x, slope):
    """Gradients of each example by TensorFlow alone, in `curvature_variables` order: `[[of example] of variable]`."""
    variables, gradients = [variable.value for variable in layer.curvature_variables], []
    for row, of_row in zip(x, slope, strict=True):
        with tf.GradientTape() as tape:
            output = layer(row[None])
        gradients.append(tape.gradient(output, variables, tf.constant(of_row[None])))
    return gradients


def _check_samples(case, bias, x):
    """`D_n` is the gradient by each example, and `ā W̄` the pre-activation, in every block."""
    layer, x = case.layer(bias=bias, dtype="float64", activation="tanh"), tf.constant(x)
    slope = np.random.default_rng(2).normal(size=layer(x).shape)
    blocks = _recorded(layer, x, slope)
    assert [(a.shape[2], g.shape[2]) for a, g in blocks] == layer.block_shapes
    for index, gradients in enumerate(_per_example(layer, x, slope)):
        matrices = layer.to_matrices(gradients)
        for (activations, slopes), matrix in zip(blocks, matrices, strict=True):
            product = np.einsum("ti,to->io", activations[index], slopes[index])
            np.testing.assert_allclose(product, matrix, rtol=1e-10, atol=1e-12)
        for one, other in zip(layer.from_matrices(matrices), gradients, strict=True):
            np.testing.assert_array_equal(one, other)
    weights = [variable.value for variable in layer.curvature_variables]
    preactivation = layer.linear_map(x, *weights)
    for (activations, _), (_, expected), matrix in zip(
        blocks, layer.samples(x, preactivation), layer.to_matrices(weights), strict=True
    ):
        np.testing.assert_allclose(activations @ matrix, expected, rtol=1e-10, atol=1e-12)
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CURVED)
def test_samples_are_per_example_gradients(name, bias):
    case = CURVED[name]
    layer = _check_samples(case, bias, case.rows())
    row = bias and case.bias_is_row and case.bias_axes is not None
    without = case.bias_is_row and case.bias_axes is not None and not bias
    assert layer.block_shapes == [(d_in - without, d_out) for d_in, d_out in case.blocks]
    assert len(layer.curvature_variables) == 1 + row
    assert layers_of(layer.trainable_variables) == [layer]


@st.composite
def _cases(draw):
    """Equations of letters of every role, in any order, with an ellipsis or without."""
    letters = draw(st.permutations(string.ascii_letters[:10]))
    roles, taken = {}, 1
    for role, most in (("shared", 2), ("blocks", 1), ("contracted", 2), ("produced", 2)):
        count = draw(st.integers(0, most))
        roles[role], taken = letters[taken : taken + count], taken + count
    if not roles["contracted"] and not roles["produced"]:
        roles["produced"] = letters[taken : taken + 1]
    size = {letter: draw(st.sampled_from([1, 2, 3, 5])) for letter in letters}

    def shuffled(*names):
        return "".join(draw(st.permutations([letter for name in names for letter in roles[name]])))

    inputs = shuffled("shared", "blocks", "contracted")
    outputs = shuffled("shared", "blocks", "produced")
    kernel = shuffled("blocks", "contracted", "produced")
    bias_axes = draw(st.permutations(roles["blocks"] + roles["produced"]))
    shapes = [tuple(size[letter] for letter in operand) for operand in (inputs, outputs)]
    elided, mark = (draw(st.lists(st.sampled_from([1, 2, 3]), max_size=2)), "...") if draw(st.booleans()) else ([], "")
    if mark and inputs and outputs and draw(st.booleans()):
        equation = f"...{inputs},{kernel}->...{outputs}"
        shapes[0] = (*elided, *shapes[0])
    elif mark and inputs:
        equation = f"{letters[0]}{inputs}...,{kernel}->{letters[0]}{outputs}..."
        shapes[0] = (*shapes[0], *elided)
    else:
        equation = f"{letters[0]}{inputs},{kernel}->{letters[0]}{outputs}"
    assume(max(len(shape) for shape in shapes) < 5)  # TensorFlow does not add every bias to more axes.
    blocks = math.prod(size[letter] for letter in roles["blocks"])
    d_in, d_out = (math.prod(size[letter] for letter in roles[role]) for role in ("contracted", "produced"))
    return Case(equation, *shapes, "".join(bias_axes) or None, [(d_in + bool(bias_axes), d_out)] * blocks)


@settings(max_examples=60, deadline=None)
@given(_cases())
def test_samples_are_per_example_gradients_whatever_the_equation(case):
    layer = _check_samples(case, True, case.rows(2))
    if case.bias_axes and layer.curvature_variables[-1] is not layer.bias:
        # Keras may take one axis for another of the same size.
        assert sorted(layer.bias.shape)[:-1] == [1] * (len(layer.bias.shape) - 1)
        assert layer.bias.shape[0] > 1 or layer.bias.shape[-1] == 1
    else:
        assert layer.block_shapes == case.blocks


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_einsum_dense(name, dtype, bias):
    case, results = CASES[name], []
    x = tf.constant(case.rows(3, "float32"))
    for kind in (keras.layers.EinsumDense, KPSVDEinsumDense):
        layer = case.layer(kind, bias, dtype=dtype, activation="gelu")
        recorder = Recorder(always=True)
        if kind is KPSVDEinsumDense:
            layer.attach(recorder)
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, training=True)
            loss = tf.reduce_mean(tf.cast(output, "float32") ** 2)
        gradients = tape.gradient(loss, [x, *(variable.value for variable in layer.trainable_variables)])
        results.append([output.dtype.name, output.numpy(), *(g.numpy() for g in gradients)])
    forward_pass = recorder.take()
    assert (forward_pass is not None) == bool(case.blocks)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.blocks])
def test_equations_without_samples_are_not_claimed(name):
    assert layers_of(CASES[name].layer().trainable_variables) == []


def test_kernels_that_have_the_batch_axis_are_not_claimed():
    for equation, output_shape in (("ab,ab->a", ()), ("ab,ac->bc", (7,)), ("ab,abc->ac", (7,))):
        layer = KPSVDEinsumDense(equation, output_shape)
        layer.build((7 if equation == "ab,ac->bc" else 4, 7))
        assert layers_of(layer.trainable_variables) == []


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_not_claimed_trains_by_momentum(name):
    case, results = PLAIN[name], []
    x = case.rows(6, "float32")
    for kind, optimizer in (
        (keras.layers.EinsumDense, keras.optimizers.SGD(0.1, momentum=0.9)),
        (KPSVDEinsumDense, KPSVD(0.1)),
    ):
        model = keras.Sequential([keras.Input(case.inputs), case.layer(kind)])
        model.compile(optimizer, "mse", run_eagerly=True)
        model.fit(x, np.ones(model(x).shape), epochs=2, verbose=0)
        results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_matrices_have_the_order_of_the_kernel():
    layer = CASES["query of rank 3"].layer()
    (matrix,) = layer.to_matrices([layer.kernel.value, layer.bias.value])
    np.testing.assert_array_equal(matrix[:-1], layer.kernel.numpy().reshape(5, 14))
    np.testing.assert_array_equal(matrix[-1], layer.bias.numpy().reshape(14))
    layer = CASES["ellipsis left, two produced"].layer()
    (matrix,) = layer.to_matrices([layer.kernel.value, layer.bias.value])
    np.testing.assert_array_equal(matrix[:-1], layer.kernel.numpy().reshape(10, 21))
    np.testing.assert_array_equal(matrix[-1], layer.bias.numpy().T.reshape(21))
    layer = CASES["weights of each of two axes"].layer()
    blocks = layer.to_matrices([layer.kernel.value, layer.bias.value])
    for index, (m, n) in enumerate(np.ndindex(2, 3)):
        np.testing.assert_array_equal(blocks[index][:-1], layer.kernel.numpy()[:, m, :, n])
        np.testing.assert_array_equal(blocks[index][-1], layer.bias.numpy()[n, :, m])


@pytest.mark.parametrize("name", ["sequence", "query of rank 4", "ellipsis left", "weights of each head, shared axis"])
def test_samples_have_static_features_where_batch_and_positions_are_unknown(name):
    case = CASES[name]
    layer = case.layer()
    x = case.rows(3, "float32")
    letters = layer._axes.inputs[1:]
    unknown = [None if one in layer._axes.shared else size for one, size in zip(letters, case.inputs, strict=True)]
    seen = []

    @tf.function(input_signature=[tf.TensorSpec([None, *unknown], tf.float32)])
    def samples(x):
        blocks = layer.samples(x, layer.linear_map(x, layer.kernel, layer.bias))
        seen.append([(a.shape.as_list(), g.shape.as_list()) for a, g in blocks])
        return blocks

    expected = layer.samples(tf.constant(x), layer.linear_map(x, layer.kernel, layer.bias))
    for block, of_block in zip(samples(tf.constant(x)), expected, strict=True):
        for one, other in zip(block, of_block, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert [(a[2], g[2]) for a, g in seen[-1]] == layer.block_shapes


def test_samples_of_half_precision_are_float32():
    case = CASES["query of rank 3"]
    layer = case.layer(dtype="mixed_float16")
    x = tf.cast(case.rows(), "float16")
    for block in layer.samples(x, layer(x)):
        assert [values.dtype for values in block] == [tf.float32, tf.float32]


@pytest.mark.parametrize("name", ["query of rank 3", "weights of each head", "ellipsis left", "input axis summed up"])
def test_configurations_are_interchangeable_and_survive_a_round_trip(name):
    dense, layer = (
        CASES[name].layer(kind, activation="relu", kernel_regularizer="l2", name="same")
        for kind in (keras.layers.EinsumDense, KPSVDEinsumDense)
    )
    assert layer.get_config() == dense.get_config()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is KPSVDEinsumDense and again.get_config() == layer.get_config()
    assert type(KPSVDEinsumDense.from_config(dense.get_config())) is KPSVDEinsumDense


def test_a_layer_with_lora_computes_as_einsum_dense_and_is_not_claimed():
    x, outputs = tf.constant(CASES["sequence"].rows(3, "float32")), []
    for kind in (keras.layers.EinsumDense, KPSVDEinsumDense):
        layer = CASES["sequence"].layer(kind, lora_rank=2)
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
        recorder = Recorder(always=True)
        if kind is KPSVDEinsumDense:
            layer.attach(recorder)
        outputs.append(layer(x, training=True))
    assert recorder.take() is None
    np.testing.assert_array_equal(*outputs)
    assert layers_of(layer.trainable_variables) == []


def _attention_network(monkeypatch, inputs, dtype="float32"):
    """A sequence model with attention whose projections are instrumented, and rows for it."""
    keras.utils.set_random_seed(4)
    source = keras.Input(inputs, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(multi_head_attention, "EinsumDense", KPSVDEinsumDense)
        attention = keras.layers.MultiHeadAttention(2, 3, dtype=dtype, attention_axes=1)
        hidden = attention(source, source)
    hidden = keras.layers.Flatten()(keras.layers.LayerNormalization(dtype=dtype)(source + hidden))
    model = keras.Model(source, KPSVDDense(4, name="out", dtype=dtype)(hidden))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * rng.normal(size=variable.shape))
    return model, rng.normal(size=(6, *inputs)).astype(dtype), rng.integers(4, size=6)


@pytest.mark.parametrize("inputs", [(3, 5), (3, 2, 5)], ids=["rank 3", "rank 4"])
def test_attention_reproduces_the_gradient_of_the_compiled_loss(monkeypatch, inputs):
    model, x, y = _attention_network(monkeypatch, inputs, "float64")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    samples = fisher_samples(model, x, y)
    layers = {layer.name: layer for layer in layers_of(model.trainable_variables)}
    assert set(samples) == set(layers) == {"query", "key", "value", "attention_output", "out"}
    with tf.GradientTape(persistent=True) as tape:
        loss = model.compute_loss(x=x, y=tf.constant(y), y_pred=model(x, training=True))
    for name, (activations, gradients) in samples.items():
        values = [variable.value for variable in layers[name].curvature_variables]
        (expected,) = layers[name].to_matrices(tape.gradient(loss, values))
        mean = np.einsum("nti,nto->io", activations, gradients) / len(x)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-7)


def test_attention_trains_in_a_graph(monkeypatch):
    model, x, y = _attention_network(monkeypatch, (3, 5))
    optimizer = KPSVD(0.1, curvature_interval=1, inverse_interval=1, seed=0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x, y, batch_size=3, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
