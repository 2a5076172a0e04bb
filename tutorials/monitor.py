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
# # Watching the curvature of a run
#
# `CurvatureMonitor` is a Keras callback. It writes down, of each layer and as training goes on, how well the Fisher
# matrix is approximated, how strongly the preconditioner acts and what the step does. This tutorial trains a small
# autoencoder with it and looks at
#
# 1. what stands in `logs`, in the CSV file and in TensorBoard's,
# 2. the error of the approximation, and whether a second Kronecker term could lower it,
# 3. the eigenvalues that the preconditioner divides by, and the damping,
# 4. what the monitor costs.
#
# Nothing is downloaded; all of it takes about a minute on two CPU cores. `fisher.ipynb` says what the Fisher matrix
# and its approximations are.

# %%
import csv
import os
import tempfile
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_kpsvd
from keras_kpsvd.callbacks import CurvatureMonitor

SMALL = os.environ.get("KERAS_KPSVD_TUTORIAL_SIZE") == "small"  # a quick pass, to see that it all runs
EPOCHS = 4 if SMALL else 40

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}")

# %% [markdown]
# ## A run with a monitor
#
# 1,797 digits of 8 × 8 pixels from scikit-learn. `budget=None` observes every refresh, one in five updates: this run is
# short, and we want to see all of it. By default the monitor passes refreshes over while it has spent 2 % of the time.

# %%
x = (load_digits().data / 16).astype("float32")
folder = tempfile.TemporaryDirectory()
files = Path(folder.name)


def train(method, callbacks, epochs=EPOCHS):
    """An autoencoder, trained from the same weights each time."""
    keras.utils.set_random_seed(0)
    layers = [
        keras_kpsvd.KPSVDDense(32, activation="relu", name="encoder"),
        keras_kpsvd.KPSVDDense(8, name="code"),
        keras_kpsvd.KPSVDDense(32, activation="relu", name="decoder"),
        keras_kpsvd.KPSVDDense(64, name="pixels"),
    ]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras_kpsvd.KPSVD(method=method, seed=0), loss)
    return model, model.fit(x, x, batch_size=128, epochs=epochs, verbose=0, callbacks=callbacks)


monitor = CurvatureMonitor(csv=files / "kfac.csv", tensorboard=files / "logs", budget=None)
model, history = train("kfac", [monitor])
LAYERS = [layer.name for layer in model.layers]

# %% [markdown]
# At the end of each epoch the numbers of its last observed refresh are in `logs`, so that `History` has them, and any
# callback after the monitor. (`log_quantities=["error_1"]` keeps progress bars short.)

# %%
for name in ("loss", "code/error_1", "code/sigma_1", "code/sigma_2", "code/eigenvalue_max", "code/damping"):
    print(f"{name:20s}", *(f"{value:10.3g}" for value in history.history[name][:4]))

# %% [markdown]
# The CSV file has a line for each layer and observed refresh. A run that is resumed goes on with it.

# %%
with (files / "kfac.csv").open() as file:
    rows = list(csv.DictReader(file))
print(f"{len(rows)} lines; the first:")
for name, value in rows[0].items():
    print(f"  {name:16s} {value if name in ('layer', 'update') else format(float(value), '.4g')}")
print("for `tensorboard --logdir`:", *(path.name.split(".")[0] for path in (files / "logs").iterdir()))

# %% [markdown]
# ## How good is the approximation?
#
# `error_1` is $\|F - \hat F\| / \|F\|$ with the Fisher matrix $F$ of a refresh's own samples and the averaged factors
# $\hat F$ that the optimizer holds. It needs no matrix of the size of $F$. It is above the error that the method has on
# one batch, since averages of many batches are compared with a single one, which they do not know.
#
# `sigma_1` and `sigma_2` are the leading singular values of the rearranged Fisher matrix: where the second is a small
# part of the first, no second Kronecker term can gain much.

