"""iclevr_ddpm.ipynb runs from the first cell to the last, with a few steps in place of many.

`NOTEBOOK=1 python -m pytest -n 0 tests/test_notebook.py` runs it with all its steps and keeps what it shows.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = ROOT / "iclevr_ddpm.ipynb"
TINY = """
TRAIN_STEPS = 2
SAMPLING = "--steps 2 --num-images 2 --mixed-precision no"
"""


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def tidy(notebook, folder: Path):
    """Keep of a terminal's lines what stood there last, and nothing of stderr: progress bars take thousands of lines.
    `folder`: where it ran, which is left out of the paths."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        kept: list = []
        for output in cell.get("outputs", []):
            is_text = output.output_type == "stream"
            if is_text and output.name == "stderr":
                continue
            if is_text and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                lines = output.text.replace("\r\n", "\n").split("\n")
                output.text = "\n".join(line.rpartition("\r")[2] for line in lines).replace(f"{folder}/", "")
        if "outputs" in cell:
            cell.outputs = kept


@pytest.mark.slow
def test_every_cell_runs(clone, monkeypatch):
    for name in ("requirements.txt", NOTEBOOK.name):
        shutil.copy(ROOT / name, clone)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(clone / NOTEBOOK.name, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    is_tiny = "NOTEBOOK" not in os.environ
    if is_tiny:
        parameters.source += TINY
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": clone}}).execute()
    tidy(notebook, clone)
    printed = "".join(output.get("text", "") for output in outputs_of(notebook))
    assert printed.count("accuracy: ") == 3  # test; test and new_test for the lab
    assert f"runs/notebook: trained to step {2 if is_tiny else 300}" in printed
    assert "error: " not in printed
    images = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(images) >= 9
    for path in ("hand-in/test/1.png", "hand-in/new_test.png", "hand-in/process.png", "runs/notebook/curves.png"):
        assert (clone / path).is_file()
    if not is_tiny:
        nbformat.write(notebook, NOTEBOOK)


def test_it_is_committed_with_its_pictures_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kinds = {kind for output in outputs_of(notebook) for kind in output.get("data", {})}
    assert "image/png" in kinds
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 1_000_000
    shown = "".join(output.get("text", "") for output in outputs_of(notebook))
    assert "accuracy: " in shown and "\r" not in shown
