"""Keras layers that report to the curvature recorder."""

from keras_kpsvd.layers.convolution import KPSVDConv1D, KPSVDConv2D
from keras_kpsvd.layers.dense import KPSVDDense
from keras_kpsvd.layers.einsum_dense import KPSVDEinsumDense
from keras_kpsvd.layers.passes import ForwardPass, Record
from keras_kpsvd.layers.recording import (
    Recorder,
    RecordingLayer,
    at_least_float32,
    check_kernels_are_not_shared,
    layers_of,
)

__all__ = [
    "ForwardPass",
    "KPSVDConv1D",
    "KPSVDConv2D",
    "KPSVDDense",
    "KPSVDEinsumDense",
    "Record",
    "Recorder",
    "RecordingLayer",
    "at_least_float32",
    "check_kernels_are_not_shared",
    "layers_of",
]
