"""The notebook runs from its first cell to its last."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from libs.build import load_model
from libs.config import ROOT, load

NOTEBOOK = ROOT / "notebooks/progressive_digits.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    for name, value in {"WORKDIR": workdir, "UPDATES_MODEL": 3, "UPDATES": 2, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 5
    texts = [output.get("data", {}).get("text/plain", "") for output in shown]
    said, = (text for text in texts if "one step" in text)
    assert float(said.split()[6]) < 1e-4, said  # of images from -1 to 1

    stages = json.loads((workdir / "students/stages.json").read_text())["stages"]
    assert [(stage["steps"], stage["done"], stage["finished"]) for stage in stages] == [(8, 2, True), (4, 2, True)]
    _, description = load_model(load("configs/digits_uvit.py"), str(workdir / "students"))
    assert description["sampler"]["steps"] == 4
    assert description["distilled"] == {"cfg_scale": 2.5}
    assert (workdir / "montage.png").exists()
