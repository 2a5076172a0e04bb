"""How well the approximations fit: the paper's two errors, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_kpsvd.curvature.approximations import METHODS, approximate_fisher, check_method, exact_fisher
from keras_kpsvd.curvature.samples import block_samples
from keras_kpsvd.linalg import KroneckerSum, RearrangedFisher


class FisherErrors(NamedTuple):
    """The errors of one approximation of one layer's block.

    Attributes:
        error_1: `‖F − F̂‖_F / ‖F‖_F`.
        error_2: `‖λ(F) − λ(F̂)‖₂ / ‖λ(F)‖₂` with both spectra sorted; NaN for layers whose spectrum was not computed.
    """

    error_1: float
    error_2: float


def fisher_errors(
    model: keras.Model,
    x: Any,
    methods: Iterable[str] = METHODS,
    *,
    y: Any = None,
    fisher: str = "sampled",
    likelihood: str | Callable = "auto",
    seed: int | None = None,
    max_size: int = 2048,
) -> dict[str, dict[str, FisherErrors]]:
    """The paper's error 1 and error 2 (Koroko et al. 2023, §5.1) of each method on each instrumented layer of a model.

    Both compare with the Fisher block of the very samples that the approximation is made of, in float64. Error 1 needs
    no dense matrix and is known for layers of any size; error 2 takes the eigenvalues of two matrices of `d_in·d_out`
    rows.

    Args:
        model: a compiled model, as for `fisher_samples`.
        x: inputs.
        methods: any of the five.
        y: targets; given, the errors are those of the empirical Fisher at `y`.
        fisher: "sampled" or "exact", as for `fisher_samples`.
        likelihood: as in `KPSVD`.
        seed: for the drawn targets.
        max_size: the largest `d_in·d_out` for which error 2 is computed; NaN beyond.

    Returns:
        `{layer name: {method: FisherErrors}}`, each group of a grouped convolution under `layer name/block_i`. A layer
        whose block is zero (a dead one) has errors 0 where the approximation is zero too.

    Raises:
        ValueError: an unknown method, or whatever `fisher_samples` refuses.
    """
    methods = list(methods)
    for method in methods:
        check_method(method, "methods")
    samples = block_samples(model, x, y, seed, fisher=fisher, likelihood=likelihood)
    errors: dict[str, dict[str, FisherErrors]] = {}
    named = {
        name if len(blocks) == 1 else f"{name}/block_{index}": block
        for name, blocks in samples.items()
        for index, block in enumerate(blocks)
    }
    for name, (activations, gradients) in named.items():
        a, g = tf.cast(activations, tf.float64), tf.cast(gradients, tf.float64)
        operator = RearrangedFisher(a, g)
        small = a.shape[-1] * g.shape[-1] <= max_size
        spectrum = tf.linalg.eigvalsh(exact_fisher(a, g)) if small else None
        norm = math.sqrt(max(float(operator.frobenius_norm_squared()), 0.0))
        errors[name] = {}
        for method in methods:
            approximation = approximate_fisher(a, g, method)
            errors[name][method] = FisherErrors(
                _ratio(_distance(operator, approximation), norm), _spectral_error(spectrum, approximation)
            )
    return errors


def _distance(operator: RearrangedFisher, approximation: KroneckerSum) -> float:
    """`‖F − F̂‖_F`; the rearrangement is an isometry."""
    for a, g in approximation.terms:
        operator = operator.deflate(a, g)
    return math.sqrt(max(float(operator.frobenius_norm_squared()), 0.0))


def _spectral_error(spectrum: tf.Tensor | None, approximation: KroneckerSum) -> float:
    if spectrum is None:
        return math.nan
    other = tf.linalg.eigvalsh(approximation.to_dense())
    return _ratio(float(tf.norm(spectrum - other)), float(tf.norm(spectrum)))


def _ratio(error: float, norm: float) -> float:
    if norm > 0:
        return error / norm
    return 0.0 if error == 0 else math.inf
