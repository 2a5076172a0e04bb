"""One process of `test_workers`: trains by a hand-written loop, or tries stock `fit`, and prints what came of it."""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_kpsvd
from keras_kpsvd.curvature import extrapolation

ROWS, BATCH, EPOCHS = 29, 8, 2  # The last batch of five is three rows on one worker and two on the other.
# Past the updates that are always fitted exactly, with sixteen rows on one worker and fifteen on the other.
LATE = {"rows": 124, "batch": 31}


def data(rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 5)).astype("float32"), rng.integers(0, 3, size=(rows,)).astype("int32")


def build(options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), keras_kpsvd.KPSVDDense(7, activation="tanh"), keras_kpsvd.KPSVDDense(3)]
    )
    optimizer = keras_kpsvd.KPSVD(seed=1, likelihood="categorical", curvature_interval=2, inverse_interval=3, **options)
    return model, optimizer


def loop(strategy, options):
    late = options.pop("late", False)
    if late:
        extrapolation.EXACT_UPDATES, extrapolation.FEWEST_EXAMPLES = 2, 16
    rows, batch_size = (LATE["rows"], LATE["batch"]) if late else (options.pop("rows", ROWS), BATCH)
    batches = tf.data.Dataset.from_tensor_slices(data(rows)).batch(batch_size)
    sharding = tf.data.Options()
    sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = strategy.experimental_distribute_dataset(batches.with_options(sharding))
    with strategy.scope():
        model, optimizer = build(options)
        optimizer.build(model.trainable_variables)
        loss_of_each = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    def step(batch):
        x, y = batch
        rows = tf.cast(tf.shape(x)[0], tf.float32)
        total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, rows)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(loss_of_each(y, model(x, training=True))) / total
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    @tf.function(reduce_retracing=True)
    def train_step(batch):
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(step, args=(batch,)), axis=None)

    losses = [float(train_step(batch)) for _ in range(EPOCHS) for batch in batches]
    values = [*model.trainable_variables, *optimizer.variables]
    return {"losses": losses, "values": {v.path: v.numpy().tolist() for v in values}}


def stock_fit(strategy):
    with strategy.scope():
        model, _ = build({})
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    try:
        model.fit(*data(), batch_size=BATCH, verbose=0)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


if __name__ == "__main__":
    several = "TF_CONFIG" in os.environ
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if several else tf.distribute.get_strategy()
    options = json.loads(sys.argv[1])
    print(json.dumps(stock_fit(strategy) if options is None else loop(strategy, options)), flush=True)
