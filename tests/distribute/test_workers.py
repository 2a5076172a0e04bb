"""`KPSVD` under `MultiWorkerMirroredStrategy`: two real processes on the loopback address."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

SECONDS = 150
SCRIPT = Path(__file__).with_name("worker.py")


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _run(workers, options):
    """What each process printed; all are killed when one fails or none ends in time."""
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    inherited["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), inherited.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        children = []
        for index in range(workers):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {**inherited, "CUDA_VISIBLE_DEVICES": "-1"}
            if workers > 1:
                environment["TF_CONFIG"] = json.dumps(config)
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, str(SCRIPT), json.dumps(options)]
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            stack.callback(child.wait)
            stack.callback(child.kill)
            children.append((child, log))
        results = []
        for child, log in children:
            output, _ = child.communicate(timeout=SECONDS)
            log.seek(0)
            assert child.returncode == 0, log.read()[-4000:]
            results.append(json.loads(output.splitlines()[-1]))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"late": True},
        {"rows": 25},  # One worker has no part of the last batch.
        {"method": "kpsvd", "fisher": "empirical", "weight_decay": 0.01},
        {"method": "kfac_corrected", "fisher": "exact"},
    ],
)
def test_two_workers_take_the_steps_of_one_process_and_agree_bit_for_bit(options):
    one, other = _run(2, options)
    (alone,) = _run(1, options)
    assert one == other
    np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-4)
    for (path, value), wanted in zip(one["values"].items(), alone["values"].values(), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-2, atol=1e-3 * (1 + np.abs(wanted).max()), err_msg=path)


@pytest.mark.slow
def test_stock_fit_does_not_work_there_with_any_optimizer():
    """Should this fail one day, the tutorial and the README may show `fit`."""
    for result in _run(2, None):
        assert "PerReplica" in result["error"]
