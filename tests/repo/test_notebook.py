"""examples/tour.ipynb runs from top to bottom, as it lies there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def run(notebook: Any) -> Any:
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()


@pytest.mark.slow
def test_the_tour_runs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without results
    done = run(notebook)
    printed = [cell.outputs for cell in done.cells if cell.cell_type == "code"]
    assert "perplexity" in printed[-1][-1]["text"]


def test_control_a_cell_that_fails_is_noticed() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert False")])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        run(notebook)


def test_it_names_no_file_of_one_machine() -> None:
    text = Path(NOTEBOOK).read_text()
    assert not re.findall(r"(?<![\w.:/<])/\w+/", text)  # no absolute path at all
