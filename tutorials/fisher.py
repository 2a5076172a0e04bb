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
# # What the Fisher approximations see
#
# Natural gradient multiplies the gradient by the inverse of the Fisher matrix, and no network of any size can afford
# that matrix. The methods of this package approximate it layer by layer, as one Kronecker product or a sum of two. On
# a network small enough to compute the matrix itself, this tutorial looks at
#
# 1. the Fisher matrix of one layer, and its five approximations,
# 2. the singular values that say how good an approximation can get,
# 3. the errors of all five methods, layer by layer, while the network trains,
# 4. eigenvalues: what is left of the spectrum.
#
# Nothing is downloaded; all of it takes about two minutes on two CPU cores. `quickstart.ipynb` shows how to train.

# %%
import os

import keras
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_kpsvd

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs
LOOKS = (0, 1, 3) if SMALL else (0, 1, 2, 3, 5, 8, 12, 20, 30, 45, 60)  # epochs after which to measure

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")

# %% [markdown]
# ## A small autoencoder
#
# 1,797 digits of 8 × 8 pixels from scikit-learn; 64 pixels go down to 8 numbers and back.

# %%
x = (load_digits().data / 16).astype("float32")
looked_at = x[: 128 if SMALL else 512]  # the examples that the Fisher matrices are made of

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras_kpsvd.KPSVDDense(16, activation="relu", name="encoder"),
        keras_kpsvd.KPSVDDense(8, name="code"),
        keras_kpsvd.KPSVDDense(16, activation="relu", name="decoder"),
        keras_kpsvd.KPSVDDense(64, name="pixels"),
    ]
)
model.compile(keras_kpsvd.KPSVD(), keras.losses.BinaryCrossentropy(from_logits=True))
model.summary()
LAYERS = [layer.name for layer in model.layers]

# %% [markdown]
# ## The Fisher matrix of one layer
#
# For one example let $a$ be the input of a layer, a 1 appended for the bias, and $g$ the gradient at its output, before
# the activation, for a target drawn from the network's own prediction. The gradient of the weights is $a g^\top$, and
# the layer's Fisher matrix is the mean of its outer products,
#
# $$F = \mathrm{E}\big[(a a^\top) \otimes (g g^\top)\big].$$
#
# `fisher_samples` gives $a$ and $g$ of every layer (with an axis between batch and features for layers that share
# their weights among positions; a dense layer has one), `exact_fisher` the matrix, `approximate_fisher` what a method
# makes of it:
#
# | method | approximation |
# |---|---|
# | `kfac` | $\mathrm{E}[a a^\top] \otimes \mathrm{E}[g g^\top]$: as if $a$ and $g$ knew nothing of each other |
# | `kpsvd` | the best single product $A \otimes G$ |
# | `deflation` | the best single product, and the best one for the rest |
# | `lanczos` | the best sum of two products, both at once |
# | `kfac_corrected` | that of `kfac`, and the best product for the rest |

# %%
METHODS = ("kfac", "kpsvd", "deflation", "lanczos", "kfac_corrected")


def dense_fisher(layer):
    """The layer's F, and its shape as (d_in, d_out)."""
    activations, gradients = keras_kpsvd.fisher_samples(model, looked_at, seed=0)[layer]
    fisher = keras_kpsvd.exact_fisher(tf.cast(activations, tf.float64), tf.cast(gradients, tf.float64)).numpy()
    return fisher, (activations.shape[-1], gradients.shape[-1])


def approximations(layer):
    activations, gradients = keras_kpsvd.fisher_samples(model, looked_at, seed=0)[layer]
    a, g = tf.cast(activations, tf.float64), tf.cast(gradients, tf.float64)
    return {method: keras_kpsvd.approximate_fisher(a, g, method).to_dense().numpy() for method in METHODS}


def show_matrices(layer):
    exact, (d_in, d_out) = dense_fisher(layer)
    limit = np.abs(exact).max()
    norm = matplotlib.colors.SymLogNorm(limit / 100, vmin=-limit, vmax=limit)
    figure, axes = plt.subplots(2, len(METHODS) + 1, figsize=(13, 5), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=np.arange(1, d_in) * d_out - 0.5, yticks=np.arange(1, d_in) * d_out - 0.5)
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.grid(color="#cccccc", linewidth=0.5)
    axes[0, 0].imshow(exact, cmap="RdBu_r", norm=norm)
    axes[0, 0].set_title("F")
    axes[0, 1].set_ylabel("approximation")
    axes[1, 0].set_axis_off()
    for column, (name, matrix) in zip(axes.T[1:], approximations(layer).items(), strict=True):
        column[0].imshow(matrix, cmap="RdBu_r", norm=norm)
        column[1].imshow(exact - matrix, cmap="RdBu_r", norm=norm)
        column[0].set_title(name)
        column[1].set_title(f"error {np.linalg.norm(exact - matrix) / np.linalg.norm(exact):.3f}", fontsize=10)
    axes[1, 1].set_ylabel("what it leaves of F")
    figure.suptitle(f"layer {layer!r}: {d_in} × {d_out} weights, bias included (colours logarithmic)")
    plt.show()


