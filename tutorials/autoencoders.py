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
# # Autoencoders: copying, denoising, finding what does not belong
#
# An autoencoder is a network that gives back its input after squeezing it through a layer too narrow for a plain copy.
# What it learns is what its data have in common. Here are three of them, each trained twice from the same weights, by
# Adam and by `KPSVD()`, both with their defaults:
#
# 1. a small dense network that copies handwritten digits,
# 2. a convolutional one that removes noise from them,
# 3. one that has seen a single digit only and tells all others by how badly it copies them.
#
# Nothing is downloaded; all of it takes about three minutes on two CPU cores. `quickstart.ipynb` comes first.

# %%
import os
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_kpsvd

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")

# %%
train = keras_kpsvd.datasets.load_mnist(512 if SMALL else 4000, split="train")
test = keras_kpsvd.datasets.load_mnist(256 if SMALL else 1000, split="test")

print(f"Training: {len(train):,} images; {train.source}")
print(f"Held out: {len(test):,} images; {test.source}")

# %% [markdown]
# ## Two runs and their curves
#
# Each part makes its network twice, of stock layers for Adam and of ours for `KPSVD`, and trains both on the same
# batches. The clock starts before `fit`, so its seconds include tracing and compiling.

# %%
COLOURS = {"Adam": "#444444", "KPSVD": "#d55e00"}


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.began = time.perf_counter()
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def train_both(make_model, loss, x, y, held_out, batch_size, epochs):
    contestants = {
        "Adam": (keras.layers.Dense, keras.layers.Conv2D, keras.optimizers.Adam()),
        "KPSVD": (keras_kpsvd.KPSVDDense, keras_kpsvd.KPSVDConv2D, keras_kpsvd.KPSVD()),
    }
    models, runs = {}, {}
    for name, (dense, convolution, optimizer) in contestants.items():
        keras.utils.set_random_seed(0)  # the same first weights and batches for both
        model = make_model(dense, convolution)
        model.compile(optimizer=optimizer, loss=loss)
        clock = Clock()
        history = model.fit(
            x, y, batch_size=batch_size, epochs=epochs, validation_data=held_out, callbacks=[clock], verbose=0
        )
        models[name], runs[name] = model, {**history.history, "seconds": clock.seconds}
        print(
            f"{name:6}{len(clock.seconds):4} epochs {clock.seconds[-1]:6.1f} s   loss {history.history['loss'][-1]:.4f}"
        )
    return models, runs


