"""`KPSVDConv2D` and `KPSVDConv1D` are Keras's layers, and their samples the per-example gradients of their weights."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd import KPSVDConv1D, KPSVDConv2D, KPSVDDense, fisher_samples
from keras_kpsvd.layers import layers_of

STOCK = {KPSVDConv1D: keras.layers.Conv1D, KPSVDConv2D: keras.layers.Conv2D}
KINDS = {1: KPSVDConv1D, 2: KPSVDConv2D}
PADDINGS = {1: ("valid", "same", "causal"), 2: ("valid", "same")}
KERNELS = {1: [(1,), (3,), (2,), (5,)], 2: [(1, 1), (3, 3), (2, 3), (5, 1)]}
STEPS = {
    1: [{}, {"strides": 2}, {"dilation_rate": 2}],
    2: [{}, {"strides": 2}, {"strides": (1, 2)}, {"dilation_rate": 2}, {"dilation_rate": (1, 2)}],
}
SIZES = {1: [(9,), (10,)], 2: [(9, 7), (10, 6)]}
SMALL = {1: (2,), 2: (2, 1)}  # Smaller than most kernels: only padding makes outputs of it.
CHANNELS, FILTERS = 4, 8
RANKS_AND_PADDINGS = [(rank, padding) for rank in KINDS for padding in PADDINGS[rank]]


def _layer(kind, *arguments, **keywords):
    """A built layer without activation whose bias is not zero."""
    keras.utils.set_random_seed(0)
    layer = kind(FILTERS, *arguments, bias_initializer="random_normal", **keywords)
    first = layer.data_format == "channels_first"
    sizes = (None,) * layer.rank
    layer.build((None, CHANNELS, *sizes) if first else (None, *sizes, CHANNELS))
    return layer


def _sizes(rank, padding):
    return SIZES[rank] if padding == "valid" else [*SIZES[rank], SMALL[rank]]


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def _blocks(layer, kernel, bias):
    """Float64 matrices `[d_in, d_out]` of each group, made by NumPy from a kernel of all channels and filters."""
    matrices = []
    channels, filters = CHANNELS // layer.groups, FILTERS // layer.groups
    for group in range(layer.groups):
        rows = slice(group * channels, (group + 1) * channels)
        columns = slice(group * filters, (group + 1) * filters)
        matrix = np.reshape(kernel[..., rows, columns], [-1, filters])
        matrices.append(np.concatenate([matrix, bias[None, columns]]) if layer.use_bias else matrix)
    return matrices


def _ungrouped(layer):
    """Keras's layer without groups that is the same linear map: its kernel is block diagonal."""
    twin = STOCK[type(layer)].from_config({**layer.get_config(), "groups": 1})
    twin.build((None, *(None,) * layer.rank, CHANNELS))
    kernel = np.zeros(twin.kernel.shape)
    channels, filters = CHANNELS // layer.groups, FILTERS // layer.groups
    for group in range(layer.groups):
        columns = slice(group * filters, (group + 1) * filters)
        kernel[..., group * channels : (group + 1) * channels, columns] = layer.kernel.numpy()[..., columns]
    twin.set_weights([kernel, layer.bias.numpy()])
    return twin


def _per_example_gradients(layer, x, slopes):
    """Gradients of `Σ slope · output` by the layer's weights, one example at a time."""
    gradients = []
    for n in range(len(x)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x[n : n + 1]) * slopes[n : n + 1])
        gradients.append([gradient.numpy() for gradient in tape.gradient(loss, layer.trainable_variables)])
    return gradients


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
@pytest.mark.parametrize(("rank", "padding"), RANKS_AND_PADDINGS)
def test_samples_reproduce_outputs_and_per_example_gradients(rank, padding, groups):
    for kernel, steps in itertools.product(KERNELS[rank], STEPS[rank]):
        arguments = {"kernel_size": kernel, "padding": padding, "groups": groups, "dtype": "float64", **steps}
        layer = _layer(KINDS[rank], **arguments)
        without_bias = _layer(KINDS[rank], use_bias=False, **arguments)
        without_bias.set_weights([layer.kernel])
        twin = _ungrouped(layer)
        for number, sizes in enumerate(_sizes(rank, padding)):
            x = tf.constant(_normal(2, *sizes, CHANNELS))
            output = twin(x).numpy()
            slopes = tf.constant(_normal(*output.shape, seed=1))
            expected = _per_example_gradients(twin, x, slopes)
            message = f"{arguments} {sizes}"
            for one in (layer,) if number else (layer, without_bias):
                samples = one.samples(x, slopes)
                matrices = one.to_matrices([v.value for v in one.curvature_variables])
                assert [tuple(matrix.shape) for matrix in matrices] == one.block_shapes
                made = np.concatenate([a @ m for (a, _), m in zip(samples, matrices, strict=True)], axis=-1)
                expected_output = output if one.use_bias else output - layer.bias.numpy()
                np.testing.assert_allclose(made.reshape(output.shape), expected_output, atol=1e-12, err_msg=message)
                for n, gradients in enumerate(expected):
                    for (a, g), block in zip(samples, _blocks(one, *gradients), strict=True):
                        np.testing.assert_allclose(a[n].numpy().T @ g[n].numpy(), block, atol=1e-11, err_msg=message)


