"""Predictive distributions against NumPy densities, differentiated numerically and summed over all targets."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from keras_kpsvd.likelihoods import Head, exact_cotangents, fisher_inner, sampled_cotangent, targets

BATCH, WIDTH = 3, 3
SEED = tf.constant([1, 2])


def _log_softmax(z):
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _log_bernoulli(z, y):
    return np.sum(y * z - np.logaddexp(0, z))


def _log_normal_pair(z, y):
    """Mean and scale both learned: `z = (mean, log scale)`, side by side."""
    mean, log_scale = np.split(z, 2, axis=-1)
    return np.sum(-0.5 * ((y - mean) * np.exp(-log_scale)) ** 2 - log_scale)


def normal_pair(z):
    """The same as a callable likelihood."""
    from tensorflow_probability import distributions as tfd

    mean, log_scale = tf.split(z, 2, axis=-1)
    return tfd.Normal(mean, tf.exp(log_scale))


# Log-densities of one example, `log p(y | z)`; class targets are one-hot.
DENSITIES = {
    ("categorical", True): lambda z, y: np.sum(y * _log_softmax(z)),
    ("categorical", False): lambda p, y: np.sum(y * np.log(p / p.sum(axis=-1, keepdims=True))),
    ("bernoulli", True): _log_bernoulli,
    ("bernoulli", False): lambda p, y: np.sum(y * np.log(p) + (1 - y) * np.log1p(-p)),
    ("normal", False): lambda z, y: -np.sum((y - z) ** 2),
    (normal_pair, False): _log_normal_pair,
}
NAMED = [key for key in DENSITIES if isinstance(key[0], str)]


def _targets(family, z):
    """All targets of one example with nodes and weights of the normal's own quadrature: sums over them are exact."""
    if family == "categorical":
        codes = np.eye(z.shape[-1])
        for rows in itertools.product(codes, repeat=z.size // z.shape[-1]):
            yield np.reshape(rows, z.shape), None
    elif family == "bernoulli":
        for bits in itertools.product([0.0, 1.0], repeat=z.size):
            yield np.reshape(bits, z.shape), None
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        weights = weights / weights.sum()
        mean, scale = (z, 0.5**0.5) if family == "normal" else np.split(z, 2, axis=-1)
        scale = scale if family == "normal" else np.exp(scale)
        for picked in itertools.product(range(5), repeat=mean.size):
            picked = np.reshape(picked, mean.shape)
            yield mean + scale * nodes[picked], np.prod(weights[picked])


def _score(density, z, y):
    step = 1e-5
    slopes = []
    for unit in np.eye(z.size):
        change = step * unit.reshape(z.shape)
        slopes.append((density(z + change, y) - density(z - change, y)) / (2 * step))
    return np.array(slopes)


def _fisher(family, logits, z):
    """`E_y[∇log p ∇log pᵀ]` of one example by enumeration of the targets."""
    density = DENSITIES[family, logits]
    total = 0.0
    for y, probability in _targets(family, z):
        probability = np.exp(density(z, y)) if probability is None else probability
        score = _score(density, z, y)
        total = total + probability * np.outer(score, score)
    return total


def _outputs(family, logits, sequence):
    z = np.random.default_rng(0).normal(size=(BATCH, 2, 2) if sequence else (BATCH, WIDTH + callable(family)))
    if logits or family == "normal" or callable(family):
        return z
    if family == "bernoulli":
        return _sigmoid(z)
    # Class probabilities need not add up to 1: Keras's losses divide by their sum.
    return np.exp(_log_softmax(z)) * np.reshape([0.9, 0.7, 0.8], (-1,) + (1,) * (z.ndim - 1))


def _weights(kind, sequence):
    rng = np.random.default_rng(1)
    return {"scalar": 0.25, "examples": rng.uniform(0.2, 2, BATCH), "positions": rng.uniform(0.2, 2, (BATCH, 2))}[kind]


def _problem(family, logits, sequence, kind):
    """A head and the weighted dense Fisher matrices at its outputs, `[batch, c, c]`."""
    z, weight = _outputs(family, logits, sequence), _weights(kind, sequence)
    spread = np.broadcast_to(np.reshape(weight, np.shape(weight) + (1,) * (z.ndim - np.ndim(weight))), z.shape)
    root = np.sqrt(spread.reshape(BATCH, -1))
    dense = np.stack([_fisher(family, logits, row) for row in z]) * root[:, :, None] * root[:, None, :]
    return Head(tf.constant(z), family, logits, tf.constant(weight)), dense


CASES = [
    *((key, False, kind) for key in NAMED for kind in ("scalar", "examples")),
    *((key, True, kind) for key in NAMED for kind in ("scalar", "positions")),
]
IDS = [
    f"{key[0]}-{'logits' if key[1] else 'outputs'}-{'sequence' if seq else 'vector'}-{kind}" for key, seq, kind in CASES
]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("key", "sequence", "kind"), CASES, ids=IDS)
def test_exact_cotangents_sum_to_the_fisher_matrix_over_all_targets(key, sequence, kind, graph):
    head, dense = _problem(*key, sequence, kind)
    if graph:
        signature = [tf.TensorSpec([None, *head.outputs.shape[1:]], tf.float64)]
        function = tf.function(lambda z: exact_cotangents(head._replace(outputs=z)), input_signature=signature)
        cotangents = function(head.outputs).numpy()
    else:
        cotangents = exact_cotangents(head).numpy()
    assert cotangents.shape[1:] == head.outputs.shape
    flat = cotangents.reshape(len(cotangents), BATCH, -1)
    np.testing.assert_allclose(np.einsum("kni,knj->nij", flat, flat), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("key", "sequence", "kind"), CASES, ids=IDS)
