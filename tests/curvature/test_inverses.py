"""Preconditioners of Kronecker terms as they are: whole, truncated and corrected, against dense float64 solves."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.curvature import inverses
from keras_kpsvd.curvature.approximations import METHODS
from keras_kpsvd.linalg import decompositions
from keras_kpsvd.tracing import graph_function
from tests import reference
from tests.curvature.blocks import D_IN, D_OUT, dependent_samples, factors, invert, make_block, refresh


@pytest.mark.parametrize(
    ("method", "rule", "indefinite"),
    [
        ("kfac", "sqrt", "absolute"),
        ("kpsvd", "factor", "absolute"),
        ("deflation", "factor", "reflect"),
        ("lanczos", "sqrt", "absolute"),
        ("kfac_corrected", "sqrt", "reflect"),
    ],
)
def test_preconditioning_is_the_dense_solve(method, rule, indefinite):
    gradient = np.random.default_rng(9).normal(size=(D_IN, D_OUT))
    block = make_block(method, rule, indefinite)
    for seed in range(2):
        refresh(block, dependent_samples(seed))
    assert invert(block)
    expected = reference.rule_solve(factors(block), gradient, 0.01, rule, indefinite)
    actual = block.precondition(tf.constant(gradient)).numpy()
    assert np.linalg.norm(actual - expected) < 1e-6 * np.linalg.norm(expected)


def test_without_a_refresh_the_preconditioner_is_the_identity():
    for method in METHODS:
        block = make_block(method)
        assert invert(block)
        gradient = np.arange(D_IN * D_OUT, dtype=float).reshape(D_IN, D_OUT)
        np.testing.assert_allclose(block.precondition(tf.constant(gradient)), gradient, rtol=1e-12)


def _large(seed, rows):
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, 1, 200)) * np.exp(-np.arange(200) / 20.0)
    gradients = np.tanh(activations[..., :140] @ np.diag(np.linspace(1, 5, 140)))
    return tf.constant(activations), tf.constant(gradients)


def _truncated(factor):
    values, vectors = np.linalg.eigh(factor)
    tail = values[: -inverses.RANK].mean()
    return (vectors * np.where(np.arange(len(values)) < len(values) - inverses.RANK, tail, values)) @ vectors.T


@pytest.mark.parametrize("rows", [40, 600])
def test_large_factors_are_inverted_by_their_leading_eigenpairs(rows):
    """Exactly where the batch has a lower rank, else with the mean of the other eigenvalues for each of them."""
    block = make_block("kfac", shape=(200, 140))
    refresh(block, _large(0, rows))
    for _ in range(30):
        assert invert(block)
    assert not any(variable.shape == (200, 200) for variable in block.preconditioner)
    gradient = np.random.default_rng(9).normal(size=(200, 140))
    a, g = factors(block)[0]
    stand_ins = (a, g) if rows == 40 else (_truncated(a), _truncated(g))
    damping = reference.factor_damping(a, g, 0.01, "sqrt")
    left, right = (np.linalg.inv(f + lam * np.eye(len(f))) for f, lam in zip(stand_ins, damping, strict=True))
    found, expected = block.precondition(tf.constant(gradient)).numpy(), left @ gradient @ right
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    if rows > 40:
        whole = [np.linalg.inv(f + lam * np.eye(len(f))) for f, lam in zip((a, g), damping, strict=True)]
        assert np.linalg.norm(found - whole[0] @ gradient @ whole[1]) > 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_large_blocks_of_a_low_rank_are_solved_as_if_whole(method):
    """Both terms, whose factors have fewer eigenvalues that are not zero than pairs are kept."""
    block, samples = make_block(method, shape=(200, 140)), _large(0, 40)
    refresh(block, samples)
    for _ in range(30):
        assert invert(block)
    (a, g), *second = factors(block)
    activations, gradients = (one.numpy()[:, 0] for one in samples)
    gradient = activations.T @ (np.random.default_rng(9).normal(size=(40, 1)) * gradients)
    found = block.precondition(tf.constant(gradient)).numpy()
    damping = reference.factor_damping(a, g, 0.01, "sqrt")
    damped = [factor + lam * np.eye(len(factor)) for factor, lam in zip((a, g), damping, strict=True)]
    roots = [np.linalg.inv(np.linalg.cholesky(one)) for one in damped]
    one_term = expected = np.linalg.solve(damped[0], gradient) @ np.linalg.inv(damped[1])
    if second:  # In the whole bases that both terms share.
        spectra = [np.linalg.eigh(root @ other @ root.T) for root, other in zip(roots, second[0], strict=True)]
        left, right = (root.T @ vectors for root, (_, vectors) in zip(roots, spectra, strict=True))
        divisor = 1 + np.abs(np.outer(spectra[0][0], spectra[1][0]))
        expected = left @ ((left.T @ gradient @ right) / divisor) @ right.T
        assert np.linalg.norm(found - one_term) > 0.01 * np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("method", "eigenvalues"),
    [*((method, "kronecker") for method in METHODS), ("kfac", "corrected"), ("kpsvd", "corrected")],
)
def test_no_large_factor_is_decomposed_whole(method, eigenvalues, monkeypatch):
    sizes, sound = [], decompositions._eigh
    monkeypatch.setattr(decompositions, "_eigh", lambda matrix: sizes.append(matrix.shape[-1]) or sound(matrix))
    block = make_block(method, shape=(200, 140), eigenvalues=eigenvalues)
    for seed in range(2):
        assert refresh(block, _large(seed, 40))
        assert invert(block)
    assert sizes
    assert max(sizes) <= inverses.RANK + 8  # Subspaces are eight columns wider than what is kept of them.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kfac", "kfac_corrected"])
@pytest.mark.parametrize("part", ["basis", "weights", "shift"])
def test_a_wrong_truncated_inverse_is_refused(method, part, monkeypatch):
    block = make_block(method, shape=(200, 140))
    refresh(block, _large(0, 60))
    assert invert(block)
    before = [variable.numpy() for variable in block.preconditioner]
    name = "invert_one_term" if method == "kfac" else "one_term_and_correction"
    sound = getattr(inverses, name)

    def wrong(*arguments):
        inverse, *others = sound(*arguments)
        broken = {"basis": inverse.basis * 1.5, "weights": inverse.weights * 0.2, "shift": -inverse.shift}
        return inverse._replace(**{part: broken[part]}), *others

    monkeypatch.setattr(inverses, name, wrong)
    graph_function.cache_clear()
    try:
        refresh(block, _large(1, 60))
        assert not invert(block)
    finally:
        graph_function.cache_clear()
    for variable, old in zip(block.preconditioner, before, strict=True):
        np.testing.assert_array_equal(variable, old)
