"""Where the files of the store are, and what can go wrong. Standard library only."""

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
"""Of a query: values of `?`, or of `$name`."""
Run = Callable[[str, Parameters | None], "pandas.DataFrame"]
"""A query and its parameters to its rows."""

VERSION = 3
"""Of the tables and views."""
SERVER = "postgresql+psycopg://"


class StoreError(RuntimeError):
    """The store cannot do it; the message is one line that says the way out."""


class QueryError(StoreError, ValueError):
    """What was asked of the store is wrong: the SQL, a name."""


def home() -> Path:
    """The folder of runs: $SLM_HOME, else ./runs."""
    return Path(os.environ.get("SLM_HOME") or "runs")


def server() -> str | None:
    """The PostgreSQL that holds the results of several homes: $SLM_STORE. None: a DuckDB file in each home.

    Raises StoreError for another address, and where its package is missing.
    """
    url = os.environ.get("SLM_STORE") or None
    if url and not url.startswith(SERVER):
        kind = url.partition(":")[0]
        raise StoreError(
            f"SLM_STORE={kind}:…: write {SERVER}USER@HOST/DATABASE, or unset it for a file in each home"
        )
    if url and find_spec("psycopg") is None:
        raise StoreError("SLM_STORE needs the package psycopg: pip install 'slm[postgres]'")
    return url


def identity(home: Path) -> str | None:
    """What a home's rows are known by, None before its first ingest. Raises StoreError where home.json says nothing."""
    path = home / "home.json"
    try:
        known = json.loads(path.read_bytes())["id"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if not isinstance(known, str) or not re.fullmatch("[0-9a-f]{8}", known):
        raise StoreError(
            f"{path}: its id should be 8 hex digits; without the file, the next ingest gives another"
        )
    return known


def identified(home: Path) -> str:
    """What a home's rows are known by, from now on if it had no name."""
    known = identity(home)
    if known is None:
        known = secrets.token_hex(4)
        temporary = home / "home.json.new"
        name = f"{_user()}@{platform.node()}:{home.resolve()}"
        temporary.write_text(json.dumps({"id": known, "name": name}), encoding="utf-8")
        temporary.replace(home / "home.json")
    return known


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number alone
        return str(os.getuid())


def live(home: Path) -> Path:
    """The database that only an ingest opens."""
    return home / "slm.duckdb"


def snapshot(home: Path) -> Path:
    """The published copy that everyone reads."""
    return home / "results.duckdb"


def seen(home: Path) -> Path:
    """What the last ingest saw, as a hash."""
    return home / "slm.duckdb.seen"


def quoted(path: Path) -> str:
    """A path inside the quotes of a statement that takes no parameter there."""
    return str(path).replace("'", "''")


def damaged(path: Path, why: object) -> StoreError:
    """The error for a database that can only be made anew."""
    return StoreError(
        f"{path}: {first_line(why)}; `slm store rebuild` makes it anew from the run folders"
    )


def first_line(error: object) -> str:
    """First line of an error's message."""
    return str(error).strip().partition("\n")[0]
