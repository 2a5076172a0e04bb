"""What curvature costs a convolutional network: a ResNet-20 for 32 × 32 images, batch 128.

    python benchmarks/convolution.py [--rounds 9] [--out benchmarks/results/convolution.json]

Measured in one run, as ratios, the contestants taking turns:

- a refresh (approximations of all layers folded into their averages, from recorded inputs and gradients) of every
  method against `kfac`'s, and both with the rebuilding of the preconditioners;
- a training step that refreshes nothing, and one on the average with the default intervals, against a step of SGD
  with momentum and of Adam, with a given rate and with the adaptive one;
- peak memory of one refresh of a 3 × 3 convolution with 64 channels on 32 × 32 images, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_kpsvd
from keras_kpsvd.curvature.intervals import LONGEST
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import MEMORY_BUDGET, LayerCall, refresh_rows
from keras_kpsvd.curvature.samples import layer_calls, pass_heads, preactivation_gradients
from keras_kpsvd.curvature.state import LayerCurvature, invert_layers, refresh_layers
from keras_kpsvd.layers import Recorder, RecordingLayer

BATCH, SIZE, CLASSES = 128, 32, 10
METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def resnet20(convolution: type = keras.layers.Conv2D, dense: type = keras.layers.Dense) -> keras.Model:
    """He et al. 2016, §4.2: three stages of three blocks with 16, 32 and 64 filters; 1 × 1 shortcuts between stages."""

    def normalised(x, filters, kernel, strides=1):
        x = convolution(filters, kernel, strides=strides, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization()(x)

    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.ReLU()(normalised(inputs, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage > 0 and block == 0 else 1
            shortcut = normalised(x, filters, 1, strides) if strides == 2 else x
            y = keras.layers.ReLU()(normalised(x, filters, 3, strides))
            x = keras.layers.ReLU()(keras.layers.Add()([normalised(y, filters, 3), shortcut]))
    return keras.Model(inputs, dense(CLASSES)(keras.layers.GlobalAveragePooling2D()(x)))


def images(count: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random images and labels: what is measured does not depend on them."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(count, 8, 8, 3)).astype("float32")
    x = tf.image.resize(coarse, (SIZE, SIZE)).numpy()
    return x, rng.integers(0, CLASSES, count)


def interleaved(cases: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case in each round, cases taking turns, one round of warming up."""
    for run in cases.values():
        run()
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """The median over rounds of each case's time against the reference's in the same round."""
    return {
        name: statistics.median(one / base for one, base in zip(times, seconds[reference], strict=True))
        for name, times in seconds.items()
    }


def recorded_calls(model: keras.Model) -> dict[RecordingLayer, list[LayerCall]]:
    """Inputs and sampled gradients of one training-mode pass."""
    x, _ = images()
    recorder = Recorder(always=True)
    for layer in model._flatten_layers():
        if isinstance(layer, RecordingLayer):
            layer.attach(recorder)
    outputs = model(tf.constant(x), training=True)
    forward_pass = recorder.take()
    forward_pass.outputs = outputs
    gradients = preactivation_gradients(forward_pass, pass_heads(forward_pass, "auto"), "sampled", tf.constant([0, 0]))
    return forward_pass, gradients


def _variable(shape, dtype, name, initializer):
    initial = np.eye(*shape) if initializer == "identity" else np.zeros(shape)
    return keras.Variable(initial.astype(dtype), name=name)


def _refresh_and_invert(
    blocks: list[LayerCurvature], calls: dict[RecordingLayer, list[LayerCall]]
) -> tuple[Callable, Callable]:
    """Both as graph functions that assign what they compute."""

    @tf.function(autograph=False)
    def refresh():
        refresh_layers(blocks, calls)

    @tf.function(autograph=False)
    def invert():
        invert_layers(blocks, {block.layer: tf.constant(0.01) for block in blocks})

    return refresh, invert