show_matrices("decoder")

# %% [markdown]
# That was before any training. Each picture has a small block for each pair of inputs of the layer, between the grey
# lines, and in it one entry for each pair of outputs. A single Kronecker product repeats one and the same block, in
# different strengths; what it leaves of F is what a second term can take from.
#
# ## How good can it get?
#
# Sort the entries of F anew, so that each of those blocks becomes a row: $R(F)$, with a row for each pair of inputs and
# a column for each pair of outputs. A Kronecker product becomes a matrix of rank one, and the size of all entries
# together stays what it was. So the best sum of $k$ products is the best approximation of $R(F)$ of rank $k$, and the
# singular values tell its error before it is computed (Van Loan & Pitsianis 1993):
#
# $$\frac{\lVert F - \hat F_k \rVert}{\lVert F \rVert} =
# \sqrt{\frac{\sigma_{k+1}^2 + \sigma_{k+2}^2 + \cdots}{\sigma_1^2 + \sigma_2^2 + \cdots}}.$$
#
# In training nothing of this size is ever formed; for these layers NumPy can.


# %%
def rearranged(fisher, shape):
    d_in, d_out = shape
    return fisher.reshape(d_in, d_out, d_in, d_out).transpose(0, 2, 1, 3).reshape(d_in**2, d_out**2)


def singular_values(layer):
    return np.linalg.svd(rearranged(*dense_fisher(layer)), compute_uv=False)


def best_error(values, terms):
    return np.sqrt(np.square(values[terms:]).sum() / np.square(values).sum())


fisher, shape = dense_fisher("decoder")
print(f"F: {fisher.shape}, norm {np.linalg.norm(fisher):.6f}")
print(f"R(F): {rearranged(fisher, shape).shape}, norm {np.linalg.norm(rearranged(fisher, shape)):.6f}")

# %% [markdown]
# `fisher_errors` measures what the methods reach, by a route of its own that forms no such matrix. It has to agree.

# %%
values = singular_values("decoder")
measured = keras_kpsvd.fisher_errors(model, looked_at, seed=0)["decoder"]
print("From the singular values, one term and two:", *(f"{best_error(values, k):.6f}" for k in (1, 2)))
for method, errors in measured.items():
    print(f"  {method:16} {errors.error_1:.6f}")

# %% [markdown]
# ## While the network trains
#
# A callback looks after some epochs. All pictures below are of the same examples and the same random numbers for
# drawing targets; what changes is the network.


# %%
class Look(keras.callbacks.Callback):
    def __init__(self, epochs):
        super().__init__()
        self.epochs, self.errors, self.singular_values = epochs, [], []

    def look(self):
        self.errors.append(keras_kpsvd.fisher_errors(self.model, looked_at, METHODS, seed=0))
        self.singular_values.append({layer: singular_values(layer) for layer in LAYERS})

    def on_train_begin(self, logs=None):
        self.look()

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            self.look()


before = {layer: singular_values(layer) for layer in LAYERS}
look = Look(LOOKS)
history = model.fit(x, x, batch_size=128, epochs=LOOKS[-1], callbacks=[look], verbose=0)
print(
    f"Training loss: {history.history['loss'][0]:.4f} in the first epoch, "
    f"{history.history['loss'][-1]:.4f} in the last."
)

# %%
STYLES = {
    "kfac": {"color": "#444444", "linestyle": "-"},
    "kpsvd": {"color": "#0072b2", "linestyle": "-"},
    "deflation": {"color": "#009e73", "linestyle": "-", "linewidth": 3, "alpha": 0.5},
    "lanczos": {"color": "#009e73", "linestyle": ":"},
    "kfac_corrected": {"color": "#d55e00", "linestyle": "--"},
}


