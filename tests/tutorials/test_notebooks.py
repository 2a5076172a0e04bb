"""The tutorial notebooks: in step with their scripts, without outputs, and executed at a small size.

Every notebook of `tutorials/` is tested as it is. It reads `KERAS_KPSVD_TUTORIAL_SIZE` ("small" here) in one cell near
the top, shows at least one picture, leaves no files where it runs, and leaves a dict `comparison`, the numbers of its
last table: {row: {quantity: finite number}}.
"""

import json
import math
import os
import sys
from pathlib import Path

import jupyter_client
import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
QUICK = {"quickstart"}  # the others are left to the slow tests: even small ones trace for half a minute and more
PICTURES = {"quickstart": 3, "convolution": 3}
LAST = "import json as _json; print(_json.dumps(comparison, default=float))"


class _ThisInterpreter(jupyter_client.kernelspec.KernelSpecManager):
    """Starts kernels in the interpreter that runs the tests, whatever kernels the machine has registered."""

    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return jupyter_client.kernelspec.KernelSpec(argv=command, display_name=kernel_name, language="python")


def _named(paths):
    return [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem not in QUICK else []) for p in paths]


def _execute(notebook, folder, monkeypatch):
    """Runs all cells, and one that prints `comparison`, in `folder / "work"`; returns what that cell printed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("KERAS_KPSVD_TUTORIAL_SIZE", "small")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which puts pictures into outputs
    for name in ("KERAS_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        (folder / name).mkdir()
        monkeypatch.setenv(name, str(folder / name))
    work = folder / "work"
    work.mkdir()
    notebook.cells.append(nbformat.v4.new_code_cell(LAST))
    manager = jupyter_client.AsyncKernelManager(kernel_spec_manager=_ThisInterpreter())
    client = nbclient.NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(work)}})
    client.execute()
    assert list(work.iterdir()) == [], "a notebook leaves no files behind"
    return json.loads(_text(notebook.cells.pop()))


def _text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def _pictures(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks():
    assert {"quickstart", "convolution"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_are_the_same_and_hold_no_outputs(path):
    notebook, script = nbformat.read(path, as_version=4), jupytext.read(path.with_suffix(".py"))
    nbformat.validate(notebook)
    for pair in (notebook, script):
        assert pair.metadata.jupytext.formats == "ipynb,py:percent"
    said = [[(cell.cell_type, cell.source) for cell in pair.cells] for pair in (notebook, script)]
    assert said[0] == said[1], f"run: jupytext --sync {path.relative_to(ROOT)}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("path", _named(NOTEBOOKS))
def test_notebook_runs_shows_its_pictures_and_leaves_its_numbers(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    comparison = _execute(notebook, tmp_path, monkeypatch)
    assert _pictures(notebook) >= PICTURES.get(path.stem, 1)
    assert comparison and all(numbers for numbers in comparison.values())
    assert all(math.isfinite(number) for numbers in comparison.values() for number in numbers.values())
    if path.stem in CLAIMS:
        CLAIMS[path.stem](comparison, "".join(_text(cell) for cell in notebook.cells if cell.cell_type == "code"))


def _says_what_the_classifiers_did(comparison, said):
    """The defaults end below Adam, and the sentences follow from the numbers."""
    ours, adams = comparison["KPSVD"], comparison["Adam"]
    assert ours["training loss"] < adams["training loss"] < math.log(10) + 0.1
    assert "KPSVD reached Adam's last training loss" in said
    for quantity, sign in (("training loss", -1), ("held-out loss", -1), ("held-out accuracy", 1)):
        gain = sign * (ours[quantity] - adams[quantity])
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "the same"
        assert f"{quantity.capitalize()} after epoch 3: KPSVD's is {verdict} ({ours[quantity]:.4f} against" in said
    assert all(numbers["first epoch (s)"] > numbers["later epochs (s)"] > 0 for numbers in comparison.values())


def _says_that_devices_and_processes_agree(comparison, said):
    """Copies are the same to the last bit, losses those of one device or process but for rounding."""
    last = {name: numbers["training loss"] for name, numbers in comparison.items()}
    assert last["two devices"] == pytest.approx(last["one device"], rel=1e-4)
    assert last["worker 0"] == last["worker 1"] == pytest.approx(last["one process"], rel=1e-4)
    assert last["two devices"] < 0.3 and last["worker 0"] < 0.3
    assert "on the two devices, weights and all of the optimizer's state: 0 of" in said
    assert "in the two processes, losses, weights and all of the optimizer's state: 0 of" in said
    assert "`gradient_accumulation_steps` does not work on several devices" in said


CLAIMS = {
    "quickstart": _says_what_the_classifiers_did,
    "convolution": _says_what_the_classifiers_did,
    "several_devices": _says_that_devices_and_processes_agree,
}
