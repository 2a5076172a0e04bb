"""A run that is killed at random moments and started again ends in the same bits; files that a kill tears."""

import multiprocessing
import pathlib
import random
import time

import keras
import numpy as np
import pytest

from keras_kpsvd import KPSVD
from keras_kpsvd.callbacks import is_whole, mend_backup
from tests.resume import killed_run
from tests.resume.runs import (
    BATCHES,
    INTERVALS,
    At,
    assert_bitwise,
    data,
    everything,
    fit,
    network,
    torn_states,
)

pytestmark = pytest.mark.filterwarnings("ignore:KPSVD trains by SGD with momentum")

TORN = ("opened", "header", "data", "all but the last header")

KILLS = 20
EARLY = 4  # So many of them while the process starts, restores or traces.
STARTING, SAVING = 3.0, 0.04  # Seconds: a start takes about as long as the first, a batch and a save less.


def _arrays(path):
    with np.load(path) as file:
        return [(name, file[name]) for name in file.files]


def _kill_at_random(process, progress, chance, early):
    """Sends SIGKILL; whether the run had been training."""
    trained = False
    if early:
        process.join(chance.uniform(0.0, STARTING))
    else:
        for _ in range(chance.randint(1, 8)):
            if not progress.poll(120):
                break
            try:
                progress.recv()
            except EOFError:  # It ended by itself, which the exit code tells.
                break
            trained = True
        time.sleep(chance.uniform(0.0, SAVING))
    process.kill()
    process.join()
    return trained


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_and_restarted_ends_in_the_same_bits(tmp_path):
    """A fork server that has imported TensorFlow, and never started it, saves twenty imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras", "keras_kpsvd", "tests.resume.killed_run"])
    backup, result, whole = tmp_path / "backup", tmp_path / "result.npz", tmp_path / "whole.npz"
    seed = time.time_ns() % 2**32
    chance = random.Random(seed)
    early = set(chance.sample(range(KILLS), EARLY))
    trained, torn = 0, 0

    def start():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=killed_run.restarted, args=(str(backup), str(result), sender))
        process.start()
        sender.close()
        return process, receiver

    for kill in range(KILLS):
        process, progress = start()
        trained += _kill_at_random(process, progress, chance, kill in early)
        assert process.exitcode == -9, f"kill {kill} of seed {seed}: the restarted run failed, or was not killed"
        latest = backup / "latest.weights.h5"
        torn += latest.exists() and not is_whole(latest)
        assert not result.exists()
    process, progress = start()
    first = progress.recv()
    while process.exitcode is None:
        if progress.poll(1):
            try:
                progress.recv()
            except EOFError:
                break
    process.join()
    assert process.exitcode == 0, f"seed {seed}"
    reference = context.Process(target=killed_run.uninterrupted, args=(str(whole),))
    reference.start()
    reference.join()
    assert reference.exitcode == 0
    print(f"seed {seed}: {trained} of {KILLS} kills during training, {torn} tore the last backup")
    assert trained == KILLS - EARLY and first == 0
    assert_bitwise(_arrays(result), _arrays(whole))


def _filled(value):
    """A built model, every float of whose state is `value`."""
    model = network(KPSVD(method="kpsvd", seed=5))
    model.optimizer.build(model.trainable_variables)
    for variable in [*model.variables, *model.optimizer.variables]:
        variable.assign(np.full(variable.shape, value).astype(variable.dtype))
    return model


def _backed_up(directory, *values, double):
    """A folder in which `BackupAndRestore` saved states one after the other."""
    for epoch, value in enumerate(values):
        backup = keras.callbacks.BackupAndRestore(str(directory), double_checkpoint=double)
        backup.set_model(_filled(value))
        backup.on_epoch_end(epoch)
    return directory / "latest.weights.h5"


def _restored(directory, double):
    backup = keras.callbacks.BackupAndRestore(str(directory), double_checkpoint=double)
    model = _filled(9)
    backup.set_model(model)
    backup.on_train_begin()
    return model


@pytest.mark.parametrize("when", TORN)
def test_a_torn_weights_file_is_refused_and_no_optimizer_state_changes(tmp_path, when):
    model = _filled(1)
    model.save_weights(tmp_path / "good.weights.h5")
    torn = tmp_path / "torn.weights.h5"
    torn.write_bytes(torn_states(tmp_path / "good.weights.h5", tmp_path / "scratch.h5")[when])
    assert is_whole(tmp_path / "good.weights.h5") and not is_whole(torn)
    live = _filled(2)
    with pytest.raises((OSError, KeyError, RuntimeError, ValueError)):
        live.load_weights(torn)
    assert_bitwise(everything(live), everything(_filled(2)))


@pytest.mark.parametrize("when", TORN)
def test_after_a_kill_in_the_middle_of_a_backup_the_one_before_is_restored(tmp_path, when):
    latest = _backed_up(tmp_path / "backup", 1, 2, double=True)
    latest.write_bytes(torn_states(latest, tmp_path / "scratch.h5")[when])
    mend_backup(tmp_path / "backup")
    assert_bitwise(everything(_restored(tmp_path / "backup", double=True)), everything(_filled(1)))


@pytest.mark.parametrize("when", TORN)
def test_after_a_kill_in_the_middle_of_the_first_backup_the_run_starts_from_the_beginning(tmp_path, when):
    latest = _backed_up(tmp_path / "backup", 1, double=True)
    latest.write_bytes(torn_states(latest, tmp_path / "scratch.h5")[when])
    mend_backup(tmp_path / "backup")
    assert_bitwise(everything(_restored(tmp_path / "backup", double=True)), everything(_filled(9)))


@pytest.mark.parametrize("text", ["", '{"epoch": 1, "ba'])
def test_after_a_kill_while_the_epoch_is_written_the_last_weights_are_restored(tmp_path, text):
    """Keras itself raises ValueError in every restart, until somebody deletes the file."""
    _backed_up(tmp_path / "backup", 1, 2, double=True)
    (tmp_path / "backup" / "training_metadata.json").write_text(text)
    mend_backup(tmp_path / "backup")
    assert_bitwise(everything(_restored(tmp_path / "backup", double=True)), everything(_filled(2)))


def test_a_backup_that_is_whole_is_left_as_it_is(tmp_path):
    _backed_up(tmp_path / "backup", 1, 2, double=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "backup").iterdir()}
    mend_backup(tmp_path / "backup")
    assert {path.name: path.read_bytes() for path in (tmp_path / "backup").iterdir()} == before
    assert_bitwise(everything(_restored(tmp_path / "backup", double=True)), everything(_filled(2)))


def test_where_the_last_numbered_checkpoint_is_torn_the_one_before_goes_on_in_the_same_bits(tmp_path):
    """A name with the batch in it is never written twice: whatever tears the last, the one before is whole."""
    x, y = data()
    model = network(KPSVD(method="kfac", **INTERVALS))
    name = str(tmp_path / "{batch:04}.weights.h5")
    checkpoint = keras.callbacks.ModelCheckpoint(name, save_weights_only=True, save_freq=3)
    states = []
    note = At(9, lambda model: states.append(everything(model)))
    fit(model, x, y, 0, BATCHES, callbacks=[checkpoint, note])
    uninterrupted = everything(model)
    last = tmp_path / "0012.weights.h5"
    for content in torn_states(last, tmp_path / "scratch.h5").values():
        last.write_bytes(content)
        whole = [path for path in sorted(pathlib.Path(tmp_path).glob("*.weights.h5")) if is_whole(path)]
        assert [path.name[:4] for path in whole] == ["0003", "0006", "0009"]
    model.load_weights(whole[-1])
    assert_bitwise(everything(model), states[0])
    fit(model, x, y, 9, BATCHES)
    assert_bitwise(everything(model), uninterrupted)
