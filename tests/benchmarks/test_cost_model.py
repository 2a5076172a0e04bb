"""The formulas against the products that TensorFlow really traces, and what the script prints and keeps."""

import csv
import dataclasses
import math

import pytest

BATCH = 32


def _network(convolution=False):
    import keras

    from keras_kpsvd import KPSVDConv2D, KPSVDDense

    keras.utils.set_random_seed(0)
    if convolution:
        layers = [KPSVDConv2D(6, 3, activation="tanh"), KPSVDConv2D(4, 2, use_bias=False), keras.layers.Flatten()]
        return keras.Sequential([keras.Input((7, 7, 2)), *layers, KPSVDDense(3)])
    return keras.Sequential([keras.Input((200,)), KPSVDDense(150, activation="tanh"), KPSVDDense(9)])


def _recorded(model):
    """`{name: traced}`: the products with `J`, with `Jᵀ`, and the gradient, as graphs of one batch."""
    import tensorflow as tf

    from keras_kpsvd import loss_densities
    from keras_kpsvd.curvature.conjugate import weight_products
    from keras_kpsvd.curvature.replicas import JointPass
    from keras_kpsvd.curvature.step_control import changes_of_outputs
    from keras_kpsvd.layers import Recorder, RecordingLayer

    recorder = Recorder(persistent=True, always=True)
    layers = [layer for layer in model.layers if isinstance(layer, RecordingLayer)]
    for layer in layers:
        layer.attach(recorder)

    def recorded(x):
        outputs = model(x, training=True)
        one = recorder.take()
        heads = loss_densities.heads("normal", None, outputs)
        return one, heads, JointPass([one], [heads])

    def tangent(x):
        direction = {layer: [v.value for v in layer.curvature_variables] for layer in layers}
        return changes_of_outputs(recorded(x)[2], direction)

    def cotangent(x):
        one, heads, _ = recorded(x)
        return list(weight_products(one, heads, [tf.ones_like(head.outputs) for head in heads], layers).values())

    def gradient(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    spec = tf.TensorSpec((BATCH, *model.input_shape[1:]))
    functions = {"forward": lambda x: model(x), "tangent": tangent, "cotangent": cotangent, "gradient": gradient}
    return {name: tf.function(one, autograph=False).get_concrete_function(spec) for name, one in functions.items()}


def _flops(function):
    """Of all products and convolutions that the results of a traced function depend on, from their traced shapes."""
    import tensorflow as tf

    graph, count = function.graph, 0
    names = [tensor.op.name for tensor in tf.nest.flatten(function.structured_outputs)]
    needed = tf.compat.v1.graph_util.extract_sub_graph(graph.as_graph_def(), names)
    for node in needed.node:
        operation = graph.get_operation_by_name(node.name)
        shapes = [tensor.shape for tensor in operation.inputs]
        if operation.type == "MatMul":
            inner = shapes[0][0 if operation.get_attr("transpose_a") else 1]
            count += 2 * inner * operation.outputs[0].shape.num_elements()
        elif operation.type.startswith("Conv2D"):  # In all three the kernel meets every output position.
            tensors = [*operation.inputs, *operation.outputs]
            kernel = {"Conv2D": shapes[1], "Conv2DBackpropFilter": operation.outputs[0].shape}
            kernel = kernel.get(operation.type, shapes[1])
            outer = {"Conv2D": tensors[-1].shape, "Conv2DBackpropFilter": shapes[-1], "Conv2DBackpropInput": shapes[-1]}
            count += 2 * kernel[:-1].num_elements() * outer[operation.type].num_elements()
    return count


@pytest.mark.parametrize("convolution", [False, True])
def test_products_are_those_that_are_traced(convolution):
    import costs

    model = _network(convolution)
    traced = _recorded(model)
    # The bias row is none of a product there: it is added.
    blocks = [
        dataclasses.replace(block, d_in=block.d_in - layer.use_bias)
        for block, layer in zip(costs.blocks_of(model), _layers(model), strict=True)
    ]
    forward = _flops(traced["forward"])
    assert forward == sum(2 * BATCH * block.positions * block.d_in * block.d_out for block in blocks)
    entries = {"gradient": 5, "tangent": 5, "cotangent": 3}
    for name, count in (("gradient", costs.gradient), ("tangent", costs.tangent), ("cotangent", costs.cotangent)):
        counted = sum(cost.flops for block in blocks for cost in count(block, BATCH))
        counted -= sum(entries[name] * BATCH * block.positions * block.d_out for block in blocks)
        # `J` is that of the last forward pass, whose outputs themselves are not needed.
        recorded = 0 if name == "gradient" else forward - 2 * BATCH * blocks[-1].d_in * blocks[-1].d_out
        assert _flops(traced[name]) - recorded == counted


def _passes(function, shape):
    """How many tensors of a shape the entry-by-entry operations of a traced function read and write."""
    import tensorflow as tf

    graph = function.graph
    names = [tensor.op.name for tensor in tf.nest.flatten(function.structured_outputs)]
    needed = tf.compat.v1.graph_util.extract_sub_graph(graph.as_graph_def(), names)
    operations = [graph.get_operation_by_name(node.name) for node in needed.node]
    counted = [one for one in operations if one.type in ("Mul", "AddV2", "Sub", "AddN", "Sum", "Neg", "L2Loss")]
    return sum(tensor.shape == shape for one in counted for tensor in (*one.inputs, *one.outputs))


def test_passes_over_directions_are_those_of_the_code():
    import costs
    import tensorflow as tf

    from keras_kpsvd import loss_densities
    from keras_kpsvd.curvature.conjugate import conjugate_direction
    from keras_kpsvd.curvature.replicas import JointPass
    from keras_kpsvd.curvature.step_control import LastStep
    from keras_kpsvd.layers import Recorder

    seed = tf.constant([1, 2])
    model, recorder = _network(), Recorder(persistent=True, always=True)
    for layer in model.layers:
        layer.attach(recorder)

    def solution(x, steps):
        outputs = model(x, training=True)
        joint = JointPass([recorder.take()], [loss_densities.heads("normal", None, outputs)])

        def copied(direction):  # So that TensorFlow can't tell them to be the same.
            return {layer: [tf.identity(value) for value in values] for layer, values in direction.items()}

        weights = {layer: [v.value for v in layer.curvature_variables] for layer in model.layers}
        dampings = dict.fromkeys(model.layers, tf.constant(0.1))
        last = LastStep(copied(weights), tf.ones([2]), tf.constant(1.0))
        found = conjugate_direction(joint, copied(weights), copied, last, dampings, steps, 0.9, seed)
        return found.direction[model.layers[0]][0]

    passes = []
    for steps in (1, 2, 3):
        function = tf.function(lambda x, steps=steps: solution(x, steps), autograph=False)
        traced = function.get_concrete_function(tf.TensorSpec([BATCH, 200]))
        passes.append(_passes(traced, (200, 150)))
    assert passes[0] == costs.FIRST_PASSES
    assert passes[1] - passes[0] == passes[2] - passes[1] == costs.CONJUGATE_PASSES


def _layers(model):
    from keras_kpsvd.layers import RecordingLayer

    return [layer for layer in model.layers if isinstance(layer, RecordingLayer)]


def test_blocks_have_the_sizes_of_their_layers():
    import costs

    dense = [(b.d_in, b.d_out, b.positions, b.inputs, b.first) for b in costs.blocks_of(_network())]
    assert dense == [(201, 150, 1, 200, True), (151, 9, 1, 150, False)]
    convolution = [(b.d_in, b.d_out, b.positions, b.inputs, b.first) for b in costs.blocks_of(_network(True))]
    assert convolution == [(19, 6, 25, 98, True), (24, 4, 16, 150, False), (65, 3, 1, 64, False)]


@pytest.mark.parametrize(("d_in", "d_out"), [(300, 50), (300, 200), (50, 300), (50, 40)])
def test_products_with_bases_are_those_that_are_traced(d_in, d_out):
    import costs
    import tensorflow as tf

    from keras_kpsvd.linalg import apply_diagonal, diagonal_of_samples

    block = costs.Block("dense", d_in, d_out, 1, d_in - 1, True)
    kept = [costs.kept(size, 64) for size in (d_in, d_out)]
    bases = [tf.TensorSpec((size, one)) for size, one in zip((d_in, d_out), kept, strict=True)]
    form = tf.TensorSpec([one + (one < size) for size, one in zip((d_in, d_out), kept, strict=True)])
    applied = tf.function(apply_diagonal).get_concrete_function(*bases, form, tf.TensorSpec((d_in, d_out)))
    entries = (9 if max(d_in, d_out) > 128 else 4) * d_in * d_out
    assert _flops(applied) == costs.total(costs.precondition(block, 64)).flops - entries
    samples = [tf.TensorSpec((BATCH, 1, size)) for size in (d_in, d_out)]
    diagonal = tf.function(diagonal_of_samples).get_concrete_function(*samples, *bases)
    tails = 2 * BATCH * (form.shape.num_elements() - kept[0] * kept[1])
    moments = 2 * BATCH * (d_in**2 + d_out**2) + costs.REFRESH_PASSES * (d_in**2 + d_out**2)
    assert _flops(diagonal) - tails == costs.total(costs.refresh(block, BATCH, None, 64)).flops - moments


def test_eigenvectors_cost_the_kept_ones_or_a_whole_decomposition():
    import costs

    block = costs.Block("dense", 300, 50, 1, 299, False)
    inverted = costs.total(costs.inversion(block, 64)).flops
    least = 2 * (2 * 300 * 300 * 64) + 9 * 50**3
    assert least < inverted < 1.8 * least


def test_a_refresh_sees_the_rows_it_uses():
    import costs

    block = costs.Block("dense", 300, 50, 1, 299, False)
    all_rows, some = (costs.total(costs.refresh(block, 64, used, 64)).flops for used in (None, 16))
    assert all_rows - some == 2 * (64 - 16) * (300**2 + 50**2 + 300 * 64 + 50 * 50 + 64 * 50)
    assert costs.total(costs.refresh(block, 64, 100, 64)).flops == all_rows


def test_an_operation_takes_the_longer_of_its_two_times():
    from costs import Cost, product

    assert product(2, 3, 5) == Cost(60, 4 * (6 + 15 + 10))
    assert Cost(60, 10).seconds(rate=6, bandwidth=2) == 10 and Cost(6, 10).seconds(rate=6, bandwidth=2) == 5


def test_parts_are_differences_of_the_same_round():
    from cost_model import CASES, PARTS, differences

    seconds = {name: [10.0 * (place + 1), 20.0 * (place + 1)] for place, name in enumerate(CASES)}
    parts = differences(seconds)
    assert set(parts) == set(PARTS)
    assert parts["a conjugate step"] == [10.0, 20.0] and parts["gradient and update"] == [10.0, 20.0]


@pytest.mark.slow
def test_a_run_prints_and_keeps_every_part_of_every_layer(monkeypatch, tmp_path, capsys):
    import cost_model

    monkeypatch.setattr(cost_model, "NETWORKS", {"digits": 32})
    arguments = ["--networks", "digits", "--rounds", "1", "--steps", "20", "--out", str(tmp_path / "costs.csv")]
    cost_model.main(arguments)
    printed = capsys.readouterr().out
    with (tmp_path / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "costs_layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == list(cost_model.PARTS) and len(layers) == 3 * len(rows)
    assert all(part in printed for part in cost_model.PARTS)
    for row in rows:
        of_layers = [float(one["gflop"]) for one in layers if one["part"] == row["part"]]
        assert math.isclose(sum(of_layers), float(row["gflop"]), rel_tol=1e-4)
    assert float(rows[0]["measured_ms"]) > 0 and float(rows[0]["reckoned_ms"]) > 0
