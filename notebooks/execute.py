"""Run every notebook of this folder against a store made by real sweeps; the executed copies go to runs/notebooks.

`make notebooks` calls this. The sweeps are typed again each time, so that only the first call trains.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
HOME = FOLDER.parent / "runs" / "notebooks"
SWEEPS = (
    ("--depths", "2-5", "--ratios", "1", "--name", "miniseries", "--core"),
    ("--depths", "1-4", "--flops", "3e10,6e10", "--name", "isoflop"),
    ("--depths", "2,3", "--ratios", "1", "--seeds", "3", "--name", "noise"),
)
"""What the notebooks ask of: a ladder, a grid, replicates."""


def main() -> None:
    """Sweep, then execute; a failing cell ends with its traceback and exit code 1."""
    os.environ["SLM_HOME"] = str(HOME)
    for options in SWEEPS:
        command = [sys.executable, "-m", "slm", "sweep", "--recipe", "pocket", *options]
        subprocess.run(command, check=True)
    executed = HOME / "executed"
    executed.mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
        ).execute()
        nbformat.write(notebook, executed / path.name)
        print(f"{path.name}: executed, see {executed / path.name}")


if __name__ == "__main__":
    main()
