# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Several devices, several processes
#
# `tf.distribute` splits every batch over several devices. With `KPSVD` that changes who computes what, and not what is
# computed: on batches that split evenly the steps are those of one device with the whole batch. This tutorial
#
# 1. trains on two devices of one machine, with stock `compile` and `fit`,
# 2. compares the losses with those of one device, and the curvature on both devices bit by bit,
# 3. says what is done on which device, and what does not work,
# 4. trains in two processes, as on two machines, with a hand-written loop.
#
# No GPU is needed: two logical CPU devices stand in for two GPUs. They share the cores of one machine, so that nothing
# here is faster than without them, and nothing here says what several GPUs would gain.
#
# `quickstart.ipynb` comes first. Nothing is downloaded; all of it takes about a minute on two CPU cores.

# %% [markdown]
# ## Two devices
#
# Logical devices must be made before TensorFlow does anything else. After an error here restart the notebook. With real
# GPUs leave these three lines out.

# %%
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_kpsvd.linalg

processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.set_visible_devices([], "GPU")

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs
EPOCHS = 3 if SMALL else 10
LOOP_EPOCHS = 2 if SMALL else 5  # of the hand-written loop

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")
print([device.name for device in tf.config.list_logical_devices()])

# %% [markdown]
# `MirroredStrategy` keeps a copy of every variable on each device. On a machine with GPUs `MirroredStrategy()` takes
# all of them; here the devices are named.

# %%
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
print(f"{strategy.num_replicas_in_sync} replicas")

# %% [markdown]
# ## Train on both
#
# The digits of scikit-learn: 1,797 images of 8 × 8 pixels. 1,536 of them, twelve batches of 128, are for training. A
# batch is the *global* one, of which each device gets 64 rows.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
images, labels = (digits.images[order, :, :, None] / 16).astype("float32"), digits.target[order]
x_train, y_train, x_test, y_test = images[:1536], labels[:1536], images[1536:], labels[1536:]
BATCH = 128

# %% [markdown]
# Model **and optimizer** are made in the strategy's scope, since both make variables; an optimizer from outside ends in
# `RuntimeError: Mixing different tf.distribute.Strategy objects`. `fit` needs no scope. The seed fixes the first
# weights, the order of the batches and the targets that `KPSVD` draws from the model's predictions.
#
# The activation is `tanh` because losses are compared to the last digits below. Behind a ReLU an activation that is
# zero but for rounding has a derivative of 0 or of 1, and one such flip moves the losses by a part in a thousand.


