"""Backups of training that a kill tore: Keras writes its files in place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a weights file was written to its end; False too where there is none.

    HDF5 writes its tables when the file is closed and its header last of all: a file torn before that either does not
    open (OSError) or opens and cannot be listed (KeyError or RuntimeError), but never looks like a smaller whole one.

    Args:
        path: of a `.weights.h5` file.
    """
    try:
        with h5py.File(path, "r") as file:
            file.visititems(lambda name, item: None)
    except (OSError, KeyError, RuntimeError):
        return False
    return True


def mend_backup(backup_dir: str | os.PathLike) -> None:
    """Makes a folder of `keras.callbacks.BackupAndRestore` usable again after a kill in the middle of a write.

    To be called before the `fit` that goes on, whether or not anything was torn. The callback must write with
    `double_checkpoint=True`, and with `delete_checkpoint=False` where the end of `fit` may be killed too: it then falls
    back on the previous weights by itself where the last ones do not open, but not where they open and cannot be read,
    nor where its JSON file is torn, nor where the very first write was, which are mended here. Where nothing whole is
    left training starts anew.

    Args:
        backup_dir: the callback's; a folder that does not exist is left alone.
    """
    latest = Path(backup_dir) / "latest.weights.h5"
    previous = latest.with_name(latest.name + ".bkp")
    if latest.exists() and not is_whole(latest):
        if previous.exists() and is_whole(previous):
            copy = latest.with_name("mended")
            shutil.copy(previous, copy)
            copy.replace(latest)
        else:
            latest.unlink()
    metadata = latest.with_name("training_metadata.json")
    if metadata.exists():
        try:
            json.loads(metadata.read_text())
        except ValueError:
            metadata.unlink()
