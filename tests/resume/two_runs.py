"""Trains the named methods, each once for every given global seed, and prints `{method: [digest, …]}`.

    python -m tests.resume.two_runs SEED,SEED,… METHOD…

In a process of its own: determinism of TensorFlow's operations is global and cannot be switched off.
"""

import hashlib
import json
import sys

import keras
import tensorflow as tf

from keras_kpsvd import KPSVD, KPSVDDense
from tests.resume.runs import INTERVALS, data, everything


def digest(method, seed):
    """Of all variables after a stock `fit` with dropout, shuffling, drawn targets and a seed from the global one."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    hidden = [layers.Dense(6, "tanh", name="hidden"), layers.Dropout(0.3)]
    shared = [layers.Reshape((3, 2)), KPSVDDense(2, name="out"), layers.GlobalAveragePooling1D()]
    model = keras.Sequential([keras.Input((4,)), *hidden, *shared])
    model.compile(KPSVD(method=method, **INTERVALS), "mse")
    model.fit(*data(), batch_size=4, epochs=2, shuffle=True, verbose=0)
    digest = hashlib.sha256()
    for _, value in everything(model):
        digest.update(value.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    tf.config.experimental.enable_op_determinism()
    seeds, methods = [int(seed) for seed in sys.argv[1].split(",")], sys.argv[2:]
    print(json.dumps({method: [digest(method, seed) for seed in seeds] for method in methods}))
