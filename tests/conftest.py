"""Two logical devices for the tests of `tf.distribute`; TensorFlow takes them before it starts only."""

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
