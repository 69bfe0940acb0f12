"""Where the files of the store are, and what can go wrong. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


class StoreError(RuntimeError):
    """The store cannot do it; the message is one line that says the way out."""


class QueryError(StoreError, ValueError):
    """What was asked of the store is wrong: the SQL, a name."""


def home() -> Path:
    """The folder of runs: $SLM_HOME, else ./runs."""
    return Path(os.environ.get("SLM_HOME") or "runs")


def live(home: Path) -> Path:
    """The database that only an ingest opens."""
    return home / "slm.duckdb"


def snapshot(home: Path) -> Path:
    """The published copy that everyone reads."""
    return home / "results.duckdb"


def seen(home: Path) -> Path:
    """What the last ingest saw, as a hash."""
    return home / "slm.duckdb.seen"


def damaged(path: Path, why: object) -> StoreError:
    """The error for a database that can only be made anew."""
    return StoreError(f"{path}: {first_line(why)}; `slm store rebuild` makes it anew from the run folders")


def first_line(error: object) -> str:
    """First line of an error's message."""
    return str(error).strip().partition("\n")[0]