def test_fisher_inner_is_the_mean_quadratic_form(key, sequence, kind):
    head, dense = _problem(*key, sequence, kind)
    tangents = np.random.default_rng(2).normal(size=(3, *head.outputs.shape))
    inner = fisher_inner(head, [tf.constant(tangent) for tangent in tangents], SEED)
    flat = tangents.reshape(3, BATCH, -1)
    expected = np.einsum("ani,nij,bnj->ab", flat, dense, flat) / BATCH
    np.testing.assert_allclose(inner, expected, rtol=1e-5, atol=1e-6)


def _repeated(head, repeats):
    weight = head.weight if head.weight.shape.rank == 0 else tf.repeat(head.weight, repeats, axis=0)
    return head._replace(outputs=tf.repeat(head.outputs, repeats, axis=0), weight=weight)


@pytest.mark.parametrize(("key", "sequence", "kind"), [*CASES[::3], ((normal_pair, False), False, "examples")])
def test_sampled_cotangents_have_the_fisher_matrix_as_second_moment(key, sequence, kind):
    head, dense = _problem(*key, sequence, kind)
    repeats = 20_000
    cotangents = sampled_cotangent(_repeated(head, repeats), SEED).numpy().reshape(BATCH, repeats, -1)
    moment = np.einsum("nri,nrj->nij", cotangents, cotangents) / repeats
    for found, expected in zip(moment, dense, strict=True):
        assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)
    # Gradients of −log p at the model's own targets vanish on average.
    assert np.abs(cotangents.mean(axis=1)).max() <= 0.05 * np.sqrt(np.abs(dense).max())


def test_fisher_inner_of_a_callable_estimates_its_quadratic_form_from_draws():
    head, dense = _problem(normal_pair, False, False, "examples")
    tangents = np.random.default_rng(2).normal(size=(2, *head.outputs.shape))
    inner = fisher_inner(head, [tf.constant(tangent) for tangent in tangents], SEED, draws=20_000)
    expected = np.einsum("ani,nij,bnj->ab", tangents, dense, tangents) / BATCH
    assert np.linalg.norm(inner - expected) <= 0.03 * np.linalg.norm(expected)
    few = fisher_inner(head, [tf.constant(tangent) for tangent in tangents], SEED).numpy()
    assert np.linalg.eigvalsh(few)[0] >= 0