def plot_errors(which, label):
    figure, axes = plt.subplots(1, len(LAYERS), figsize=(12, 3.4), sharey=True, layout="constrained")
    for axis, layer in zip(axes, LAYERS, strict=True):
        for method, style in STYLES.items():
            axis.plot(LOOKS, [getattr(seen[layer][method], which) for seen in look.errors], label=method, **style)
        axis.set(title=layer, xlabel="epochs")
        axis.grid(color="#e6e6e6")
    axes[0].set(ylabel=label, ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    plt.show()


plot_errors("error_1", "error 1: ‖F − F̂‖ / ‖F‖")

# %% [markdown]
# What is certain beforehand: no single product lies below `kpsvd`, no sum of two below `deflation` and `lanczos`, which
# therefore draw the same line (dots on a band), and no correction makes `kfac` worse. All else is a measurement.


# %%
def over_looks(method, layer, which="error_1"):
    return np.array([getattr(seen[layer][method], which) for seen in look.errors])


print("Error 1, mean over the looks\n")
print(f"{'':16}" + "".join(f"{layer:>10}" for layer in LAYERS))
for method in METHODS:
    print(f"{method:16}" + "".join(f"{over_looks(method, layer).mean():10.3f}" for layer in LAYERS))
print()
apart = max(np.abs(over_looks("deflation", layer) - over_looks("lanczos", layer)).max() for layer in LAYERS)
print(f"Largest difference between deflation and lanczos: {apart:.1e}")
for layer in LAYERS:
    kfac, one, corrected, two = (
        over_looks(method, layer) for method in ("kfac", "kpsvd", "kfac_corrected", "deflation")
    )
    print(
        f"{layer:8} kpsvd leaves {np.mean(one / kfac):4.0%} of kfac's error, "
        f"the best two terms {np.mean(two / kfac):4.0%};"
        f" kfac_corrected comes within {np.max(corrected / two) - 1:.1%} of these at all looks."
    )

# %% [markdown]
# ## The wrong direction, or only the wrong length?
#
# Where activations are large together with gradients, the mean of products is more than the product of means, and
# `kfac` is too small. An error of mere length matters little: a learning rate makes up for it. Multiplied by the best
# possible number, `kfac` has the error $\sqrt{1 - \cos^2}$, with the cosine of the angle between it and F.

# %%
print("After training\n")
print(f"{'':10}{'length':>10}{'error 1':>10}{'at best length':>16}{'kpsvd':>10}")
for layer in LAYERS:
    exact, _ = dense_fisher(layer)
    kfac = approximations(layer)["kfac"]
    length = np.linalg.norm(kfac) / np.linalg.norm(exact)
    cosine = np.vdot(kfac, exact) / np.linalg.norm(kfac) / np.linalg.norm(exact)
    last = look.errors[-1][layer]
    turned = np.sqrt(1 - cosine**2)
    print(f"{layer:10}{length:10.2f}{last['kfac'].error_1:10.3f}{turned:16.3f}{last['kpsvd'].error_1:10.3f}")

# %% [markdown]
# From the first of the errors to the second is what a better length gains, from the second to the third what a better
# direction does.
#
# ## The singular values
#
# Before and after training. A steep first step means that one product is enough; what follows it is spread over many
# terms, of which the two-term methods take one.

# %%
after = look.singular_values[-1]
figure, axes = plt.subplots(1, len(LAYERS), figsize=(12, 3.2), sharey=True, layout="constrained")
for axis, layer in zip(axes, LAYERS, strict=True):
    for name, values, colour in (("before", before[layer], "#999999"), ("after", after[layer], "#d55e00")):
        axis.semilogy(range(1, 31), values[:30] / values[0], ".-", color=colour, label=f"{name} training")
    axis.set(title=layer, xlabel="index", ylim=(1e-4, 2))
    axis.grid(color="#e6e6e6")
axes[0].set_ylabel("singular value / first")
axes[0].legend(frameon=False)
plt.show()

# %%
figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
for layer, colour in zip(LAYERS, ("#0072b2", "#009e73", "#d55e00", "#cc79a7"), strict=True):
    axis.plot(LOOKS, [s[layer][0] / s[layer][1] for s in look.singular_values], ".-", color=colour, label=layer)
axis.set(xlabel="epochs", ylabel="σ₁ / σ₂", ylim=(0, None))
axis.grid(color="#e6e6e6")
axis.legend(frameon=False)
plt.show()

# %%
print(f"{'':10}{'σ₁/σ₂ before':>14}{'after':>10}{'error left by':>18}{'1 term':>8}{'2 terms':>9}{'5 terms':>9}")
for layer in LAYERS:
    ratio_before, ratio_after = (s[layer][0] / s[layer][1] for s in (before, after))
    left = "".join(f"{best_error(after[layer], k):{w}.3f}" for k, w in ((1, 8), (2, 9), (5, 9)))
    print(f"{layer:10}{ratio_before:14.2f}{ratio_after:10.2f}{'':18}{left}")

# %% [markdown]
# The larger the ratio, the less there is for the second term to do. It is also what iterative solvers live on: where
# it is near 1, power iterations hardly tell the two terms apart.
#
# ## Eigenvalues
#
# What a preconditioner divides by are the eigenvalues. The paper's error 2 compares the sorted spectra,
# $\lVert \lambda(F) - \lambda(\hat F) \rVert / \lVert \lambda(F) \rVert$; it is blind to eigenvectors.

# %%
plot_errors("error_2", "error 2, of the spectra")

# %%
spectra = {"F": dense_fisher("decoder")[0], **approximations("decoder")}
spectra = {name: np.linalg.eigvalsh(matrix)[::-1] for name, matrix in spectra.items()}

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, values in spectra.items():
    style = STYLES.get(name, {"color": "black", "linewidth": 6, "alpha": 0.2})
    axis.semilogy(
        np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan) / spectra["F"][0], label=name, **style
    )
