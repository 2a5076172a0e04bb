"""The paper's two errors against dense NumPy matrices of the same samples."""

import math

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVDDense, fisher_errors, fisher_samples
from keras_kpsvd.curvature.approximations import METHODS
from tests import reference

# Two-term sums of the first reach no less than the one-term sum of the second.
BETTER = [("kpsvd", "kfac"), ("deflation", "kpsvd"), ("lanczos", "kpsvd"), ("kfac_corrected", "kfac")]


@pytest.fixture(scope="module")
def net():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            KPSVDDense(4, activation="relu", name="first"),
            KPSVDDense(3, activation="tanh", use_bias=False, name="second"),
            KPSVDDense(2, activation="sigmoid", name="last"),
        ]
    )
    model.compile(loss="binary_crossentropy")
    rng = np.random.default_rng(0)
    x = rng.standard_t(2, (30, 4)).astype("float32")
    return model, x, rng.integers(0, 2, (30, 2)).astype("float32")


@pytest.fixture(scope="module")
def errors(net):
    model, x, _ = net
    return fisher_errors(model, x, seed=5)


def _approximation(method, fisher, activations, gradients):
    """The dense approximation, from dense SVDs alone."""
    d_in, d_out = activations.shape[-1], gradients.shape[-1]
    kfac = np.kron(*reference.kfac_factors(activations, gradients))
    if method == "kfac":
        return kfac
    if method == "kfac_corrected":
        return kfac + reference.kronecker_sum(reference.best_terms(fisher - kfac, d_in, d_out, 1))
    return reference.kronecker_sum(reference.best_terms(fisher, d_in, d_out, 1 if method == "kpsvd" else 2))


@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_the_dense_matrices(net, errors, method):
    model, x, _ = net
    for name, (activations, gradients) in fisher_samples(model, x, seed=5).items():
        activations, gradients = activations.numpy(), gradients.numpy()
        fisher = reference.fisher(activations, gradients)
        approximation = _approximation(method, fisher, activations, gradients)
        size = np.linalg.norm(fisher)
        error_1 = np.linalg.norm(fisher - approximation) / size
        error_2 = np.linalg.norm(np.linalg.eigvalsh(fisher) - np.linalg.eigvalsh(approximation)) / size
        assert errors[name][method].error_1 == pytest.approx(error_1, rel=1e-6, abs=1e-7)
        assert errors[name][method].error_2 == pytest.approx(error_2, rel=1e-6, abs=1e-7)


def test_every_instrumented_layer_and_method_is_reported(errors):
    assert list(errors) == ["first", "second", "last"]
    assert all(list(of_layer) == list(METHODS) for of_layer in errors.values())


@pytest.mark.parametrize(("better", "worse"), BETTER)
def test_more_freedom_never_fits_worse(errors, better, worse):
    for of_layer in errors.values():
        assert of_layer[better].error_1 <= of_layer[worse].error_1 + 1e-9
    assert any(of_layer[better].error_1 < 0.99 * of_layer[worse].error_1 for of_layer in errors.values())


def test_deflation_and_lanczos_fit_alike(errors):
    for of_layer in errors.values():
        np.testing.assert_allclose(of_layer["deflation"], of_layer["lanczos"], atol=1e-7)


def test_the_spectrum_is_left_out_beyond_the_largest_size(net):
    model, x, _ = net
    # "second" has 4 x 3 weights, "first" 5 x 4, "last" 4 x 2.
    errors = fisher_errors(model, x, ["kfac"], seed=5, max_size=12)
    known = {name: not math.isnan(of_layer["kfac"].error_2) for name, of_layer in errors.items()}
    assert known == {"first": False, "second": True, "last": True}
    assert all(of_layer["kfac"].error_1 > 0 for of_layer in errors.values())


@pytest.mark.parametrize("given", ["targets", "exact"])
def test_targets_and_the_exact_expectation_have_errors_of_their_own(net, given):
    model, x, y = net
    one = fisher_errors(model, x, ["kfac"], **({"y": y} if given == "targets" else {"fisher": "exact"}))
    samples = fisher_samples(model, x, y) if given == "targets" else fisher_samples(model, x, fisher="exact")
    for name, (activations, gradients) in samples.items():
        activations, gradients = activations.numpy(), gradients.numpy()
        fisher = reference.fisher(activations, gradients)
        left = fisher - np.kron(*reference.kfac_factors(activations, gradients))
        assert one[name]["kfac"].error_1 == pytest.approx(np.linalg.norm(left) / np.linalg.norm(fisher), rel=1e-6)


def test_a_dead_layer_has_no_error():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            KPSVDDense(3, activation="relu", bias_initializer=keras.initializers.Constant(-1e3), name="dead"),
            KPSVDDense(2, name="out"),
        ]
    )
    model.compile(loss="mse")
    errors = fisher_errors(model, np.ones((5, 4), "float32"))
    for method in METHODS:
        assert errors["dead"][method] == (0.0, 0.0)
        assert np.all(np.isfinite(errors["out"][method]))


def test_an_unknown_method_is_refused_by_name(net):
    model, x, _ = net
    with pytest.raises(ValueError, match=r"`methods` must be one of .*'newton'"):
        fisher_errors(model, x, ["kfac", "newton"])