@pytest.mark.parametrize("key", DENSITIES)
def test_draws_follow_their_seed_and_leave_the_random_state_alone(key):
    head = Head(tf.constant(_outputs(*key, False)), *key, 1.0)
    tf.random.set_seed(3)
    expected = tf.random.normal([4]).numpy()
    tf.random.set_seed(3)
    one, again = sampled_cotangent(head, SEED).numpy(), sampled_cotangent(head, SEED).numpy()
    np.testing.assert_array_equal(tf.random.normal([4]), expected)
    np.testing.assert_array_equal(one, again)
    others = [sampled_cotangent(head, SEED + shift).numpy() for shift in range(1, 9)]
    assert any(not np.array_equal(one, other) for other in others)


def test_confident_outputs_give_finite_cotangents():
    saturated = np.array([[0.0, 1.0], [1.0, 0.0]], "float32")
    for family in ("bernoulli", "categorical"):
        for logits, z in ((False, saturated), (True, 200 * saturated - 100)):
            head = Head(tf.constant(z), family, logits, 1.0)
            assert np.all(np.isfinite(sampled_cotangent(head, SEED)))
            assert np.all(np.isfinite(exact_cotangents(head)))
            assert np.all(np.isfinite(fisher_inner(head, [tf.ones_like(z)], SEED)))


@pytest.mark.parametrize("key", [("normal", False), ("bernoulli", False), ("bernoulli", True), ("categorical", True)])
def test_an_output_that_is_nan_has_no_finite_score(key):
    """Else a refresh would take the samples of a broken pass for good ones."""
    score = sampled_cotangent(Head(tf.constant([[0.3, np.nan], [0.2, 0.8]]), *key, 1.0), SEED).numpy()
    assert np.isnan(score[0, 1]) and np.isfinite(score[1]).all()


def test_half_precision_outputs_are_differentiated_in_float32():
    z = np.array([[4.0, -3.0, 9.5]])
    half = Head(tf.constant(z, tf.float16), "bernoulli", True, 1.0)
    single = half._replace(outputs=tf.constant(z, tf.float32))
    for function in (exact_cotangents, lambda head: sampled_cotangent(head, SEED)):
        assert function(half).dtype == tf.float32
        np.testing.assert_array_equal(function(half), function(single))


def _coloured(z):
    from tensorflow_probability import distributions as tfd

    return tfd.Independent(tfd.Categorical(logits=z), 1)


def _two_draws(z):
    from tensorflow_probability import distributions as tfd

    return tfd.JointDistributionSequential([tfd.Normal(z[:, :2], 1.0), tfd.Categorical(logits=z[:, 2:])])


@pytest.mark.parametrize(
    ("family", "shape", "weight", "count"),
    [
        ("bernoulli", (5, 784), 0.1, 5 * 784),
        ("normal", (5, 4, 3), 1.0, 5 * 12),
        ("categorical", (5, 10), 2.0, 5),
        ("categorical", (5, 10), 0.0, 0),
        ("categorical", (0, 10), 1.0, 0),
        ("categorical", (5, 8, 6, 10), 1.0, 5 * 48),
        ("categorical", (2, 4, 10), np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), 3),
        ("normal", (4, 6), np.array([1.0, 0.0, 0.0, 2.0]), 12),
        (normal_pair, (5, 14), 1.0, 5 * 7),
        (_coloured, (5, 6, 10), 1.0, 5 * 6),
        (_two_draws, (5, 6), 1.0, 5 * 3),
    ],
)
def test_targets_are_counted_as_the_density_has_them(family, shape, weight, count):
    """Labels, not classes; of a callable the numbers of a draw; padding and what weighs nothing is not there."""
    head = Head(tf.zeros(shape), family, True, tf.constant(weight, tf.float32))
    assert float(targets(head)) == pytest.approx(count)
