"""With a global seed and deterministic operations a run is the same run twice, in one process and in two."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.resume.runs import METHODS

ROOT = pathlib.Path(__file__).parents[2]


def _digests(seeds, methods):
    command = [sys.executable, "-m", "tests.resume.two_runs", ",".join(map(str, seeds)), *methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _agree(*methods):
    one, other = _digests([1, 1, 2], methods), _digests([1], methods)
    for method in methods:
        first, second, another = one[method]
        assert first == second, f"{method}: twice in one process"
        assert first == other[method][0], f"{method}: in two processes"
        assert first != another, f"{method}: with another seed"


@pytest.mark.slow
def test_two_runs_with_one_seed_agree_in_every_bit_and_with_another_do_not():
    _agree("kfac")


@pytest.mark.slow
def test_two_runs_of_any_method_with_one_seed_agree_in_every_bit():
    _agree(*METHODS[1:])
