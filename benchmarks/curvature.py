"""Speed and memory of the curvature computations, as ratios within one run.

    python benchmarks/curvature.py [--out benchmarks/results/curvature.json]

Four questions, one row each or several: how fast the exact singular triples are against power iteration; how much
memory the Gram route takes; what a refresh by `kpsvd` costs against `kfac`'s on the paper's MNIST network,
decompositions included; and that a step which refreshes nothing pays for nothing but its preconditioning products.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import LayerCall
from keras_kpsvd.curvature.state import LayerCurvature
from keras_kpsvd.linalg import RearrangedFisher, leading_triples, power_iteration

MNIST_SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
EXAMPLES, D_IN, D_OUT = 128, 1001, 500


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case. Rounds run the cases in turn, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def samples(examples: int, d_in: int, d_out: int, seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    """Dependent samples, activations non-negative as a ReLU's are: `[examples, 1, d_in]` and `[examples, 1, d_out]`."""
    rng = np.random.default_rng(seed)
    a = np.maximum(rng.normal(size=(examples, d_in)), 0)
    g = np.tanh(a @ rng.normal(size=(d_in, d_out)) / d_in**0.5) * rng.normal(size=(examples, 1))
    return tuple(tf.constant(part[:, None, :], tf.float32) for part in (a, g))


def triples(rounds: int) -> dict[str, float]:
    """Milliseconds for the leading triple and triples by the Gram route, and for ten power iterations."""
    a, g = samples(EXAMPLES, D_IN, D_OUT)
    start = tf.eye(D_OUT)

    def wrap(function):
        compiled = tf.function(function)
        return lambda: compiled(a, g).values.numpy()  # the factors are results too, so that nothing is pruned

    one = wrap(lambda a, g: leading_triples(RearrangedFisher(a, g), 1, route="gram"))
    two = wrap(lambda a, g: leading_triples(RearrangedFisher(a, g), 2, route="gram"))
    power = wrap(lambda a, g: power_iteration(RearrangedFisher(a, g), start, tolerance=0.0, max_steps=10))
    # "Two against one" depends on what runs in between, and from run to run: it is measured both ways.
    against_power = interleaved({"one_triple": one, "ten_power_iterations": power}, rounds)
    cold = interleaved({"one_triple": one, "power": power, "two_triples": two, "power again": power}, rounds)
    against_two = interleaved({"one_triple": one, "two_triples": two}, rounds)
    return {
        **{f"{name}_ms": 1e3 * value for name, value in {**against_power, **against_two}.items()},
        "speedup_over_power": against_power["ten_power_iterations"] / against_power["one_triple"],
        "two_over_one": against_two["two_triples"] / against_two["one_triple"],
        "two_over_one_with_power_between": cold["two_triples"] / cold["one_triple"],
    }


def largest_intermediate(function: tf.types.experimental.ConcreteFunction) -> int:
    """The number of values in the largest tensor of a traced function and of the branches it calls."""
    graphs, largest = [function.graph, *function.graph._functions.values()], 0
    for graph in graphs:
        for operation in getattr(graph, "graph", graph).get_operations():
            for output in operation.outputs:
                if output.shape.is_fully_defined():
                    largest = max(largest, output.shape.num_elements())
    return largest


