"""Matrix-product kernels give the same numbers eagerly, in a graph, and compiled by XLA."""

import numpy as np
import pytest
import tensorflow as tf

import keras_kpsvd.linalg as linalg
from tests.linalg import cases


def _operator(shared, count=6):
    return cases.operator(*cases.dependent(np.random.default_rng(0), count, shared, 4, 3))


def _kernel(shared, method):
    operator = _operator(shared)

    def apply(activations, gradients, left, right):
        own = linalg.RearrangedFisher(activations, gradients, ((left, right),))
        arguments = {"matvec": (right,), "rmatvec": (left,), "inner": (left, right), "frobenius_norm": ()}[method]
        return getattr(own, method)(*arguments)

    rng = np.random.default_rng(1)
    return apply, (operator.activations, operator.gradients, rng.standard_normal((4, 4)), rng.standard_normal((3, 3)))


def _kernels():
    rng = np.random.default_rng(2)
    square, other = rng.standard_normal((4, 4)), rng.standard_normal((3, 3))
    matrix, rows = rng.standard_normal((4, 3)), rng.standard_normal((7, 4))
    yield "row_gram", linalg.row_gram, (rows,)
    yield "weighted_outer_products", linalg.weighted_outer_products, (rows, rng.standard_normal((7, 2)))
    yield "apply_one_term", linalg.apply_one_term, (square, other, matrix)
    for rule in ("reflect", "absolute"):
        arguments = (square, other, rng.standard_normal(4), rng.standard_normal(3), matrix)
        yield f"apply_two_term-{rule}", lambda *x, rule=rule: linalg.apply_two_term(*x, rule), arguments
        low_rank = (rng.standard_normal((4, 2)), rng.standard_normal((3, 2)), *rng.standard_normal((2, 2)))
        yield (
            f"apply_corrected-{rule}",
            lambda *x, rule=rule: linalg.apply_corrected(*x, rule),
            (square, other, *low_rank, matrix),
        )
    for shared in (1, 2, 9):
        for method in ("matvec", "rmatvec", "inner", "frobenius_norm"):
            yield f"{method}-{shared}", *_kernel(shared, method)
    pair = (square, other)
    yield "sum_matvec", lambda a, g, v: linalg.KroneckerSum([(a, g), (2 * a, g)]).matvec(v), (*pair, matrix)
    yield "sum_inner", lambda a, g: linalg.KroneckerSum([(a, g)]).inner(linalg.KroneckerSum([(g[0, 0] * a, g)])), pair
    yield "sum_frobenius_norm", lambda a, g: linalg.KroneckerSum([(a, g), (a, g)]).frobenius_norm(), pair


@pytest.mark.parametrize("name,kernel,arguments", [pytest.param(*x, id=x[0]) for x in _kernels()])
def test_kernels_agree_in_every_mode(name, kernel, arguments):
    arguments = [tf.convert_to_tensor(x) for x in arguments]
    eager = kernel(*arguments)
    np.testing.assert_allclose(tf.function(kernel)(*arguments), eager, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tf.function(kernel, jit_compile=True)(*arguments), eager, rtol=1e-10, atol=1e-12)