# %%
def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras_kpsvd.KPSVDConv2D(12, 3, strides=2, padding="same", activation="tanh", name="convolution"),
            keras.layers.Flatten(),
            keras_kpsvd.KPSVDDense(32, activation="tanh", name="hidden"),
            keras_kpsvd.KPSVDDense(10, name="logits"),
        ]
    )
    model.compile(
        optimizer=keras_kpsvd.KPSVD(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(model):
    return model.fit(x_train, y_train, batch_size=BATCH, epochs=EPOCHS, verbose=2).history["loss"]


with strategy.scope():
    two_devices = make_model()

losses = {"two devices": train(two_devices)}
held_out_loss, held_out_accuracy = two_devices.evaluate(x_test, y_test, batch_size=BATCH, verbose=0)
print(f"Held out: loss {held_out_loss:.4f}, accuracy {held_out_accuracy:.2%}")

# %% [markdown]
# ## Compare with one device
#
# The same without a strategy. Sums of the same numbers in another order round differently, and training amplifies
# whatever differs. A third run shows what rounding alone does: one device again, with every first weight moved to the
# next float32.

# %%
one_device = make_model()
losses["one device"] = train(one_device)

# %%
nudged = make_model()
nudged.set_weights([np.nextafter(weights, np.float32(np.inf)) for weights in nudged.get_weights()])
losses["one device, nudged"] = train(nudged)

# %%
gaps = {name: np.abs(np.array(run) / losses["one device"] - 1) for name, run in losses.items()}

print("epoch" + "".join(f"{name:>22}" for name in losses) + f"{'gap of two devices':>22}")
for epoch in range(EPOCHS):
    print(f"{epoch + 1:5}" + "".join(f"{run[epoch]:22.8f}" for run in losses.values()), end="")
    print(f"{gaps['two devices'][epoch]:22.1e}")

# %% [markdown]
# ## The same curvature on both devices
#
# Each layer has two Kronecker factors, `A` of its inputs and `G` of the gradients at its outputs. They are variables,
# each kept as its lower triangle, a vector, and each device has a copy. The copies must never drift apart, or each
# device would step with a curvature of its own. Are they the same, to the last bit?


# %%
def copies(variable):
    return [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]


def different_entries(variables):
    pairs = [copies(variable) for variable in variables]
    return sum(np.sum(first != second) for first, second in pairs), sum(first.size for first, _ in pairs)


factors = {v.name.split("/")[-1]: v for v in two_devices.optimizer.variables if v.name.endswith(("_A", "_G"))}
for name, factor in factors.items():
    print(f"{name:28}{factor.shape!s:>12}, different entries: {different_entries([factor])[0]}")

everything = [*two_devices.weights, *two_devices.optimizer.variables]
different, entries = different_entries(everything)
print(f"Different entries on the two devices, weights and all of the optimizer's state: {different} of {entries:,}")

# %%
colours = {"two devices": "#d55e00", "one device, nudged": "#0072b2"}
epochs = range(1, EPOCHS + 1)
figure, axes = plt.subplot_mosaic("LLLGGG;001122", figsize=(10, 8), height_ratios=(1.1, 1), layout="constrained")

axes["L"].plot(epochs, losses["one device"], color="#b0b0b0", linewidth=7, solid_capstyle="round", label="one device")
axes["L"].plot(epochs, losses["two devices"], "o-", color=colours["two devices"], markersize=4, label="two devices")
axes["L"].set(yscale="log", xlabel="epochs", title="Training loss, same global batches")
axes["L"].legend(frameon=False)

for name in ("one device, nudged", "two devices"):
    gap = np.where(gaps[name] > 0, gaps[name], np.nan)  # no point where there is no distance at all
    axes["G"].plot(epochs, gap, "o-", color=colours[name], markersize=4, label=name)
axes["G"].axhline(np.finfo("float32").eps, color="#b0b0b0", linestyle="--")
axes["G"].annotate("one rounding of float32", (EPOCHS, 1.15e-7), ha="right", va="top", color="#777777")
axes["G"].set(yscale="log", ylim=(1e-8, None), xlabel="epochs", title="Its relative distance from one device's")
axes["G"].legend(frameon=False, loc="upper left")
for axis in (axes["L"], axes["G"]):
    axis.set(xlim=(0.5, EPOCHS + 0.5), xticks=epochs)
    axis.grid(color="#e6e6e6")

triangles = copies(next(factor for name, factor in factors.items() if name.endswith("logits_G")))
first, second = (keras_kpsvd.linalg.unpack(triangle).numpy() for triangle in triangles)
limit = np.abs(first).max()
shown = {"copy on device 0": first, "copy on device 1": second, "their difference": first - second}
for place, (title, matrix) in zip("012", shown.items(), strict=True):
    picture = axes[place].imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes[place].set(title=title, xticks=range(10), yticks=range(10), xlabel="digit")
axes["0"].set_ylabel("factor G of the last layer\ndigit")
figure.colorbar(picture, ax=axes["2"], shrink=0.8)
plt.show()

# %% [markdown]
# Above: one curve lies on the other. What is left between them starts near the rounding of float32 (where there was no
# distance at all there is no point) and grows. The gap of the nudged run grows alike, and that run differs by nothing
# but rounding.
#
# Below: the curvature of the last layer. Blue off the diagonal are pairs of digits between which the network wavers, or
# has wavered lately, since factors are moving averages. Both devices hold the same matrix.

# %% [markdown]
# ## What is done where
#
# - **Forward and backward pass:** each device, for its rows. The gradients are summed over the devices, by Keras's own
#   rule.
# - **Curvature:** in every fifth step the rows of all devices are put together again, in the order of the batch: the
#   inputs of a layer and the gradients at its outputs go to the one device that works on that layer. So every example
#   has the same weight in the statistics, however unevenly the batch was split, and the targets that are drawn are
#   those of one device.
# - **Decompositions:** layers are spread over the devices, the dearest first, each to the device that has least to do
#   so far. The results are written to the copies on all devices; memory for curvature is needed on each.
# - **Step length:** each device works out what the quadratic model needs for its rows; rate, momentum and damping are
#   found from all of them, once for all devices.
#
# On an **uneven batch** the gradient is still Keras's own: the mean of the devices' means. Of 29 rows one device gets
# 15, the other 14; a row then weighs 1/30 or 1/28 instead of 1/29. That is so with every Keras optimizer. Here all
# batches are even: the number of devices divides 128, and 128 divides the number of rows. `drop_remainder=True` of
# `tf.data` drops a last batch that is not full.
#
# Saving works as ever; load the model within the scope.
#
# ## What does not work
#
# These are limits of Keras and TensorFlow, which stock optimizers meet as well:
#
# - **`gradient_accumulation_steps`, `ema_overwrite_frequency`.** Keras acts on them within a branch of the graph, where
#   TensorFlow lets devices not talk to each other. `KPSVD` raises an error that says so. Leave them out.
# - **`steps_per_execution` above 1.** Keras then takes its batches within a loop, which TensorFlow ends with an
#   `InvalidArgumentError` where there are several replicas, or eagerly not at all. `KPSVD` raises an error that says
#   so. Leave it out.
# - **A first batch that is uneven.** Before the first step Keras averages the devices' parts of the first batch, to
#   build the model with the result, and that needs parts of equal shape. Take a batch size that the number of devices
#   divides, and no more than there are rows.
# - **A last batch with fewer rows than devices,** such as a single row. On the device without rows the gradient of a
#   convolution raises an `InternalError`, and `BatchNormalization` makes NaN (`KPSVD` skips the step and warns).
#   `drop_remainder=True` avoids both.
#
# The first of them, as it is seen:

# %%
with strategy.scope():
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras_kpsvd.KPSVDDense(10)])
    model.compile(keras_kpsvd.KPSVD(gradient_accumulation_steps=4), two_devices.loss)
