"""Shared fixtures: one prepared corpus for all tests, homes that use it, the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line does, and before numpy reads it

from slm.data import Prepared, prepare
from slm.recipe import pocket

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The `python` corpus, prepared for pocket."""
    return prepare("python", pocket(2), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def home(tmp_path: Path, prepared: Prepared) -> Path:
    """An empty home that has the prepared corpus."""
    home = tmp_path / "runs"
    home.mkdir()
    (home / "data").symlink_to(prepared.folder.parent)
    return home


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The process's torch on one thread, as equal bits ask for."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slm(*arguments: str, home: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    env = {**os.environ, **({"SLM_HOME": str(home)} if home else {}), **environment}
    command = [sys.executable, "-c", "from slm.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


@pytest.fixture
def reference() -> Path:
    """The folder of published facts and figures."""
    folder = os.environ.get("SLM_REFERENCE")
    if not folder:
        pytest.skip("SLM_REFERENCE is unset: no folder of published figures to compare with")
    return Path(folder)
