"""One step of `KPSVD` in NumPy, for any gradient and any Hessian by the outputs of `reference.forward`'s network."""

import numpy as np

from tests import reference

DAMPING = 2.0**-7
# The step in its plainest form: one rate, no momentum, no bound, no draws.
PLAIN = {
    "method": "kfac",
    "learning_rate": 0.25,
    "momentum": 0.0,
    "damping": DAMPING,
    "kl_clip": None,
    "fisher": "exact",
}
EVERY_STEP = {"curvature_interval": 1, "inverse_interval": 1, "factor_decay": 0.0}


def solved(samples, gradients, damping=DAMPING):
    """Each gradient preconditioned with its layer's damped KFAC block."""
    return [
        reference.rule_solve([reference.kfac_factors(*sample)], gradient, damping)
        for sample, gradient in zip(samples, gradients, strict=True)
    ]


def squared_error_directions(weights, x, y):
    """The preconditioned gradients of the mean squared error."""
    samples = reference.squared_error_samples(weights, x)
    return solved(samples, reference.squared_error_gradients(weights, x, y))


def moved(weights, directions, rate=0.25):
    """One step."""
    return [w - rate * d for w, d in zip(weights, directions, strict=True)]


def gradients_at(weights, x, slopes):
    """Gradient by each weight matrix from those by the outputs, `[N, outputs]`, the mean over examples in them."""
    inputs, _ = reference.forward(weights, x)
    jacobians = reference.output_jacobians(weights, x)
    return [np.einsum("ni,nco,nc->io", a, j, slopes) for a, j in zip(inputs, jacobians, strict=True)]


def samples_at(weights, x, roots):
    """`(ā, g)` of each layer; example `n` has the Hessian `Σ_k r_nk r_nkᵀ` by its outputs, `roots [N, k, outputs]`."""
    inputs, _ = reference.forward(weights, x)
    count = roots.shape[1]
    return [
        (
            np.repeat(a, count, axis=0),
            np.sqrt(count) * np.einsum("nkc,nco->nko", roots, j).reshape(-1, j.shape[-1]),
        )
        for a, j in zip(inputs, reference.output_jacobians(weights, x), strict=True)
    ]


def softmax(logits):
    """Over the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def cross_entropy(logits, classes, weights):
    """Slopes and roots of the Hessian by the logits of the weighted categorical cross-entropy."""
    p = softmax(logits)
    unit = np.eye(logits.shape[1])
    slopes = weights[:, None] * (p - unit[classes]) / len(logits)
    roots = np.sqrt(weights[:, None] * p)[..., None] * (p[:, None, :] - unit)
    return slopes, roots


def squared_error(outputs, y, weights):
    """The same of the weighted mean squared error."""
    width = outputs.shape[1]
    slopes = weights[:, None] * 2 * (outputs - y) / outputs.size
    roots = np.sqrt(weights * 2 / width)[:, None, None] * np.eye(width)
    return slopes, roots


def assert_steps(actual, expected, start, tolerance=1e-6):
    """Errors measured against the step, not against the weights."""
    for now, wanted, before in zip(actual, expected, start, strict=True):
        step = np.linalg.norm(wanted - before)
        assert step > 0
        assert np.linalg.norm(now - wanted) <= tolerance * step
