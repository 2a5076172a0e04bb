"""The leading triples reach the dense optimum by every route, and say how they ended."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

import keras_kpsvd.linalg as linalg
from tests import reference
from tests.linalg import cases

ROUTES = [("gram", 1), ("power", 1), ("lanczos", 1), ("power", 3), ("lanczos", 3), ("lanczos", 40)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("route,shared", ROUTES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_route_reaches_the_dense_optimum(family, route, shared, dtype):
    activations, gradients = (x.astype(dtype) for x in family(np.random.default_rng(3), 40, shared, 5, 3))
    triples = linalg.leading_triples(cases.operator(activations, gradients), 2, route=route, max_steps=1000)
    for k in (1, 2):
        assert cases.excess(activations, gradients, triples.terms()[:k]) < cases.EXCESS[dtype]
    assert triples.status == linalg.CONVERGED


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("route,shared", ROUTES[:5])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_what_is_left_of_kfac_is_fitted_optimally(family, route, shared, dtype):
    activations, gradients = (x.astype(dtype) for x in family(np.random.default_rng(4), 30, shared, 5, 3))
    base = [tuple(x.astype(dtype) for x in reference.kfac_factors(activations, gradients))]
    triples = linalg.leading_triples(cases.operator(activations, gradients, base), 1, route=route, max_steps=1000)
    assert cases.excess(activations, gradients, triples.terms(), base) < cases.EXCESS[dtype]


@pytest.mark.parametrize("route,shared", ROUTES)
def test_deflating_equals_two_triples_at_once(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(5), 30, shared, 5, 4)
    both = linalg.leading_triples(
        cases.operator(activations, gradients), 2, route=route, symmetric=True, max_steps=1000
    )
    first = linalg.leading_triples(
        cases.operator(activations, gradients), 1, route=route, symmetric=True, max_steps=1000
    )
    deflated = cases.operator(activations, gradients).deflate(*first.terms()[0])
    second = linalg.leading_triples(deflated, 1, route=route, symmetric=True, max_steps=1000)
    np.testing.assert_allclose(
        reference.kronecker_sum(both.terms()),
        reference.kronecker_sum(first.terms() + second.terms()),
        atol=1e-7 * float(both.values[0]),
    )
    assert second.values[0] < first.values[0]


@pytest.mark.parametrize("route,shared", ROUTES)
def test_multiplying_samples_by_a_number_only_scales_the_values(route, shared):
    activations, gradients = (
        x.astype("float32") for x in cases.heavy_tailed(np.random.default_rng(6), 24, shared, 6, 4)
    )
    plain = linalg.leading_triples(cases.operator(activations, gradients), 2, route=route)
    for c_a, c_g in [(1e4, 1e4), (1e-4, 1e-4), (1e-4, 1e4), (1e8, 1e-9), (1e20, 1e-20)]:
        c_a, c_g = np.float32(c_a), np.float32(c_g)
        scaled = linalg.leading_triples(cases.operator(activations * c_a, gradients * c_g), 2, route=route)
        assert scaled.status == plain.status
        assert abs(int(scaled.steps) - int(plain.steps)) <= 2
        np.testing.assert_allclose(scaled.values / (float(c_a) ** 2 * float(c_g) ** 2), plain.values, rtol=2e-5)
        for k in range(2):
            for own, other in ((scaled.left, plain.left), (scaled.right, plain.right)):
                # The square root of the tolerance: close values leave the vectors less well determined.
                np.testing.assert_allclose(own[k], other[k], atol=5e-3)


def test_a_second_term_may_be_skew_and_is_found():
    activations, gradients = cases.rotations(np.random.default_rng(7), 200, 2, 3, 2)
    base = cases.operator(activations, gradients)
    for route in ("power", "lanczos"):
        free = linalg.leading_triples(base, 2, route=route)
        assert cases.excess(activations, gradients, free.terms()) < 1e-8
        np.testing.assert_array_equal(free.left[1], -np.transpose(free.left[1]))
        kept = linalg.leading_triples(base, 2, route=route, symmetric=True)
        np.testing.assert_array_equal(kept.left[1], np.transpose(kept.left[1]))
        assert float(kept.values[1]) < 0.5 * float(free.values[1])


@pytest.mark.parametrize("route,shared", ROUTES)
def test_factors_are_exactly_symmetric_with_the_stated_sign(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(8), 30, shared, 5, 4)
    triples = linalg.leading_triples(cases.operator(activations, gradients), 3, route=route, symmetric=True)
    for side in (triples.left, triples.right):
        np.testing.assert_array_equal(side, np.transpose(side, [0, 2, 1]))
    assert np.all(np.linalg.eigvalsh(triples.left[0]) > -1e-12)
    assert np.all(np.linalg.eigvalsh(triples.right[0]) > -1e-12)
    assert np.all(np.trace(triples.left, axis1=1, axis2=2) >= 0)


def test_skew_factors_have_a_positive_largest_entry():
    activations, gradients = cases.rotations(np.random.default_rng(9), 50, 2, 2, 2)
    left = linalg.leading_triples(cases.operator(activations, gradients), 2).left[1].numpy()
    assert left.flat[np.argmax(np.abs(left))] > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lanczos_keeps_small_second_values_and_orthogonal_vectors(dtype):
    """The published one had σ₂ at a tenth of its value, or at twice it."""
    rng = np.random.default_rng(10)
    activations, gradients = (x.astype(dtype) for x in cases.heavy_tailed(rng, 60, 3, 8, 6))
    exact = np.linalg.svd(reference.rearrange(reference.fisher(activations, gradients), 8, 6), compute_uv=False)
    triples = linalg.leading_triples(cases.operator(activations, gradients), 4, route="lanczos", krylov_dimension=6)
    np.testing.assert_allclose(
        triples.values, exact[:4], rtol=1e-9 if dtype == "float64" else 1e-3, atol=1e-6 * exact[0]
    )
    for side in (triples.left, triples.right):
        flat = np.reshape(side, [4, -1])
        np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-9 if dtype == "float64" else 1e-3)
    assert triples.status == linalg.CONVERGED


def test_lanczos_finds_equal_values_after_a_breakdown():
    """Orthogonal examples of one weight: R(F) has d equal values, and any Krylov space is exhausted at once."""
    activations = gradients = np.eye(4)[:, None, :]
    for start in (None, np.eye(4), np.diag([1.0, 0, 0, 0])):
        triples = linalg.leading_triples(cases.operator(activations, gradients), 3, route="lanczos", start=start)
        np.testing.assert_allclose(triples.values, [0.25] * 3, rtol=1e-12)
        assert cases.excess(activations, gradients, triples.terms()) < 1e-12


@pytest.mark.parametrize("route,shared", ROUTES[1:5])
def test_residuals_are_those_of_the_returned_triples(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(11), 30, shared, 5, 4)
    for max_steps in (1, 2000):
        triples = linalg.leading_triples(
            cases.operator(activations, gradients), 1, route=route, max_steps=max_steps, krylov_dimension=2
        )
        dense = reference.rearrange(reference.fisher(activations, gradients), 5, 4)
        u, v, sigma = np.ravel(triples.left[0]), np.ravel(triples.right[0]), float(triples.values[0])
        own = np.linalg.norm(dense @ v - sigma * u), np.linalg.norm(dense.T @ u - sigma * v)
        np.testing.assert_allclose(triples.residuals[0], np.array(own) / sigma, atol=1e-12, rtol=1e-6)
        assert (triples.status == linalg.CONVERGED) == (max(own) <= 1.7e-10 * sigma)


@pytest.mark.parametrize("route,shared", ROUTES[1:5])
def test_a_cap_reached_is_reported(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(12), 30, shared, 6, 5)
    options = {"krylov_dimension": 2} if route == "lanczos" else {}
    triples = linalg.leading_triples(
        cases.operator(activations, gradients), 1, route=route, symmetric=True, max_steps=2, **options
    )
    assert triples.status == linalg.NOT_CONVERGED
    assert triples.steps == 2
    dense = reference.rearrange(reference.fisher(activations, gradients), 6, 5)
    assert float(triples.values[0]) <= np.linalg.norm(dense, 2) * (1 + 1e-12)


@pytest.mark.parametrize("route,shared", ROUTES[1:5])
def test_a_warm_start_saves_steps(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(13), 40, shared, 6, 5)
    cold = linalg.leading_triples(cases.operator(activations, gradients), 1, route=route, krylov_dimension=3)
    nudged = activations + 1e-6
    again = cases.operator(nudged, gradients)
    warm = linalg.leading_triples(again, 1, route=route, start=-7 * cold.right, krylov_dimension=3, tolerance=1e-5)
    from_scratch = linalg.leading_triples(again, 1, route=route, krylov_dimension=3, tolerance=1e-5)
    assert warm.status == linalg.CONVERGED
    assert int(warm.steps) < int(from_scratch.steps) or int(from_scratch.steps) == 3
    assert cases.excess(nudged, gradients, warm.terms()) < 1e-8


@pytest.mark.parametrize("route,shared", ROUTES[:3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_give_a_status_and_zeros(route, shared, value):
    activations, gradients = cases.dependent(np.random.default_rng(14), 10, shared, 4, 3)
    gradients[3, 0, 1] = value
    function = tf.function(lambda a, g: linalg.leading_triples(linalg.RearrangedFisher(a, g), 1, route=route))
    triples = function(activations, gradients)
    assert triples.status == linalg.NOT_FINITE
    for part in (triples.values, triples.left, triples.right):
        np.testing.assert_array_equal(part, np.zeros(part.shape))


@pytest.mark.parametrize("route,shared", ROUTES)
def test_zero_samples_give_zero_triples(route, shared):
    triples = linalg.leading_triples(
        linalg.RearrangedFisher(np.zeros([5, shared, 4]), np.zeros([5, shared, 3])), 2, route=route
    )
    assert triples.status == linalg.CONVERGED
    for part in (triples.values, triples.residuals):
        np.testing.assert_array_equal(part, np.zeros(part.shape))
    assert np.all(np.isfinite(triples.left))


@pytest.mark.parametrize("route,shared", ROUTES)
def test_fewer_triples_than_asked_for_are_padded_with_zeros(route, shared):
    activations, gradients = cases.dependent(np.random.default_rng(15), 6, shared, 3, 1)
    triples = linalg.leading_triples(cases.operator(activations, gradients), 3, route=route)
    assert cases.excess(activations, gradients, triples.terms()[:1]) < 1e-8
    np.testing.assert_allclose(triples.values[1:], [0, 0], atol=1e-14 * float(triples.values[0]))


@pytest.mark.slow
@pytest.mark.parametrize("route,shared", ROUTES)
def test_an_unknown_batch_size_changes_nothing(route, shared):
    for count in (1, 20):
        activations, gradients = cases.dependent(np.random.default_rng(count), count, shared, 4, 3)
        unknown = None if shared == 3 else shared

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, unknown, 4], tf.float64),
                tf.TensorSpec([None, unknown, 3], tf.float64),
            ]
        )
        def function(a, g):
            return linalg.leading_triples(linalg.RearrangedFisher(a, g), 2, route=route)

        triples = function(activations, gradients)
        assert cases.excess(activations, gradients, triples.terms()) < 1e-8


@example(
    seed=0, count=2, shared=2, d_in=3, d_out=2, family=cases.dependent, dtype="float64"
)  # σ₂ is skew, in one dimension.
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 40),
    shared=st.sampled_from([1, 1, 2, 7]),
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    family=st.sampled_from(cases.FAMILIES),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_the_automatic_route_reaches_the_optimum_on_any_shape(seed, count, shared, d_in, d_out, family, dtype):
    activations, gradients = (x.astype(dtype) for x in family(np.random.default_rng(seed), count, shared, d_in, d_out))
    triples = linalg.leading_triples(cases.operator(activations, gradients), 2)
    assert cases.excess(activations, gradients, triples.terms()) < cases.EXCESS[dtype]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_space_filled_at_once_is_not_filled_again(family, monkeypatch):
    """Two outputs have one skew direction; where the operator vanishes on it, rounding is all that is left."""
    decompose, calls = tf.linalg.svd, []

    def counted(*arguments, **keywords):
        calls.append(None)
        assert len(calls) < 20, "the iteration goes on with nothing left to fill"
        return decompose(*arguments, **keywords)

    monkeypatch.setattr(tf.linalg, "svd", counted)
    activations, gradients = family(np.random.default_rng(4149), 21, 2, 6, 2)
    triples = linalg.leading_triples(cases.operator(activations, gradients), 2, route="lanczos")
    assert cases.excess(activations, gradients, triples.terms()) < 1e-8


def test_misuse_raises_and_names_the_argument():
    several = linalg.RearrangedFisher(np.zeros([5, 2, 4]), np.zeros([5, 2, 3]))
    with pytest.raises(ValueError, match=r"route='gram'.*2 positions"):
        linalg.leading_triples(several, route="gram")
    with pytest.raises(ValueError, match=r"`route`.*'fast'"):
        linalg.leading_triples(several, route="fast")
    with pytest.raises(ValueError, match=r"`k`.*0"):
        linalg.leading_triples(several, 0)
    with pytest.raises(ValueError, match="krylov_dimension"):
        linalg.leading_triples(several, 2, route="lanczos", krylov_dimension=2)


def test_the_cheaper_route_is_chosen():
    def route(count, shared, d_in, d_out):
        samples = tf.zeros([count, shared, d_in]), tf.zeros([count, shared, d_out])
        return linalg.cheapest_route(linalg.RearrangedFisher(*samples), 1)

    assert route(128, 1, 1001, 500) == "gram"
    assert route(128, 9, 50, 30) == "lanczos"
    assert route(4096, 1, 100, 100) == "lanczos"
