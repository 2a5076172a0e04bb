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
# # Self-attention: reading digits row by row
#
# A handwritten digit is read here as a sequence of 28 rows of 28 pixels, by a small transformer encoder. You will see
#
# 1. a stock Keras model with `MultiHeadAttention`, `LayerNormalization` and residual connections,
# 2. `keras_kpsvd.instrument`, which makes a copy of it that `KPSVD` can train, the projections inside the attention
#    layers included,
# 3. which of its weights train by natural gradient and which do not,
# 4. both optimizers' curves against epochs and seconds, and what the attention looks at.
#
# `quickstart.ipynb` comes first. Nothing is downloaded; all of it takes about three minutes on two CPU cores.

# %%
import os
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import keras_kpsvd

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs
EPOCHS = 3 if SMALL else 12
WIDTH, HEADS, BLOCKS = 32, 4, 1 if SMALL else 2

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")

# %% [markdown]
# ## Digits as sequences

# %%
train = keras_kpsvd.datasets.load_mnist(512 if SMALL else 4000, split="train")
test = keras_kpsvd.datasets.load_mnist(256 if SMALL else 1000, split="test")
x_train, y_train = train.images.reshape(-1, 28, 28), train.labels
x_test, y_test = test.images.reshape(-1, 28, 28), test.labels
ROWS = x_train.shape[1]

print(f"Training: {len(x_train):,} images; {train.source}")
print(f"Held out: {len(x_test):,} images; {test.source}")

# %% [markdown]
# ## Positions
#
# Attention treats its inputs as a set: without a mark on each row, a digit and the same digit with its rows shuffled
# would be one and the same to it. The mark added here is fixed, sines and cosines of a few wavelengths, so that it has
# no weights to train.

