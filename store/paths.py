"""Paths of the store's files, its settings and its errors. Standard library only."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

Parameters = Sequence[Any] | Mapping[str, Any]
"""Values bound to a query's `?` (a sequence) or `$name` (a mapping)."""
RunQuery = Callable[[str, Parameters | None], "pandas.DataFrame"]
"""Function that runs a query with its parameters and returns the rows."""

VERSION = 3
"""Version of the tables and views."""
POSTGRES_SCHEME = "postgresql+psycopg://"
REBUILD_HINT = "`slm store rebuild` recreates it from the run folders"


class StoreError(RuntimeError):
    """A request that the store cannot fulfil; the message is one line and says what to do."""


class QueryError(StoreError, ValueError):
    """A wrong request: invalid SQL, or a name that does not exist."""


def home() -> Path:
    """Return the folder of runs: $SLM_HOME, ./runs when unset."""
    return Path(os.environ.get("SLM_HOME") or "runs")


def server_url() -> str | None:
    """Return the address of the shared PostgreSQL, $SLM_STORE; None means a DuckDB file in each
    home.

    Raises StoreError for any other kind of address, and when psycopg is not installed.
    """
    url = os.environ.get("SLM_STORE") or None
    if url and not url.startswith(POSTGRES_SCHEME):
        kind = url.partition(":")[0]
        raise StoreError(
            f"SLM_STORE={kind}:…: write {POSTGRES_SCHEME}USER@HOST/DATABASE, "
            "or unset it for a file in each home"
        )
    if url and find_spec("psycopg") is None:
        raise StoreError("SLM_STORE needs the package psycopg: pip install 'slm[postgres]'")
    return url


def home_id(home: Path) -> str | None:
    """Return the id in home.json, None before the first ingest.

    Raises StoreError for an invalid file.
    """
    path = home / "home.json"
    try:
        value = json.loads(path.read_bytes())["id"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        value = None
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{8}", value):
        raise StoreError(
            f"{path}: its id should be 8 hex digits; remove the file, and the next ingest writes "
            "a new one"
        )
    return value


def ensure_home_id(home: Path) -> str:
    """Return the id of a home, and write home.json with a new one if there is none."""
    value = home_id(home)
    if value is None:
        value = secrets.token_hex(4)
        temporary = home / "home.json.new"
        name = f"{_user()}@{platform.node()}:{home.resolve()}"
        temporary.write_text(json.dumps({"id": value, "name": name}), encoding="utf-8")
        temporary.replace(home / "home.json")
    return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have a number but no name
        return str(os.getuid())


def database(home: Path) -> Path:
    """Return the path of the database that only an ingest opens."""
    return home / "slm.duckdb"


def snapshot(home: Path) -> Path:
    """Return the path of the published copy that all readers open."""
    return home / "results.duckdb"


def ingest_state(home: Path) -> Path:
    """Return the path of the file with the hash of what the last ingest read."""
    return home / "slm.duckdb.seen"


def escape(path: Path) -> str:
    """Return a path for a quoted SQL literal, in statements that take no parameters there."""
    return str(path).replace("'", "''")


def damaged(path: Path, reason: object) -> StoreError:
    """Return the error for a database that has to be rebuilt."""
    return StoreError(f"{path}: {first_line(reason)}; {REBUILD_HINT}")


def no_results(name: object) -> StoreError:
    """Return the error for a home or server without tables."""
    return StoreError(
        f"{name}: no results yet: `slm sweep` makes some, `slm store rebuild` reads old ones"
    )


def first_line(error: object) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
