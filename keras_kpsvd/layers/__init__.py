"""Keras layers that report to the curvature recorder."""

from keras_kpsvd.layers.dense import KPSVDDense
from keras_kpsvd.layers.recording import ForwardPass, Record, Recorder, RecordingLayer, layers_of

__all__ = ["ForwardPass", "KPSVDDense", "Record", "Recorder", "RecordingLayer", "layers_of"]