try:
    model.fit(x_train, y_train, batch_size=BATCH, verbose=0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Several processes
#
# On several machines one process runs on each, all with the same script. `MultiWorkerMirroredStrategy` reads from the
# environment variable `TF_CONFIG` where the others are and which of them this one is, and keeps the copies of all
# variables the same.
#
# `fit` of Keras 3 does not work there, whatever the optimizer: `ValueError: Attempt to convert a value (PerReplica…)
# with an unsupported type`. The loop is written by hand. `KPSVD` needs no more than any optimizer would, with one
# exception. In `fit` it reads off the compiled loss which distribution the model predicts; a loop has no compiled loss,
# so it is named: `likelihood="categorical"` for classes, `"bernoulli"` or `"normal"` for others.

# %%
WORKER = '''"""Trains on the digits, in one process of those that TF_CONFIG names: python worker.py EPOCHS RESULT.npz"""

import sys

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_kpsvd

strategy = tf.distribute.MultiWorkerMirroredStrategy()  # first of all; waits for the other processes
keras.utils.set_random_seed(0)  # the same in all of them
BATCH = 128  # the global one

digits = load_digits()
x, y = (digits.data / 16).astype("float32"), digits.target
dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0).batch(BATCH, drop_remainder=True)
options = tf.data.Options()  # every process reads all the data and keeps its part of each batch
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
batches = strategy.experimental_distribute_dataset(dataset.with_options(options))

with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras_kpsvd.KPSVDDense(32, activation="tanh", name="hidden"),
            keras_kpsvd.KPSVDDense(10, name="logits"),
        ]
    )
    optimizer = keras_kpsvd.KPSVD(likelihood="categorical", seed=0)
    optimizer.build(model.trainable_variables)
    loss_of_rows = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


def step(images, labels):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loss_of_rows(labels, model(images, training=True))) / BATCH
        scaled = optimizer.scale_loss(loss)
    gradients = tape.gradient(scaled, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)  # sums them over all processes first
    return loss


@tf.function
def distributed_step(images, labels):
    losses = strategy.run(step, args=(images, labels))
    return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)


losses = []
for _ in range(int(sys.argv[1])):
    losses.append(np.mean([distributed_step(*batch).numpy() for batch in batches]))
state = {variable.path: variable.numpy() for variable in [*model.weights, *optimizer.variables]}
np.savez(sys.argv[2], losses=losses, **{path.replace("/", "."): value for path, value in state.items()})
'''

# %% [markdown]
# The loss of a process is the sum over its rows, divided by the rows of the *global* batch. The sum of the processes'
# gradients is then the mean over the batch. `optimizer.build` makes all state before the first step.
#
# Two processes on this machine stand in for two machines; a third one, alone, is there for comparison. On real machines
# the addresses are theirs, and a scheduler starts the script. Whoever starts processes must also end them: where one
# fails the others would wait for it, so that all are ended then, and after a time limit too.


# %%
def free_addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))  # port 0: the system picks one that is free
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def run(folder, clusters, limit=300):
    """Runs the script once for each address of each cluster, all at once; returns the arrays that each has saved."""
    script = Path(folder, "worker.py")
    script.write_text(WORKER)
    tasks = [(addresses, index) for addresses in clusters for index in range(len(addresses))]
    results = [Path(folder, f"{number}.npz") for number in range(len(tasks))]
    logs = [result.with_suffix(".log") for result in results]
    workers = []
    try:
        for (addresses, index), result, log in zip(tasks, results, logs, strict=True):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
            environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}  # no GPU, and no chatter
            command = [sys.executable, str(script), str(LOOP_EPOCHS), str(result)]
            with log.open("w") as said:
                workers.append(subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT))
        end = time.monotonic() + limit
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers) or time.monotonic() > end:
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()  # nothing happens to those that have ended
            worker.wait()
    codes = [worker.returncode for worker in workers]
    if any(codes):
        said = "\n".join(log.read_text()[-2000:] for log in logs)
        raise RuntimeError(f"The workers ended with {codes} (-9: from here). Received:\n{said}")
    return [dict(np.load(result)) for result in results]


