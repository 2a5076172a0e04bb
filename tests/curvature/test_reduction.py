"""What a refresh is given of a layer's calls: the same numbers in chunks and at once, within the budget."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_kpsvd import KPSVDConv2D, KPSVDDense
from keras_kpsvd.curvature.reduction import (
    MEMORY_BUDGET,
    BatchCurvature,
    LayerCall,
    is_compressed,
    positions_of,
    reduce_calls,
    refresh_rows,
    rows_within,
    side_by_side,
)
from tests import reference


def _calls(layer, shape, count, rng):
    inputs = [tf.constant(rng.normal(size=shape)) for _ in range(count)]
    return [LayerCall(x, tf.constant(rng.normal(size=layer(x).shape))) for x in inputs]


def _dense_rearrangement(activations, gradients):
    fisher = reference.fisher(activations, gradients)
    return reference.rearrange(fisher, activations.shape[-1], gradients.shape[-1])


def _assert_multiplies_as(operator, dense):
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(operator.d_in,) * 2), rng.normal(size=(operator.d_out,) * 2)
    scale = np.linalg.norm(dense)
    np.testing.assert_allclose(np.ravel(operator.matvec(right)), dense @ right.ravel(), rtol=1e-9, atol=1e-11 * scale)
    np.testing.assert_allclose(np.ravel(operator.rmatvec(left)), dense.T @ left.ravel(), rtol=1e-9, atol=1e-11 * scale)


# One example's patches in float64 with four copies take 18 * 8 * 4 bytes a position and group or more: 1 byte is a
# chunk of one example, 2**15 of a few, 2**30 of all.
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 7),
    size=st.integers(2, 5),
    filters=st.sampled_from([1, 2, 8]),
    groups=st.sampled_from([1, 2]),
    calls=st.integers(1, 2),
    bias=st.booleans(),
    budget=st.sampled_from([1, 2**15, 2**30]),
    seed=st.integers(0, 2**16),
)
def test_chunks_give_the_factors_and_the_operator_of_all_samples(
    batch, size, filters, groups, calls, bias, budget, seed
):
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    layer = KPSVDConv2D(filters * groups, (2, 3), padding="same", groups=groups, use_bias=bias, dtype="float64")
    recorded = _calls(layer, (batch, size, size, 2 * groups), calls, rng)
    whole = reduce_calls(layer, recorded, base=True, svd=True, budget=budget)
    without_base = reduce_calls(layer, recorded, base=False, svd=True, budget=budget)
    assert len(whole) == groups
    for one, other, (a, g) in zip(whole, without_base, side_by_side(layer, recorded), strict=True):
        a, g = a.numpy(), g.numpy()
        assert is_compressed(positions_of(layer, recorded), a.shape[-1], filters) == (one.activations is None)
        np.testing.assert_allclose(one.base[0], np.einsum("nti,ntj->ij", a, a) / batch, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            one.base[1], np.einsum("nti,ntj->ij", g, g) / (batch * a.shape[1]), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(other.trace, np.sum(a**2) / batch, rtol=1e-9)
        dense = _dense_rearrangement(a, g)
        for reduced in (one, other):
            _assert_multiplies_as(reduced.operator(), dense)


@pytest.mark.parametrize(
    ("shared", "d_in", "d_out"), [(9, 4, 3), (9, 3, 4), (5, 1, 4), (5, 4, 1), (2, 4, 3), (1, 4, 3)]
)
def test_weight_gradients_take_the_place_of_the_samples_where_they_are_smaller(shared, d_in, d_out):
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(6, shared, d_in)), rng.normal(size=(6, shared, d_out))
    batch = BatchCurvature(tf.constant(a), tf.constant(g)).with_kfac(base=False).compressed()
    assert (batch.weight_gradients is not None) == (shared > min(d_in, d_out))
    lengths = np.linalg.norm(np.einsum("nti,ntj->nij", a, g), axis=(1, 2))
    np.testing.assert_allclose(batch.squared_lengths(), lengths**2, rtol=1e-9)
    operator = batch.operator()
    assert operator.positions == min(shared, d_in, d_out)
    np.testing.assert_allclose(batch.trace, np.sum(a**2) / 6)
    dense = _dense_rearrangement(a, g)
    _assert_multiplies_as(operator, dense)
    balanced, unit = operator.balanced()
    _assert_multiplies_as(balanced, dense / float(unit) ** 2)
    np.testing.assert_allclose(operator.frobenius_norm(), np.linalg.norm(dense), rtol=1e-9)


def test_unknown_positions_are_compressed_and_reduced_alike():
    layer = KPSVDConv2D(3, 3, dtype="float64")
    rng = np.random.default_rng(0)
    (call,) = _calls(layer, (4, 5, 6, 2), 1, rng)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, 2], tf.float64),
            tf.TensorSpec([None, None, None, 3], tf.float64),
        ]
    )
    def reduce(inputs, gradient):
        call = LayerCall(inputs, gradient)
        assert positions_of(layer, [call]) is None
        (reduced,) = reduce_calls(layer, [call], base=True, svd=True, budget=2**14)
        return reduced.weight_gradients, *reduced.base

    products, a, g = reduce(*call)
    ((activations, gradients),) = side_by_side(layer, [call])
    np.testing.assert_allclose(products, np.einsum("nti,ntj->inj", activations, gradients), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(a, np.einsum("nti,ntj->ij", activations, activations) / 4, rtol=1e-9)
    np.testing.assert_allclose(g, np.einsum("nti,ntj->ij", gradients, gradients) / (4 * 12), rtol=1e-9)


def test_an_empty_batch_gives_zeros():
    layer = KPSVDConv2D(3, 3, dtype="float64")
    call = LayerCall(tf.zeros([0, 5, 5, 2], tf.float64), tf.zeros([0, 3, 3, 3], tf.float64))
    layer.build((None, 5, 5, 2))
    (reduced,) = reduce_calls(layer, [call], base=True, svd=True)
    assert not np.any(reduced.base[0]) and not np.any(reduced.base[1])
    assert not np.any(reduced.operator().matvec(tf.eye(3, dtype=tf.float64)))


def test_rows_are_as_many_as_fit_the_budget_and_never_none():
    few, many = rows_within(2**20, [(100, 50)], 1), rows_within(2**24, [(100, 50)], 1)
    assert many in range(15 * few, 17 * few + 1)
    # Past min(d_in, d_out) positions the size is that of the weight gradients, whatever the positions.
    assert rows_within(2**24, [(100, 50)], 51) == rows_within(2**24, [(100, 50)], 10_000)
    assert rows_within(2**24, [(100, 50)], None) == rows_within(2**24, [(100, 50)], 10_000)
    assert rows_within(1, [(100, 50)], None) == 1
    assert rows_within(2**24, [(100, 50)] * 4, 7) in range(many // 28 - 1, many // 28 + 1)


def test_dense_layers_are_not_cut_in_chunks():
    layer = KPSVDDense(3, dtype="float64")
    call = LayerCall(tf.ones([5, 4], tf.float64), tf.ones([5, 3], tf.float64))
    layer.build((None, 4))
    (reduced,) = reduce_calls(layer, [call], base=True, svd=True, budget=1)
    assert reduced.activations.shape == [5, 1, 5] and reduced.base is None


@pytest.mark.parametrize(
    ("method", "positions", "wanted", "expected"),
    [
        ("kfac", 1, None, None),
        ("kpsvd", 1, None, 128),
        ("kfac", 1, 50, 50),
        ("kpsvd", 1, 500, 500),
        ("kfac", 1024, None, 32),
        ("kpsvd", 1024, None, 32),
        ("kfac", 64, None, 64),
        ("kfac", 4, None, 128),
        ("kfac", None, None, 32),
        ("kfac", 1024, 7, 7),
    ],
)
def test_rows_of_a_refresh(method, positions, wanted, expected):
    assert refresh_rows(method, [(28, 8)], positions, wanted) == expected


def test_svd_methods_keep_to_the_memory_budget_whatever_is_wanted():
    large = [(2**12, 2**10)]
    assert refresh_rows("kpsvd", large, None, 50) == rows_within(MEMORY_BUDGET, large, None) < 50
    assert refresh_rows("kfac", large, None, 50) == 50
    assert refresh_rows("kfac", large, None, 50, corrected=True) == refresh_rows("kpsvd", large, None, 50)
    assert refresh_rows("kfac", large, 1, corrected=True) is None
    # The exact Fisher has as many gradients of each example as there are outputs.
    small = [(2**8, 2**6)]
    assert refresh_rows("kpsvd", small, None, 500, repeats=10) == rows_within(MEMORY_BUDGET // 10, small, None) < 500