# %%
other = CurvatureMonitor(budget=None)
train("kfac_corrected", [other])


def of_layer(one, layer, quantity):
    """The updates at which a layer was observed, and what was seen there."""
    own = [record for record in one.records if record["layer"] == layer]
    return [record["update"] for record in own], np.array([record[quantity] for record in own])


def curves(axis, one, quantity, **style):
    for number, layer in enumerate(LAYERS):
        axis.plot(*of_layer(one, layer, quantity), color=f"C{number}", **{"label": layer, **style})


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
curves(left, monitor, "error_1")
curves(left, other, "error_1", linestyle="--", label=None)
left.set(title="error 1 (solid: kfac, dashed: kfac_corrected)", xlabel="updates", ylim=(0, None))
for number, layer in enumerate(LAYERS):
    updates, first = of_layer(monitor, layer, "sigma_1")
    right.plot(updates, of_layer(monitor, layer, "sigma_2")[1] / first, color=f"C{number}")
right.set(title="σ₂ / σ₁ (kfac)", xlabel="updates", ylim=(0, 1))
left.legend()
plt.show()

# %% [markdown]
# ## What does the preconditioner do?
#
# The gradient is divided by the eigenvalues of the damped approximation. Their range says how differently directions
# are treated: where both ends meet the damping, natural gradient is plain gradient descent. λ falls while the quadratic
# model is right, and where few examples make up the Fisher matrix: there its factors are damped too. The trusted part
# of a step is below 1 where the step was cut because the outputs would have moved far. The rate is what the fit makes
# of the direction: 1 where the approximation is right along it, less where it is small.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
curves(left, monitor, "eigenvalue_max")
curves(left, monitor, "eigenvalue_min", linestyle=":", label=None)
updates, damping = of_layer(monitor, LAYERS[0], "damping")
left.plot(updates, damping, color="black", label="λ")
left.set(title="largest (solid) and smallest (dotted) damped eigenvalue", xlabel="updates", yscale="log")
left.legend()
for quantity in ("rate", "momentum", "kl_scale"):
    right.plot(*of_layer(monitor, LAYERS[0], quantity), label=quantity)
right.set(title="the step", xlabel="updates")
right.legend()
plt.show()

# %% [markdown]
# ## What does it cost?
#
# The monitor keeps account of its time. Once with every refresh observed, once with the default budget; tracing, which
# takes most of so short a run, is part of the time of either.

# %%
frugal = CurvatureMonitor()
began = time.perf_counter()
train("kfac", [frugal])
seconds = time.perf_counter() - began
for name, one in (("all", monitor), ("2 %", frugal)):
    print(f"budget {name}: {len(one.records) // len(LAYERS)} refreshes observed, {1e3 * one.budget.seconds:.0f} ms")
print(f"refreshes themselves took {1e3 * np.median(of_layer(monitor, LAYERS[0], 'refresh_seconds')[1]):.1f} ms each")
same = [record["error_1"] for record in frugal.records[: len(LAYERS)]]
print("the same training:", np.allclose(same, [record["error_1"] for record in monitor.records[: len(LAYERS)]]))

# %% [markdown]
# ## The numbers

# %%
comparison = {
    layer: {
        "error 1, first refresh": of_layer(monitor, layer, "error_1")[1][0],
        "error 1, last refresh": of_layer(monitor, layer, "error_1")[1][-1],
        "of kfac_corrected": of_layer(other, layer, "error_1")[1][-1],
        "σ₂/σ₁, last refresh": of_layer(monitor, layer, "sigma_2")[1][-1] / of_layer(monitor, layer, "sigma_1")[1][-1],
    }
    for layer in LAYERS
}
print(f"{'layer':10s}" + "".join(f"{name:>26s}" for name in comparison[LAYERS[0]]))
for layer, numbers in comparison.items():
    print(f"{layer:10s}" + "".join(f"{value:26.3f}" for value in numbers.values()))

# %%
folder.cleanup()