def refreshes(rounds: int) -> dict[str, dict[str, float]]:
    """Warm refreshes of all layers from a recorded pass, with and without the rebuilding of the preconditioners."""
    keras.utils.set_random_seed(0)
    model = resnet20(keras_kpsvd.KPSVDConv2D, keras_kpsvd.KPSVDDense)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    forward_pass, gradients = recorded_calls(model)
    alone, inverting = {}, {}
    for method in METHODS:
        options = CurvatureOptions(method, "sqrt", 0.95, "absolute")
        calls = layer_calls(forward_pass.records, gradients, functools.partial(refresh_rows, method))
        blocks = [LayerCurvature(layer, options, _variable) for layer in calls]

        alone[method], inverting[f"{method} preconditioners"] = _refresh_and_invert(blocks, calls)
    seconds = interleaved({**alone, **inverting}, rounds)
    return {
        "milliseconds": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "refresh_against_kfac": ratios({name: seconds[name] for name in alone}, "kfac"),
    }


def steps(rounds: int) -> dict[str, dict[str, float]]:
    """Steps of compiled models. "plain" refreshes nothing, "average" every twentieth as the default does later on."""
    x, y = images()
    x, y = tf.constant(x), tf.constant(y)
    rare, length = 10**6, LONGEST
    choices = {
        "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(),
    }
    for method in ("kfac", "kpsvd", "kfac_corrected"):
        for name, rate in (("given rate", 0.01), ("adaptive", "adaptive")):
            choices[f"{method}, {name}, plain"] = lambda method=method, rate=rate: keras_kpsvd.KPSVD(
                learning_rate=rate, method=method, curvature_interval=rare, inverse_interval=rare
            )
            choices[f"{method}, {name}, average"] = lambda method=method, rate=rate: keras_kpsvd.KPSVD(
                learning_rate=rate, method=method, curvature_interval=LONGEST, inverse_interval=LONGEST
            )
    cases = {}
    for name, optimizer in choices.items():
        keras.utils.set_random_seed(0)
        plain = name in ("sgd", "adam")
        model = resnet20() if plain else resnet20(keras_kpsvd.KPSVDConv2D, keras_kpsvd.KPSVDDense)
        model.compile(optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        model.train_on_batch(x, y)  # The first step refreshes in every case.

        def run(model=model):
            for _ in range(length):
                model.train_on_batch(x, y)

        cases[name] = run
    seconds = interleaved(cases, rounds)
    return {
        "milliseconds": {name: 1e3 * statistics.median(times) / length for name, times in seconds.items()},
        "against_sgd": ratios(seconds, "sgd"),
        "against_adam": ratios(seconds, "adam"),
    }


def _status(field: str) -> float:
    """A field of this process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no {field} in /proc/self/status")


def _memory(method: str, channel) -> None:
    layer = keras_kpsvd.KPSVDConv2D(64, 3, padding="same", use_bias=True)
    layer.build((None, SIZE, SIZE, 64))
    block = LayerCurvature(layer, CurvatureOptions(method, "sqrt", 0.95, "absolute"), _variable)
    refresh = tf.function(
        lambda inputs, gradient: block.refresh([LayerCall(inputs, gradient)])[0],
        input_signature=[tf.TensorSpec([None, SIZE, SIZE, 64])] * 2,
        autograph=False,
    )
    refresh(tf.zeros([1, SIZE, SIZE, 64]), tf.zeros([1, SIZE, SIZE, 64]))  # Threads, kernels and traces exist now.
    inputs, gradient = (tf.random.normal([BATCH, SIZE, SIZE, 64]) for _ in range(2))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    values = refresh(inputs, gradient)
    channel.send(_status("VmHWM") - before - sum(value.numpy().nbytes for value in values) / 2**20)


def memory() -> dict[str, float]:
    """Peak MiB of one refresh beyond what existed before it and the factors it returns."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for method in METHODS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_memory, args=(method, sender))
        process.start()
        peaks[method] = receiver.recv()
        process.join()
    peaks["all patches at once"] = BATCH * SIZE * SIZE * 577 * 4 / 2**20
    peaks["budget"] = MEMORY_BUDGET / 2**20
    return peaks


def main() -> None:
    """Runs all three and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("refreshes", "steps", "memory"))
    arguments = parser.parse_args()
    results = {
        "machine": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "device": f"CPU, {multiprocessing.cpu_count()} cores",
        }
    }
    measures = {
        "memory": memory,
        "refreshes": lambda: refreshes(arguments.rounds),
        "steps": lambda: steps(arguments.rounds),
    }
    for name, measure in measures.items():
        if arguments.only in (None, name):
            results[name] = measure()
            print(json.dumps({name: results[name]}, indent=1), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
