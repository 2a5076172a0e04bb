"""Natural-gradient training of Keras models with Kronecker-product-SVD approximations of the Fisher matrix."""

from keras_kpsvd import callbacks, datasets
from keras_kpsvd.curvature.approximations import approximate_fisher, exact_fisher
from keras_kpsvd.curvature.diagnostics import fisher_errors
from keras_kpsvd.curvature.samples import fisher_samples
from keras_kpsvd.layers.convolution import KPSVDConv1D, KPSVDConv2D
from keras_kpsvd.layers.dense import KPSVDDense
from keras_kpsvd.layers.einsum_dense import KPSVDEinsumDense
from keras_kpsvd.layers.instrument import instrument, uninstrument
from keras_kpsvd.optimizer import KPSVD

__all__ = [
    "KPSVD",
    "KPSVDConv1D",
    "KPSVDConv2D",
    "KPSVDDense",
    "KPSVDEinsumDense",
    "approximate_fisher",
    "callbacks",
    "datasets",
    "exact_fisher",
    "fisher_errors",
    "fisher_samples",
    "instrument",
    "uninstrument",
]