def peak_memory() -> dict[str, float]:
    """Peak of one Gram-route call above what was held before, in a process of its own (Linux)."""
    output = subprocess.run([sys.executable, __file__, "--peak"], capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_of_this_process() -> dict[str, float]:
    """What `peak_memory` runs: the leading triple at sizes where forming `vec(āāᵀ)` of every example would take
    gigabytes.
    """
    examples, d_in, d_out = 512, 2001, 1000
    a, g = samples(examples, d_in, d_out)
    traced = tf.function(lambda a, g: leading_triples(RearrangedFisher(a, g), 1, route="gram"))
    function = traced.get_concrete_function(a, g)

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    # No call before: memory that an earlier one held and freed would hide this one's. The runtime's own start counts
    # too.
    before = status("VmRSS")
    result = function(a, g)
    allowed = max(examples * (d_in + d_out), examples**2, d_in**2, d_out**2)
    return {
        "allowed_values_in_one_tensor": allowed,
        "largest_tensor_values": largest_intermediate(function),
        "allowed_tensor_mib": allowed * 4 / 2**20,
        "peak_mib": status("VmHWM") - before,
        "result_mib": sum(part.numpy().nbytes for part in result[:3]) / 2**20,
        "vectorised_samples_mib": examples * (d_in**2 + d_out**2) * 4 / 2**20,
    }


def mnist_refresh(rounds: int) -> dict[str, float]:
    """Milliseconds to refresh and invert every layer of the MNIST network from samples of 128 examples."""
    cases = {}
    for method in ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected"):
        options = CurvatureOptions(method, "sqrt", 0.95, "absolute")
        blocks, batches = [], []
        for index, (d_in, d_out) in enumerate(itertools.pairwise(MNIST_SIZES)):
            layer = KPSVDDense(d_out)
            layer.build((None, d_in))
            blocks.append(LayerCurvature(layer, options, _variable))
            activations, gradients = samples(EXAMPLES, d_in + 1, d_out, seed=index)
            batches.append([LayerCall(activations[:, 0, :-1], gradients[:, 0])])  # The layer appends its ones.

        def refresh(blocks=blocks, batches=batches):
            for block, batch in zip(blocks, batches, strict=True):
                values, _ = block.refresh(batch)
                for variable, value in zip(block.refresh_targets, values, strict=True):
                    variable.assign(value)
                values, _ = block.invert(tf.constant(1e-2))
                for variable, value in zip(block.preconditioner, values, strict=True):
                    variable.assign(value)
            return blocks[-1].preconditioner[0].numpy()

        cases[method] = refresh
    seconds = interleaved(cases, rounds)
    return {
        **{f"{method}_ms": 1e3 * value for method, value in seconds.items()},
        **{f"{method}_over_kfac": value / seconds["kfac"] for method, value in seconds.items()},
    }


def _variable(shape, dtype, name, initializer) -> keras.Variable:
    return keras.Variable(keras.initializers.get(initializer)(shape, dtype), dtype=dtype, name=name, trainable=False)


def plain_step(rounds: int) -> dict[str, float]:
    """A training step of the MNIST network that refreshes nothing, against SGD's and the preconditioning products
    alone.
    """
    x = np.random.default_rng(0).random((256, MNIST_SIZES[0])).astype("float32")

    def trained(optimizer) -> keras.Model:
        keras.utils.set_random_seed(0)
        layers = [KPSVDDense(units, activation="relu") for units in MNIST_SIZES[1:-1]]
        model = keras.Sequential([keras.Input((MNIST_SIZES[0],)), *layers, KPSVDDense(MNIST_SIZES[-1])])
        model.compile(optimizer=optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True))
        model.train_on_batch(x, x)
        return model

    sgd = trained(keras.optimizers.SGD(0.01, momentum=0.9))
    rare = trained(
        KPSVD(0.01, method="kfac", damping=0.1, curvature_interval=10**6, inverse_interval=10**6, kl_clip=None)
    )
    blocks = rare.optimizer._blocks
    gradients = [[tf.random.normal(v.shape) for v in block.layer.curvature_variables] for block in blocks]
    products = tf.function(lambda: [block.precondition(g) for block, g in zip(blocks, gradients, strict=True)])
    seconds = interleaved(
        {
            "sgd_step": lambda: sgd.train_on_batch(x, x),
            "step_without_refresh": lambda: rare.train_on_batch(x, x),
            "products": lambda: products()[-1][-1].numpy(),
        },
        rounds,
    )
    ratio = seconds["step_without_refresh"] / (seconds["sgd_step"] + seconds["products"])
    return {**{f"{name}_ms": 1e3 * value for name, value in seconds.items()}, "over_sgd_and_products": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curvature.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak_of_this_process()))
        return
    results = {
        "command": "python benchmarks/curvature.py",
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__},
    }
    for name, measure in (
        ("triples", lambda: triples(arguments.rounds)),
        ("gram_memory", peak_memory),
        ("mnist_refresh", lambda: mnist_refresh(max(3, arguments.rounds // 3))),
        ("plain_step", lambda: plain_step(4 * arguments.rounds)),
    ):
        print(f"{name} …", flush=True)
        results[name] = {key: round(float(value), 3) for key, value in measure().items()}
        for key, value in results[name].items():
            print(f"  {key:32s} {value:12.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
