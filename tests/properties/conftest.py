"""How the properties are run."""

import pytest
import tensorflow as tf


@pytest.fixture(scope="module")
def untraced():
    """No graphs: every example has shapes of its own, and most of the time would go into graphs that run once."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