@pytest.mark.parametrize("rank", KINDS)
def test_samples_of_groups_are_the_gradients_of_the_grouped_layer_itself(rank):
    """The grid's oracle puts an ungrouped layer in its place, which need not be compiled."""
    layers = []
    for index, (padding, steps) in enumerate(itertools.product(PADDINGS[rank], STEPS[rank])):
        arguments = {"padding": padding, "groups": (2, CHANNELS)[index % 2], **steps}
        layers.append(_layer(KINDS[rank], KERNELS[rank][2], dtype="float64", **arguments))
    x = tf.constant(_normal(2, *SIZES[rank][0], CHANNELS))

    @tf.function(jit_compile=True, autograph=False)
    def outputs_and_gradients(example):
        results = []
        for layer in layers:
            with tf.GradientTape() as tape:
                output = layer(example)
                loss = tf.reduce_sum(output**3)
            results.append((output, tape.gradient(loss, layer.trainable_variables)))
        return results

    for n in range(2):
        for layer, (output, gradients) in zip(layers, outputs_and_gradients(x[n : n + 1]), strict=True):
            samples = layer.samples(x[n : n + 1], 3 * output**2)
            made = [np.einsum("nti,nto->io", a, g) for a, g in samples]
            kernel, bias = layer.from_matrices([tf.constant(matrix) for matrix in made])
            np.testing.assert_allclose(kernel, gradients[0], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(bias, gradients[1], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "padding"), RANKS_AND_PADDINGS)
def test_unknown_sizes_in_graphs_give_the_samples_of_known_ones(rank, padding):
    """Whatever the batch, and one example as well."""
    for index, (kernel, steps) in enumerate(itertools.product(KERNELS[rank][2:], STEPS[rank])):
        layer = _layer(KINDS[rank], kernel, padding=padding, groups=1 + index % 2, **steps)
        unknown = [None] * (rank + 1)
        signature = [tf.TensorSpec([*unknown, CHANNELS]), tf.TensorSpec([*unknown, FILTERS])]
        samples = tf.function(layer.samples, input_signature=signature, autograph=False)
        for rows, sizes in zip((3, 1, 2), _sizes(rank, padding), strict=False):
            x = tf.constant(_normal(rows, *sizes, CHANNELS), tf.float32)
            slopes = tf.constant(_normal(*layer.compute_output_shape(x.shape), seed=1), tf.float32)
            for one, other in zip(samples(x, slopes), layer.samples(x, slopes), strict=True):
                np.testing.assert_array_equal(one[0], other[0])
                np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("groups", [1, 2])
def test_static_shapes_are_known_wherever_the_inputs_are(groups):
    layer = _layer(KPSVDConv2D, (2, 3), strides=(1, 2), padding="same", groups=groups)
    signature = [tf.TensorSpec([None, 9, 7, CHANNELS]), tf.TensorSpec([None, 9, 4, FILTERS])]
    concrete = tf.function(layer.samples, autograph=False).get_concrete_function(*signature)
    rows, columns = layer.block_shapes[0]
    assert [[part.shape.as_list() for part in block] for block in concrete.structured_outputs] == [
        [[None, 36, rows], [None, 36, columns]]
    ] * groups


@pytest.mark.parametrize("groups", [1, 2])
def test_an_empty_batch_has_empty_samples(groups):
    layer = _layer(KPSVDConv2D, 3, groups=groups)
    for activations, gradients in layer.samples(tf.zeros([0, 6, 5, CHANNELS]), tf.zeros([0, 4, 3, FILTERS])):
        assert activations.shape == (0, 12, layer.block_shapes[0][0])
        assert gradients.shape == (0, 12, layer.block_shapes[0][1])


