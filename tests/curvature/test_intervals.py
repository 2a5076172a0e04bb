"""When something is due again."""

from itertools import pairwise

import tensorflow as tf

from keras_kpsvd.curvature.intervals import next_due


def test_a_number_of_updates_is_that_number():
    assert [int(next_due(tf.constant(made, tf.int64), 7)) for made in (0, 5, 10**12)] == [7, 12, 10**12 + 7]


def test_growing_intervals_are_one_update_at_first_and_one_longer_every_ten_until_they_are_twenty():
    dues, now = [], 0
    while now < 400:
        now = int(next_due(now, "growing"))
        dues.append(now)
    assert dues[:16] == [*range(1, 11), 12, 14, 16, 18, 20, 23]
    lengths = [after - before for before, after in pairwise([0, *dues])]
    assert lengths == sorted(lengths) and set(range(1, 11)) <= set(lengths) <= set(range(1, 21))
    assert dues[lengths.index(20) - 1] in range(190, 210)
    assert int(next_due(tf.constant(2**40, tf.int64), "growing")) == 2**40 + 20
