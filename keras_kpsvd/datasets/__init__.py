"""Images for the tutorials and benchmarks, all without a download.

Every loader returns an `ImageSet`: `images` `[count, features]`, float32 in [0, 1], `image_shape`, `labels` where the
data has classes, and `source`, which says what data this is.
"""

from keras_kpsvd.datasets.curves import load_curves
from keras_kpsvd.datasets.faces import load_faces
from keras_kpsvd.datasets.image_set import ImageSet
from keras_kpsvd.datasets.mnist import load_mnist

__all__ = ["ImageSet", "load_curves", "load_faces", "load_mnist"]
