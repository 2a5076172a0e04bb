"""One strategy for all tests: collectives of a second one in the same process may collide with those of the first."""

import pytest
import tensorflow as tf


@pytest.fixture(scope="session")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
