"""Execute every notebook of this folder against a store made by real sweeps.

`make notebooks` runs this. Executed copies go to runs/notebooks/executed; with `--keep` they
replace the notebooks of the repository, so that readers see tables and figures. The sweeps are
repeated each time, so only the first call trains.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
HOME = FOLDER.parent / "runs" / "notebooks"
POCKET = ("--recipe", "pocket")
SWEEPS = (
    (*POCKET, "--depths", "2-5", "--ratios", "1", "--name", "miniseries", "--core"),
    (*POCKET, "--depths", "1-4", "--flops", "3e10,6e10", "--name", "isoflop"),
    (*POCKET, "--depths", "2,3", "--ratios", "1", "--seeds", "3", "--name", "noise"),
    (str(FOLDER / "crippled.py"),),
)
"""Experiments that the notebooks read: a ladder, a grid, replicates, a change."""


def main() -> None:
    """Sweep, then execute; a failing cell ends with its traceback and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="replace the notebooks of this folder")
    options = parser.parse_args()
    os.environ["SLM_HOME"] = str(HOME)
    for sweep in SWEEPS:
        subprocess.run([sys.executable, "-m", "slm", "sweep", *sweep], check=True)
    executed = HOME / "executed"
    executed.mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path)
        nbformat.write(notebook, executed / path.name)
        if options.keep:
            nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: executed, see {executed / path.name}\n")


def execute(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with its outputs, without what differs between machines and times."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": FOLDER}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.metadata["executed"] = digest(cell.source)
    return notebook


def digest(source: str) -> str:
    """Return a hash of a cell's source, which shows whether its outputs are up to date."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
