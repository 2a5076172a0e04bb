"""The autoencoder tutorial as a user runs it: the real script in a process of its own."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tutorials" / "autoencoder.py"
METHODS = ("adam", "sgd", "kfac")


def _command(*arguments):
    return [sys.executable, "-u", str(SCRIPT), *map(str, arguments)]


def _environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "-1"}


def _run(*arguments):
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, timeout=300, env=_environment(), cwd="/", check=False
    )


def _epochs(folder):
    with (folder / "epochs.csv").open() as file:
        return list(csv.DictReader(file))


def _table(text):
    """{method: cells} of the table."""
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("-----"))
    rows = {}
    for line in lines[start + 1 :]:
        if not line:
            break
        cells = re.split(r"\s{2,}", line)
        rows[cells[0]] = cells
    return rows


def _assert_is_a_picture(path, colours=20):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > colours


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run of the script: its result and its folder."""
    folder = tmp_path_factory.mktemp("autoencoder") / "new" / "folder"
    result = _run(
        "--samples", 256, "--batch-size", 64, "--epochs", 4, "--kpsvd-epochs", 3, "--seed", 3,
        "--methods", ",".join(METHODS), "--out", folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result, folder


def test_every_method_trains_and_its_loss_falls(finished):
    rows = _epochs(finished[1])
    for method, epochs in zip(METHODS, (4, 4, 3), strict=True):
        own = [row for row in rows if row["method"] == method]
        assert [row["epoch"] for row in own] == [str(k + 1) for k in range(epochs)]
        losses, seconds = ([float(row[name]) for row in own] for name in ("loss", "seconds"))
        assert 0.02 < losses[-1] < losses[0] and seconds[0] > 0 and (np.diff(seconds) > 0).all()


def test_table_follows_from_the_csv_and_stands_in_both_places(finished):
    result, folder = finished
    text = (folder / "table.txt").read_text()
    assert text.strip() in result.stdout
    rows, table = _epochs(folder), _table(text)
    assert list(table) == list(METHODS)
    adams_best = min(float(row["loss"]) for row in rows if row["method"] == "adam")
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        losses = [float(row["loss"]) for row in own]
        seconds = [float(row["seconds"]) for row in own]
        _, epochs, best, held_out, reached, reached_seconds, per_epoch, first, status = table[method]
        assert int(epochs) == len(own) and status == "finished" and float(held_out) > 0.02
        assert float(best) == pytest.approx(min(losses), abs=6e-6)
        assert float(per_epoch) == pytest.approx(np.median(np.diff(seconds)), abs=0.01)
        assert float(first) == pytest.approx(seconds[0], abs=0.06)
        expected = next((k for k, loss in enumerate(losses) if loss <= adams_best * (1 + 1e-7)), None)
        if expected is None:
            assert (reached, reached_seconds) == ("–", "–")
        else:
            assert int(reached) == expected + 1 and float(reached_seconds) == pytest.approx(seconds[expected], abs=0.06)


def test_run_says_what_was_trained_on_what_and_shows_progress(finished):
    result, folder = finished
    for fact in (
        "CURVES, 256 images generated with seed 3",
        "784-400-200-100-50-25-6-25",
        "batch size 64",
        "TensorFlow",
    ):
        assert fact in result.stdout and fact in (folder / "table.txt").read_text()
    for position, method in enumerate(METHODS, start=1):
        assert f"[{position}/{len(METHODS)}] {method}" in result.stdout
    assert result.stdout.count("Epoch ") == 11 and str(folder / "loss.png") in result.stdout
    assert "Traceback" not in result.stderr and "UserWarning" not in result.stderr


def test_pictures_are_not_blank(finished):
    folder = finished[1]
    _assert_is_a_picture(folder / "loss.png")
    _assert_is_a_picture(folder / "reconstructions.png")
    assert sorted(path.name for path in folder.iterdir()) == [
        "epochs.csv",
        "loss.png",
        "reconstructions.png",
        "table.txt",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problem", "cifar"], "argument --problem: invalid choice: 'cifar'"),
        (["--methods", "adam,newton"], "argument --methods: unknown method 'newton'"),
        (["--methods", "adam,adam"], "argument --methods: each method once"),
        (["--methods", ""], "argument --methods: unknown method ''"),
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["--kpsvd-epochs", "1.5"], "argument --kpsvd-epochs: expected a whole number"),
        (["--batch-size", "-4"], "argument --batch-size: expected a whole number"),
        (["--samples", "many"], "argument --samples: expected a whole number"),
        (["--seed", "-1"], "argument --seed: expected a whole number"),
        (["--adam-learning-rate", "nan"], "argument --adam-learning-rate: expected a positive number"),
        (["--out", "/dev/null/folder"], "argument --out: can't write to /dev/null/folder"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_argument_gives_one_line_and_starts_nothing(arguments, said):
    began = time.monotonic()
    result = _run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and said in result.stderr
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "64", "--samples", "32"], "argument --batch-size: 64 is more than the 32 training images"),
        (["--problem", "mnist", "--samples", "1000000"], "argument --samples: `count` must be at most"),
    ],
)
def test_argument_that_the_data_refuses_gives_one_line_too(arguments, said, tmp_path):
    result = _run(*arguments, "--out", tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]


def _interrupt_when(text, arguments):
    """Starts the script, sends SIGINT once a line of its output holds `text`; returns its status and all it said."""
    process = subprocess.Popen(
        _command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(), cwd="/"
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if text in line:
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, "".join(said) + rest


def test_ctrl_c_keeps_the_finished_epochs(tmp_path):
    status, said = _interrupt_when(
        "Epoch 3/5000",
        ["--samples", 256, "--batch-size", 64, "--epochs", 5000, "--methods", "adam,sgd", "--out", tmp_path],
    )
    assert status == 130 and "Traceback" not in said, said
    rows = _epochs(tmp_path)
    assert {row["method"] for row in rows} == {"adam"} and 2 <= len(rows) < 5000
    cells = _table((tmp_path / "table.txt").read_text())["adam"]
    assert int(cells[1]) == len(rows) and cells[-1] == "interrupted"
    _assert_is_a_picture(tmp_path / "loss.png")
    _assert_is_a_picture(tmp_path / "reconstructions.png")


def test_ctrl_c_before_the_first_epoch_says_so_and_writes_nothing(tmp_path):
    status, said = _interrupt_when("Loading TensorFlow", ["--out", tmp_path])
    assert status == 130 and "Interrupted" in said and not list(tmp_path.iterdir()), said


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["curves", "mnist", "faces"])
def test_every_problem_runs_with_every_method(problem, tmp_path):
    result = _run(
        "--problem", problem, "--samples", 256, "--batch-size", 128, "--epochs", 2,
        "--methods", "adam,sgd,kfac,kpsvd,deflation,lanczos,kfac_corrected", "--out", tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    table = _table((tmp_path / "table.txt").read_text())
    assert len(table) == 7 and all(cells[-1] == "finished" for cells in table.values()), result.stdout
