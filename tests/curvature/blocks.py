"""Blocks of curvature that tests make, refresh and invert without an optimizer."""

import keras
import numpy as np
import tensorflow as tf

from keras_kpsvd.curvature.options import CurvatureOptions
from keras_kpsvd.curvature.reduction import BatchCurvature
from keras_kpsvd.curvature.state import BlockCurvature

D_IN, D_OUT, DECAY = 4, 3, 0.75


def add_variable(shape, dtype, name, initializer):
    """As an optimizer's."""
    initial = np.eye(*shape) if initializer == "identity" else np.full(shape, float(initializer == "ones"))
    return keras.Variable(initial.astype(dtype), name=name)


def make_block(
    method, rule="sqrt", indefinite="absolute", shape=(D_IN, D_OUT), eigenvalues="kronecker", dtype="float64"
):
    options = CurvatureOptions(method, rule, DECAY, indefinite, eigenvalues)
    return BlockCurvature("block", shape, dtype, options, add_variable)


def dependent_samples(seed=0, scale=1.0, shared=1, rows=12):
    """Dependent activations and gradients, so that no one-term sum is exact."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, shared, D_IN))
    gradients = np.tanh(activations @ rng.normal(size=(D_IN, D_OUT))) * activations[..., :1] * scale
    return tf.constant(activations), tf.constant(gradients)


def refresh(block, samples, *arguments):
    """With `(activations, gradients)` of a block, or what `refresh` of a block or a layer takes; whether it is good."""
    batch = BatchCurvature(*map(tf.convert_to_tensor, samples)) if type(samples) is tuple else samples
    values, good = block.refresh(batch, *arguments)
    for variable, value in zip(block.refresh_targets, values, strict=True):
        variable.assign(value)
    return bool(good)


def invert(block, damping=0.01, *arguments):
    """Whether that is good."""
    values, good = block.invert(tf.constant(damping, tf.float64), *arguments)
    for variable, value in zip(block.preconditioner, values, strict=True):
        variable.assign(value)
    return bool(good)


def factors(block):
    return [(a.numpy(), g.numpy()) for a, g in block.factors]
