"""Executed notebooks are up to date with their sources and name nothing of a machine."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import FOLDER, digest

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 400_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|var|opt|work|Users)/")


def code_cells(path: Path) -> list[Any]:
    """Return the code cells of a notebook."""
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[str]:
    """Return the MIME types of a cell's outputs."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"frontier", "isoflop", "noise", "results"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_belong_to_the_sources(path: Path) -> None:
    for number, cell in enumerate(code_cells(path), 1):
        assert cell.execution_count == number, "make notebooks, then execute.py --keep"
        assert cell.metadata["executed"] == digest(cell.source)
        assert cell.outputs
        assert {output.output_type for output in cell.outputs} == {"execute_result"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_and_tables_are_in_the_notebook(path: Path) -> None:
    figures = 0
    for cell in code_cells(path):
        last = cell.source.splitlines()[-1]
        if ".plot(" in last:
            figures += 1
            assert "image/png" in kinds(cell)
        if ".table(" in last or "store.sql(" in cell.source:
            assert "text/html" in kinds(cell)
    assert figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_starts_with_results_and_builds_no_figure_by_hand(path: Path) -> None:
    cells = code_cells(path)
    assert "from slm import results" in cells[0].source
    assert len(cells[0].source.splitlines()) <= 5
    assert not any("matplotlib" in cell.source for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    assert not ABSOLUTE_PATH.search(text)
    assert f'"{socket.gethostname()}"' not in text
    assert not re.search(r"\w+Warning:", text)
