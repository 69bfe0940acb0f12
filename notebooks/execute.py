"""Run every notebook of this folder against a store made by a real sweep; the executed copies go to runs/notebooks.

`make notebooks` calls this. The sweep is typed again each time, so that only the first call trains.
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
SWEEP = ("sweep", "--recipe", "pocket", "--depths", "2-5", "--ratios", "1", "--name", "miniseries")


def main() -> None:
    """Sweep, then execute; a failing cell ends with its traceback and exit code 1."""
    os.environ["SLM_HOME"] = str(HOME)
    command = [sys.executable, "-c", "from slm.cli import main; main()", *SWEEP]
    subprocess.run(command, check=True)
    executed = HOME / "executed"
    executed.mkdir(exist_ok=True)
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
        nbformat.write(notebook, executed / path.name)
        print(f"{path.name}: executed, see {executed / path.name}")  # noqa: T201


if __name__ == "__main__":
    main()