# %%
wavelengths = np.geomspace(4, 8 * ROWS, WIDTH // 2)
angles = 2 * np.pi * np.arange(ROWS)[:, None] / wavelengths
positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype("float32")

figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
shown = axis.imshow(positions, cmap="RdBu", aspect="auto")
axis.set(xlabel="feature", ylabel="row of the image")
figure.colorbar(shown)
plt.show()

# %% [markdown]
# ## A stock model
#
# Each row becomes a vector of 32 features. In a block the rows first look at each other, then each one goes through a
# small network of its own; both are added to what was there before. The mean over the rows gives the logits of the ten
# digits.


# %%
def make_model(trainable_norms=True):
    keras.utils.set_random_seed(0)

    def normalised(h, name):
        norm = keras.layers.LayerNormalization(scale=trainable_norms, center=trainable_norms, name=name)
        return norm(h)

    rows = keras.Input((ROWS, x_train.shape[2]))
    h = keras.layers.Dense(WIDTH, name="rows")(rows) + positions
    for k in range(BLOCKS):
        seen = normalised(h, f"norm_{k}a")
        h = h + keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{k}")(seen, seen)
        seen = normalised(h, f"norm_{k}b")
        seen = keras.layers.Dense(2 * WIDTH, activation="relu", name=f"widen_{k}")(seen)
        h = h + keras.layers.Dense(WIDTH, name=f"narrow_{k}")(seen)
    h = normalised(h, "norm_last")
    h = keras.layers.GlobalAveragePooling1D(name="mean")(h)
    return keras.Model(rows, keras.layers.Dense(10, name="logits")(h))


stock = make_model()
stock.summary()

# %% [markdown]
# ## An instrumented copy
#
# Keras makes the query, key, value and output projections inside `MultiHeadAttention` itself: there is no argument that
# would let them be other layers. `instrument` copies a whole model, weights included, and swaps every layer that it
# knows, wherever it stands. The copy computes exactly what the original does.

# %%
instrumented = keras_kpsvd.instrument(stock)
difference = np.abs(instrumented.predict(x_test, verbose=0) - stock.predict(x_test, verbose=0)).max()
print(f"Largest difference of any output: {difference}")

# %% [markdown]
# What has no twin trains by gradient descent with momentum, at a fixed rate of 0.01: here the scales and offsets of
# `LayerNormalization`. (A trainable position embedding would, too; that is one reason for the fixed one above.) The
# optimizer says so itself when training starts. By number of weights:


# %%
def weights_by_way(model):
    """How many weights of each kind of layer train by natural gradient, and how many by gradient descent."""
    kinds = {}
    for layer in model.layers:
        if not layer.weights:
            continue
        curved = layer.__class__.__module__.startswith("keras_kpsvd")
        way = "natural gradient" if curved else "gradient descent"
        kinds.setdefault((way, layer.__class__.__name__), []).append(layer.count_params())
    return kinds


kinds = weights_by_way(instrumented)
total = instrumented.count_params()
for (way, kind), counts in kinds.items():
    print(f"{way:18}{kind:20}{len(counts):3} layers {sum(counts):8,} weights {sum(counts) / total:7.1%}")

# %% [markdown]
# ## Train
#
# Both models start from the same weights and see the same batches.


# %%
class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.began = time.perf_counter()
        self.seconds = []

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def train_model(model, optimizer):
    keras.utils.set_random_seed(0)
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
    return {**history.history, "seconds": clock.seconds}


runs = {"Adam": train_model(stock, keras.optimizers.Adam())}

# %% [markdown]
# Adam's default rate of 0.001 is a cautious one. So that the comparison does not rest on it, three times as much:

# %%
runs["Adam(0.003)"] = train_model(make_model(), keras.optimizers.Adam(0.003))

# %%
runs["KPSVD"] = train_model(instrumented, keras_kpsvd.KPSVD())

# %% [markdown]
# ## Compare

# %%
colours = {"Adam": "#444444", "Adam(0.003)": "#999999", "KPSVD": "#d55e00"}
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
axes[0, 0].legend(frameon=False)
axes[1, 0].set(xlabel="epochs", xlim=(0, None))
axes[1, 1].set(xlabel="seconds, tracing included", xlim=(0, None))
plt.show()


# %%
def summary(run):
    return {
        "training loss": run["loss"][-1],
        "held-out loss": run["val_loss"][-1],
        "held-out accuracy": run["val_accuracy"][-1],
        "first epoch (s)": run["seconds"][0],
        "later epochs (s)": float(np.median(np.diff(run["seconds"]))),
    }


comparison = {name: summary(run) for name, run in runs.items()}
for rival in ("Adam", "Adam(0.003)"):
    goal = runs[rival]["loss"][-1]
    reached = next((k for k, loss in enumerate(runs["KPSVD"]["loss"]) if loss <= goal), None)
    waited = runs[rival]["seconds"][-1]
    if reached is None:
        print(f"KPSVD did not reach the last training loss of {rival}, {goal:.4f}, in {EPOCHS} epochs.")
    else:
        print(
            f"KPSVD reached the last training loss of {rival}, {goal:.4f}, in epoch {reached + 1} of {EPOCHS}, "
            f"after {runs['KPSVD']['seconds'][reached]:.1f} s; {rival} took {waited:.1f} s."
        )
for quantity, higher_is_better in (("training loss", False), ("held-out loss", False), ("held-out accuracy", True)):
    ours, adams = (comparison[name][quantity] for name in ("KPSVD", "Adam"))
    verdict = "no other" if ours == adams else "better" if (ours > adams) == higher_is_better else "worse"
    other = comparison["Adam(0.003)"][quantity]
    print(
        f"{quantity.capitalize()} after epoch {EPOCHS}: KPSVD's is {verdict} than Adam's ({ours:.4f} against "
        f"{adams:.4f}; Adam(0.003): {other:.4f})."
    )

# %% [markdown]
# ## Do the normalisation's weights hold it back?
#
# They are few, but each of them acts on every row. How far has each optimizer moved them from where they began, scales
# at 1 and offsets at 0?

# %%
print(f"{'root mean square of':26}" + "".join(f"{name:>10}" for name in ("Adam", "KPSVD")))
moved = {}
for kind, origin in (("scale - 1", 1.0), ("offset", 0.0)):
    for name, model in (("Adam", stock), ("KPSVD", instrumented)):
        values = [
            layer.gamma if kind.startswith("scale") else layer.beta
            for layer in model.layers
            if isinstance(layer, keras.layers.LayerNormalization)
        ]
        flat = np.concatenate([keras.ops.convert_to_numpy(value).ravel() for value in values]) - origin
        moved[kind, name] = float(np.sqrt(np.mean(flat**2)))
    print(f"{kind:26}" + "".join(f"{moved[kind, name]:10.4f}" for name in ("Adam", "KPSVD")))

# %% [markdown]
# A normalisation's scale and offset stand right before linear layers here, which can do the same with their kernels and
# biases. Left out (`scale=False, center=False`), they cost the model no function that it could represent, and no
# weight is left that does not train by natural gradient. Does that help?

# %%
bare = keras_kpsvd.instrument(make_model(trainable_norms=False))
runs["KPSVD, bare norms"] = train_model(bare, keras_kpsvd.KPSVD())

# %%
comparison["KPSVD, bare norms"] = summary(runs["KPSVD, bare norms"])
without, with_them = (comparison[name]["training loss"] for name in ("KPSVD, bare norms", "KPSVD"))
print(f"Training loss after epoch {EPOCHS}: {with_them:.4f} with scales and offsets, {without:.4f} without.")
verdict = "held it back" if without < with_them else "did not hold it back"
print(
    f"Leaving them out changes it by {without / with_them - 1:+.0%}: trained by gradient descent they {verdict}, here."
)

# %% [markdown]
# ## Where it looks
#
# The scores of the last block, averaged over its heads: how much each row (vertical axis) takes from each other row
# (horizontal axis), for single held-out digits.

# %%
last = instrumented.get_layer(f"attention_{BLOCKS - 1}")
before = keras.Model(instrumented.input, instrumented.get_layer(f"norm_{BLOCKS - 1}a").output)
chosen = [int(np.flatnonzero(y_test == digit)[0]) for digit in range(6)]
seen = before(x_test[chosen])
_, scores = last(seen, seen, return_attention_scores=True)
scores = keras.ops.convert_to_numpy(scores).mean(axis=1)

figure, axes = plt.subplots(2, len(chosen), figsize=(10, 3.6), layout="constrained")
for column, k, score in zip(axes.T, chosen, scores, strict=True):
    column[0].imshow(x_test[k], cmap="gray_r")
    column[1].imshow(score, cmap="viridis")
    for axis in column:
        axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("digit")
axes[1, 0].set_ylabel("attention")
plt.show()

# %% [markdown]
# ## All numbers

# %%
print(f"{f'after epoch {EPOCHS}':18}" + "".join(f"{name:>20}" for name in comparison))
for quantity in comparison["Adam"]:
    print(f"{quantity:18}" + "".join(f"{numbers[quantity]:20.4f}" for numbers in comparison.values()))

# %% [markdown]
# How to read it:
#
# - One seed, one small network, two rates of Adam: repeat with your own before you conclude anything.
# - An example is 28 rows here, so each layer sees 28 activations and gradients of it. Curvature of layers that share
#   their weights among positions costs accordingly more, and so do the epochs, the first of all, which traces it.
# - A few thousand digits are soon learned by heart. What happens to the held-out loss after that is a matter of
#   regularisation, not of the optimizer's speed.