axis.set(xlabel="index", ylabel="eigenvalue / largest of F", ylim=(1e-6, 2), title="layer 'decoder', after training")
axis.grid(color="#e6e6e6")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The logarithm leaves out what is zero or negative. F may have zeros: a ReLU that no example turns on has no gradient.
# It has no negative eigenvalue, nor has a product of two matrices of that kind. But a second term is a correction with
# a sign, and the sum may have some: the table counts them. So the closest matrix need not be one to divide by. Training
# takes a second term with symmetric factors, adds damping, and divides by the second term's part in absolute value, so
# that a step always goes downhill.

# %%
print("Layer 'decoder', after training\n")
print(f"{'':16}{'error 1':>10}{'error 2':>10}{'smallest / largest':>20}{'negative':>10}")
comparison = {}
for name, values in spectra.items():
    tolerance = 1e-12 * values[0]
    negative = int(np.sum(values < -tolerance))
    numbers = {"smallest / largest": float(values[-1] / values[0]), "negative": negative}
    if name == "F":
        print(f"{name:16}{'':20}{numbers['smallest / largest']:20.1e}{negative:10}")
        continue
    last = look.errors[-1]["decoder"][name]
    comparison[name] = {"error 1": last.error_1, "error 2": last.error_2, **numbers}
    print(f"{name:16}{last.error_1:10.3f}{last.error_2:10.3f}{values[-1] / values[0]:20.1e}{negative:10}")

# %% [markdown]
# The same layer as in the first picture, now trained:

# %%
show_matrices("decoder")

# %% [markdown]
# ## What it says
#
# Put together from the numbers above:

# %%
for layer in LAYERS:
    first, last = look.errors[0][layer], look.errors[-1][layer]
    worse = [method for method in METHODS if last[method].error_1 > first[method].error_1]
    best_2 = min(METHODS, key=lambda method: last[method].error_2)
    print(
        f"{layer}: kfac's error 1 went from {first['kfac'].error_1:.2f} to {last['kfac'].error_1:.2f}, "
        f"kpsvd's from {first['kpsvd'].error_1:.2f} to {last['kpsvd'].error_1:.2f}, "
        f"the best two terms' from {first['deflation'].error_1:.2f} to {last['deflation'].error_1:.2f}."
    )
    print(
        f"  Larger at the end than at the start: {', '.join(worse) or 'none'}. "
        f"Closest spectrum at the end: {best_2}, error 2 {last[best_2].error_2:.2f}."
    )
ends = [look.errors[-1][layer] for layer in LAYERS]
gain = np.mean([1 - end["kpsvd"].error_1 / end["kfac"].error_1 for end in ends])
more = np.mean([1 - end["deflation"].error_1 / end["kpsvd"].error_1 for end in ends])
print(
    f"\nOn average over the layers at the end, the best product has {gain:.0%} less error than kfac's, "
    f"and a second term takes off another {more:.0%}."
)

# %% [markdown]
# Mind the following:
#
# - These are matrices of a few hundred examples with one drawn target each. The fewer they are, the more of a large
#   layer's F is the noise of the draw, which no two products follow. `fisher_errors(..., fisher="exact")` takes the
#   expectation over targets instead, at the price of one row for each example and output.
# - A smaller error is not yet faster training. Damping, added to every method alike, hides what is smaller than itself,
#   and a rate found in every step makes up for a wrong length. What counts in the end are the curves of
#   `autoencoders.ipynb` and the table in the README.
