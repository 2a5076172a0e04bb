"""Attention whose projections are instrumented, so that a reloaded model has them too."""

from __future__ import annotations

import keras

from keras_kpsvd.layers.swapping import RECORDING, name_after, swap_inside


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVDMultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` whose projections `keras_kpsvd.KPSVD` trains by natural gradient.

    Keras makes the projections when the layer is built, as `keras.layers.EinsumDense`; see `KPSVDEinsumDense`.
    """

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        swap_inside(self, RECORDING)


@keras.saving.register_keras_serializable(package="keras_kpsvd")
class KPSVDGroupQueryAttention(keras.layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention`, as `KPSVDMultiHeadAttention`."""

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        swap_inside(self, RECORDING)


name_after(KPSVDMultiHeadAttention, keras.layers.MultiHeadAttention)
name_after(KPSVDGroupQueryAttention, keras.layers.GroupQueryAttention)
