"""Shared fixtures: a prepared corpus, homes that use it, databases."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# As the command line does, and before numpy reads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # other workers use the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from slm.data import PreparedDataset, prepare
from slm.recipe import pocket
from tests import postgres

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

LONGEST = ("test_makefile.py", "test_goldens.py", "test_slurm.py", "test_orchestrator.py")
"""Files that take about a minute each; they run first, so that no worker waits for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Return the `python` corpus prepared for pocket."""
    return prepare("python", pocket(2), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def home(tmp_path: Path, prepared: PreparedDataset) -> Path:
    """Return an empty home with the prepared corpus."""
    home = tmp_path / "runs"
    home.mkdir()
    (home / "data").symlink_to(prepared.folder.parent)
    return home


@pytest.fixture(scope="session")
def _server() -> Iterator[str]:
    with postgres.server() as folder:
        yield folder


@pytest.fixture
def postgresql(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Use an empty database of a real PostgreSQL as the store; yield its address."""
    if why := postgres.why_not():
        pytest.skip(why)
    import psycopg

    folder, name = request.getfixturevalue("_server"), f"t{secrets.token_hex(6)}"
    with psycopg.connect(f"host={folder} user=slm dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        url = f"postgresql+psycopg://slm@/{name}?host={folder}"
        monkeypatch.setenv("SLM_STORE", url)
        yield url
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(params=["duckdb", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use each of the databases as the store; return its name."""
    monkeypatch.delenv("SLM_STORE", raising=False)
    if request.param == "postgresql":
        request.getfixturevalue("postgresql")
    return str(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as equal bits require."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference() -> Path:
    """Return the folder of published facts and figures."""
    folder = os.environ.get("SLM_REFERENCE")
    if not folder:
        pytest.skip("SLM_REFERENCE is unset: no folder of published figures to compare with")
    return Path(folder)