def plot_runs(runs):
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for name, run in runs.items():
        epochs = range(1, len(run["loss"]) + 1)
        for axis, along in zip(axes, (epochs, run["seconds"]), strict=True):
            axis.plot(along, run["loss"], ".-", color=COLOURS[name], label=name)
            axis.plot(along, run["val_loss"], ":", color=COLOURS[name], label=f"{name}, held out")
    for axis, label in zip(axes, ("epochs", "seconds, tracing included"), strict=True):
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(color="#e6e6e6")
    axes[0].set(ylabel="loss", yscale="log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend(frameon=False)
    plt.show()


comparison = {}


def judge(task, runs):
    for name, run in runs.items():
        comparison[f"{task}, {name}"] = {
            "training loss": run["loss"][-1],
            "held-out loss": run["val_loss"][-1],
            "first epoch (s)": run["seconds"][0],
            "later epochs (s)": float(np.median(np.diff(run["seconds"]))),
        }
    ours, adams = runs["KPSVD"], runs["Adam"]
    goal, epochs = adams["loss"][-1], len(adams["loss"])
    reached = next((k for k, loss in enumerate(ours["loss"]) if loss <= goal), None)
    if reached is None:
        print(f"KPSVD did not reach Adam's last training loss of {goal:.4f} in {epochs} epochs.")
    else:
        print(
            f"KPSVD reached Adam's last training loss of {goal:.4f} in epoch {reached + 1} of {epochs}, "
            f"after {ours['seconds'][reached]:.1f} s; Adam took {adams['seconds'][-1]:.1f} s."
        )
    for key, quantity in (("loss", "Training loss"), ("val_loss", "Held-out loss")):
        mine, other = ours[key][-1], adams[key][-1]
        verdict = "lower than" if mine < other else "higher than" if mine > other else "the same as"
        print(f"{quantity} after epoch {epochs}: KPSVD's is {verdict} Adam's ({mine:.4f} and {other:.4f}).")


def output(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def show_rows(rows, shape=(28, 28)):
    count = len(next(iter(rows.values())))
    _, axes = plt.subplots(len(rows), count, figsize=(count, 1.05 * len(rows)), layout="constrained", squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(np.reshape(image, shape), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    plt.show()


# %% [markdown]
# ## 1. Copy
#
# 784 pixels go down to 16 numbers and back. The output is a logit for each pixel; binary cross-entropy takes the grey
# of the image for the probability of ink. The code in the middle has no activation: a ReLU would waste half of the
# little room there is.


# %%
def make_copier(dense, convolution):
    return keras.Sequential(
        [
            keras.Input((784,)),
            dense(256, activation="relu"),
            dense(64, activation="relu"),
            dense(16, name="code"),
            dense(64, activation="relu"),
            dense(256, activation="relu"),
            dense(784),
        ]
    )


make_copier(keras.layers.Dense, keras.layers.Conv2D).summary()

# %%
models, runs = train_both(
    make_copier,
    keras.losses.BinaryCrossentropy(from_logits=True),
    train.images,
    train.images,
    (test.images, test.images),
    batch_size=128,
    epochs=2 if SMALL else 20,
)
plot_runs(runs)
judge("copy", runs)

# %% [markdown]
# Grey pixels cost something even where they are copied perfectly: cross-entropy of a target $x$ is never below
# $-x \log x - (1-x) \log(1-x)$. The part of the loss above that floor is what training can remove.

# %%
grey = np.clip(train.images.astype("float64"), 1e-12, 1 - 1e-12)
floor = float(-(grey * np.log(grey) + (1 - grey) * np.log1p(-grey)).mean())
print(f"A perfect copy would have the loss {floor:.4f}. Above it:")
for name, run in runs.items():
    print(f"  {name:6} {run['loss'][-1] - floor:.4f}")

# %%
shown = test.images[:10]
show_rows(
    {
        "held out": shown,
        **{name: 1 / (1 + np.exp(-output(model, shown))) for name, model in models.items()},
    }
)

# %% [markdown]
# ## 2. Remove noise
#
# Now the input is a digit with noise and the target the digit without. Strided convolutions halve the image twice;
# the way back doubles it by repeating pixels (`UpSampling2D`) and convolves again, so that every weight of the network
# sits in a `KPSVDConv2D`. (`Conv2DTranspose` would work too: layers that have no twin in keras_kpsvd train by gradient
# descent with momentum, in the same `fit`.)

# %%
rng = np.random.default_rng(0)


def with_noise(images):
    return np.clip(images + 0.4 * rng.standard_normal(images.shape), 0, 1).astype("float32")


count = 512 if SMALL else 2000
clean = train.images[:count].reshape(-1, 28, 28, 1)
clean_test = test.images[:500].reshape(-1, 28, 28, 1)
noisy, noisy_test = with_noise(clean), with_noise(clean_test)


def make_denoiser(dense, convolution):
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            convolution(16, 3, strides=2, padding="same", activation="relu"),
            convolution(8, 3, strides=2, padding="same", activation="relu"),
            convolution(8, 3, padding="same", activation="relu"),
            keras.layers.UpSampling2D(),
            convolution(16, 3, padding="same", activation="relu"),
            keras.layers.UpSampling2D(),
            convolution(1, 3, padding="same", activation="sigmoid"),
        ]
    )


models, runs = train_both(
    make_denoiser,
    "binary_crossentropy",
    noisy,
    clean,
    (noisy_test, clean_test),
    batch_size=128,
    epochs=2 if SMALL else 15,
)
plot_runs(runs)
judge("denoise", runs)

# %%
shown = noisy_test[:10]
show_rows(
    {
        "noisy": shown,
        **{name: output(model, shown) for name, model in models.items()},
        "clean": clean_test[:10],
    }
)

# %% [markdown]
# ## 3. Find what does not belong
#
# This network sees zeros only. It learns to copy zeros, and has no reason to copy anything else: an image that comes
# back badly is probably no zero. The loss is the mean squared error, and so is the score of an image.

# %%
NORMAL = 0
normal = train.images[train.labels == NORMAL]
# Two thirds of them train the network, the others set the threshold.
cut = 2 * len(normal) // 3
normal_train, normal_threshold = normal[:cut], normal[cut:]
is_other = test.labels != NORMAL
print(
    f"{len(normal_train)} zeros to train on, {len(normal_threshold)} for the threshold; "
    f"held out: {np.sum(~is_other)} zeros and {np.sum(is_other)} other digits"
)


def make_detector(dense, convolution):
    return keras.Sequential(
        [
            keras.Input((784,)),
            dense(64, activation="relu"),
            dense(8),
            dense(64, activation="relu"),
            dense(784),
        ]
    )


models, runs = train_both(
    make_detector,
    "mean_squared_error",
    normal_train,
    normal_train,
    (normal_threshold, normal_threshold),
    batch_size=64,
    epochs=3 if SMALL else 40,
)
plot_runs(runs)
judge("detect", runs)


# %% [markdown]
# The threshold is set without a look at any other digit: at the error that 95 % of the zeros kept aside stay below.


# %%
def errors(model, images):
    return np.square(output(model, images) - images).mean(axis=1)


figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
for axis, (name, model) in zip(axes, models.items(), strict=True):
    scores = errors(model, test.images)
    threshold = np.quantile(errors(model, normal_threshold), 0.95)
    found = scores > threshold
    below = (scores[~is_other, None] < scores[None, is_other]).mean()
    results = {
        "accuracy": (found == is_other).mean(),
        "others found": found[is_other].mean(),
        "false alarms": found[~is_other].mean(),
        "pairs in order": below,
    }
    comparison[f"detect, {name}"].update({key: float(value) for key, value in results.items()})
    bins = np.linspace(0, np.quantile(scores, 0.999), 40)
    axis.hist(scores[~is_other], bins, density=True, alpha=0.7, color="#0072b2", label="zeros")
    axis.hist(scores[is_other], bins, density=True, alpha=0.7, color="#cc79a7", label="other digits")
    axis.axvline(threshold, color="black", linestyle="--", label="threshold")
    axis.set(title=name, xlabel="mean squared error of the copy")
axes[0].legend(frameon=False)
axes[0].set_ylabel("density")
plt.show()

# %% [markdown]
# "Pairs in order" is the share of all pairs of a zero and another digit in which the zero has the smaller error: the
# area under the ROC curve, which no threshold enters.

# %%
print(f"{'':16}" + "".join(f"{name:>10}" for name in models))
for quantity in results:
    print(f"{quantity:16}" + "".join(f"{comparison[f'detect, {name}'][quantity]:10.1%}" for name in models))

# %%
worst = np.argsort(-errors(models["KPSVD"], test.images) * is_other)[:5]
closest = np.argsort(errors(models["KPSVD"], test.images) + 1e3 * ~is_other)[:5]
shown = np.concatenate([test.images[worst], test.images[closest]])
show_rows({"other digits": shown, "KPSVD's copies": np.clip(output(models["KPSVD"], shown), 0, 1)})

# %% [markdown]
# Left the five that were copied worst, right the five that were copied best. All the network can draw with is what it
# has learned from zeros.
#
# ## All numbers

# %%
quantities = ["training loss", "held-out loss", "first epoch (s)", "later epochs (s)"]
print(f"{'':16}" + "".join(f"{quantity:>18}" for quantity in quantities))
for row, numbers in comparison.items():
    print(f"{row:16}" + "".join(f"{numbers[quantity]:18.4f}" for quantity in quantities))
lower = [
    task
    for task in ("copy", "denoise", "detect")
    if comparison[f"{task}, KPSVD"]["training loss"] < comparison[f"{task}, Adam"]["training loss"]
]
print(f"\nKPSVD's training loss ended below Adam's in {len(lower)} of 3 tasks: {', '.join(lower) or 'none'}.")

# %% [markdown]
# How to read it:
#
# - Both optimizers ran with their defaults. Adam's rate of 0.001 is a cautious one: try `Adam(0.003)`. The README
#   compares with a tuned Adam on the deep autoencoders of the paper (`autoencoder.py` in this folder).
# - Compare the seconds, not only the epochs. An epoch of `KPSVD` costs more than one of Adam, and its
#   first step, which traces the curvature as well, most of all.
# - A lower training loss is a better copy of the training images. The dotted lines tell whether it is a better one of
#   unseen images, and the last table whether it is of use. A network that copies well may copy too much: the narrower
#   its code, the better a detector forgets what it was not trained on.