@pytest.mark.parametrize("kind", STOCK)
def test_weights_survive_the_way_into_matrices_and_back(kind):
    for groups, use_bias in itertools.product((1, 2, CHANNELS), (True, False)):
        layer = _layer(kind, 3, groups=groups, use_bias=use_bias)
        values = [v.value for v in layer.curvature_variables]
        for one, other in zip(layer.from_matrices(layer.to_matrices(values)), values, strict=True):
            np.testing.assert_array_equal(one, other)


def _pair(kind, **arguments):
    """Keras's layer and ours with the same weights."""
    ours, stock = _layer(kind, **arguments), _layer(STOCK[kind], **arguments)
    for one, other in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    return stock, ours


def _assert_same_computation(pair, x):
    """Outputs, losses and gradients, bit for bit."""
    results = []
    for layer in pair:
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = layer(x, training=True) if isinstance(layer, tuple(STOCK)) else layer(x)
            losses = [tf.cast(loss, "float64") for loss in layer.losses]
            loss = tf.add_n([tf.reduce_mean(tf.cast(output, "float64") ** 2), *losses])
        gradients = tape.gradient(loss, [x, *layer.trainable_variables])
        results.append([output.dtype.name, output.numpy(), loss.numpy(), *(g.numpy() for g in gradients)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("rank", "padding"), RANKS_AND_PADDINGS)
def test_outputs_are_those_of_keras(rank, padding):
    for index, (kernel, steps) in enumerate(itertools.product(KERNELS[rank], STEPS[rank])):
        pair = _pair(
            KINDS[rank], kernel_size=kernel, padding=padding, use_bias=index % 3 > 0, activation="relu", **steps
        )
        for sizes in _sizes(rank, padding):
            _assert_same_computation(pair, tf.constant(_normal(2, *sizes, CHANNELS), tf.float32))


ARGUMENTS = {
    "groups": {"groups": 2, "strides": 2, "padding": "same"},
    "a group for each channel": {"groups": CHANNELS, "activation": "tanh"},
    "regularizers": {
        "activation": keras.layers.LeakyReLU(0.2),
        "kernel_regularizer": keras.regularizers.L1L2(0.01, 0.02),
        "bias_regularizer": "l2",
        "activity_regularizer": keras.regularizers.L2(0.1),
    },
    "constraints": {"kernel_constraint": keras.constraints.MaxNorm(0.3), "bias_constraint": "non_neg"},
    "float64": {"dtype": "float64", "kernel_initializer": keras.initializers.HeNormal(seed=3)},
    "bfloat16": {"dtype": "mixed_bfloat16", "activation": "sigmoid"},
    "float16": {"dtype": "mixed_float16", "activation": "sigmoid"},
}


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_options_mean_what_they_mean_to_keras(arguments, kind):
    pair = stock, layer = _pair(kind, kernel_size=3, **ARGUMENTS[arguments])
    _assert_same_computation(pair, tf.constant(_normal(2, *SIZES[layer.rank][0], CHANNELS), tf.float32))
    assert {**layer.get_config(), "name": 0} == {**stock.get_config(), "name": 0}
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is kind and again.get_config() == layer.get_config()
    assert type(kind.from_config(stock.get_config())) is kind


def test_saved_models_and_weights_move_both_ways(tmp_path):
    x = tf.constant(_normal(3, 8, 8, 2), tf.float32)
    models = []
    for seed, (one, two) in enumerate(((keras.layers.Conv1D, keras.layers.Conv2D), (KPSVDConv1D, KPSVDConv2D))):
        keras.utils.set_random_seed(seed)
        layers = [two(4, 3, activation="relu"), keras.layers.Reshape((36, 4)), one(3, 2, padding="causal")]
        models.append(keras.Sequential([keras.Input((8, 8, 2)), *layers]))
    stock, instrumented = models
    for source, target in ((stock, instrumented), (instrumented, stock)):
        source.set_weights([value + 1 for value in source.get_weights()])
        target.set_weights(source.get_weights())
        np.testing.assert_array_equal(source(x), target(x))
    instrumented.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert [type(layer) for layer in loaded.layers] == [KPSVDConv2D, keras.layers.Reshape, KPSVDConv1D]
    np.testing.assert_array_equal(loaded(x), instrumented(x))
    clone = keras.models.clone_model(instrumented)
    clone.set_weights(instrumented.get_weights())
    np.testing.assert_array_equal(clone(x), instrumented(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_samples_of_half_precision_are_float32(dtype):
    layer = _layer(KPSVDConv2D, (2, 3), groups=2, dtype=f"mixed_{dtype}")
    x, slopes = tf.cast(_normal(2, 6, 5, CHANNELS), dtype), tf.cast(_normal(2, 5, 3, FILTERS, seed=1), dtype)
    exact = layer.samples(tf.cast(x, tf.float64), tf.cast(slopes, tf.float64))
    for block, expected in zip(layer.samples(x, slopes), exact, strict=True):
        for part, whole in zip(block, expected, strict=True):
            assert (part.dtype, whole.dtype) == (tf.float32, tf.float64)
            np.testing.assert_array_equal(part, whole)


def _channels_last(values):
    return tf.transpose(values, [0, *range(2, values.shape.rank), 1])


@pytest.mark.parametrize("rank", KINDS)
def test_samples_of_channels_first_are_those_of_channels_last(rank):
    for padding, steps, groups in itertools.product(PADDINGS[rank], STEPS[rank], (1, 2)):
        arguments = {"padding": padding, "groups": groups, **steps}
        first = _layer(KINDS[rank], KERNELS[rank][2], data_format="channels_first", **arguments)
        last = _layer(KINDS[rank], KERNELS[rank][2], **arguments)
        x = tf.constant(_normal(2, CHANNELS, *SIZES[rank][0]))
        slopes = tf.constant(_normal(*first.compute_output_shape(x.shape), seed=1))
        expected = last.samples(_channels_last(x), _channels_last(slopes))
        for one, other in zip(first.samples(x, slopes), expected, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[1], other[1])


def _channels_first_model(kind, **arguments):
    shape = (CHANNELS, *SIZES[1 if kind in (KPSVDConv1D, keras.layers.Conv1D) else 2][0])
    convolution = kind(2, 3, data_format="channels_first", name="inner", **arguments)
    return keras.Sequential([keras.Input(shape), convolution, keras.layers.Flatten(), keras.layers.Dense(1)])


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("arguments", [{}, {"groups": 2, "dtype": "float64"}], ids=str)
def test_channels_first_computes_wherever_keras_does(arguments, kind):
    results = []
    for of_kind in (STOCK[kind], kind):
        keras.utils.set_random_seed(0)
        model = _channels_first_model(of_kind, **arguments)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        x = _normal(4, *model.input_shape[1:])
        try:
            model.fit(x, np.ones((4, 1)), verbose=0)
        except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError, ValueError) as error:
            results.append(["refused"])
            assert of_kind is not kind or "channels_last" in str(error)
        else:
            results.append(model.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU computes channels first")
@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_channels_first_that_the_device_cannot_compute_is_refused_with_the_way_out(run_eagerly, kind):
    model = _channels_first_model(kind, dtype="float64")
    model.compile("sgd", "mse", run_eagerly=run_eagerly)
    with pytest.raises(ValueError, match=r"(?s)Layer 'inner'.*channels_first.*float64.*data_format='channels_last'"):
        model.fit(_normal(4, *model.input_shape[1:]), np.ones((4, 1)), verbose=0)


@pytest.mark.parametrize("kind", STOCK)
def test_a_layer_with_lora_computes_as_keras_and_is_no_optimizers_to_claim(kind):
    rank = _layer(kind, 3).rank
    x = tf.constant(_normal(2, *SIZES[rank][0], CHANNELS), tf.float32)
    assert layers_of(_layer(kind, 3).trainable_variables)
    for built_with, enabled_later in ((2, None), (None, 2)):
        pair = stock, layer = _pair(kind, kernel_size=3, lora_rank=built_with)
        for one in pair:
            if enabled_later:
                one.enable_lora(enabled_later)
            one.lora_kernel_b.assign(tf.ones(one.lora_kernel_b.shape))
        layer.lora_kernel_a.assign(stock.lora_kernel_a)
        _assert_same_computation(pair, x)
        assert layers_of(layer.trainable_variables) == []
        model = keras.Sequential([keras.Input(x.shape[1:]), layer, keras.layers.Flatten(), KPSVDDense(1, name="out")])
        model.compile(loss="mse")
        assert set(fisher_samples(model, x, np.ones((2, 1)))) == {"out"}


def test_many_groups_train_without_curvature():
    for groups, curved in ((32, True), (33, False)):
        layer = KPSVDConv2D(groups, 1, groups=groups)
        layer.build((None, 3, 3, groups))
        assert bool(layers_of(layer.trainable_variables)) == curved