with tempfile.TemporaryDirectory() as folder:
    first, second, third = free_addresses(3)
    *workers, alone = run(folder, [[first, second], [third]])

# %% [markdown]
# Each worker saw half of every batch. Both must report the same losses, and hold the same weights and curvature, to the
# last bit; those of one process must be the same but for rounding.

# %%
print(f"epoch{'worker 0':>14}{'worker 1':>14}{'one process':>14}{'gap':>10}")
for epoch, of_epoch in enumerate(zip(workers[0]["losses"], workers[1]["losses"], alone["losses"], strict=True)):
    print(f"{epoch + 1:5}" + "".join(f"{loss:14.8f}" for loss in of_epoch) + f"{of_epoch[0] / of_epoch[2] - 1:10.1e}")

different = sum(np.sum(value != workers[1][name]) for name, value in workers[0].items())
entries = sum(value.size for value in workers[0].values())
held = "losses, weights and all of the optimizer's state"
print(f"Different entries in the two processes, {held}: {different} of {entries:,}")

# %% [markdown]
# A refresh brings the rows of all processes to each of them, and each decomposes all layers itself, spread over its own
# devices where it has several. Gradients and rows travel between machines, factors never do. How long that takes
# depends on the network between them; nothing of it is measured here.
#
# The last losses of all runs:

# %%
comparison = {name: {"training loss": run[-1]} for name, run in losses.items()}
for name, saved in {"worker 0": workers[0], "worker 1": workers[1], "one process": alone}.items():
    comparison[name] = {"training loss": saved["losses"][-1]}
for name, numbers in comparison.items():
    print(f"{name:20}{numbers['training loss']:12.8f}")
