"""A PostgreSQL that holds the results of several homes, in a schema of its own for each version of the store."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.types.numeric import FloatLoader
from psycopg.types.string import TextLoader
from sqlalchemy import Connection, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from store import paths as places
from store import schema
from store.paths import Parameters, QueryError, Run, StoreError

if TYPE_CHECKING:
    import pandas

SCHEMA = f"slm_v{places.VERSION}"
LOCK = 0x736C6D
"""Advisory lock of who makes the tables; that of who writes a home has the home's number beside it."""
PATIENCE = 10
"""Seconds to wait for the server to answer at all."""
CHUNK = 2**20
"""Bytes sent at a time."""


@contextmanager
def opened(url: str, home: str) -> Iterator[Connection]:
    """A connection that alone writes a home, the tables made first where there are none.

    Raises BlockingIOError while another process writes that home, StoreError where the server does not answer.
    """
    with _connected(url) as connection:
        with connection.begin():
            key = (LOCK << 32) + int(home, 16)
            if not connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({key})").scalar():
                raise BlockingIOError(
                    f"{_shown(url)}: another process writes home {home}; is there a copy of it?"
                )
            if not _is_made(connection):
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
                if not _is_made(connection):
                    connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                    schema.create(connection)
        yield connection


def reached(url: str) -> str:
    """The address of a server that answers, without its password. Raises StoreError where it does not answer."""
    with _connected(url):
        return _shown(url)


@contextmanager
def reading(url: str) -> Iterator[Run]:
    """What runs queries of one transaction that reads alone. Raises StoreError where there is nothing to read."""
    with _connected(url) as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        if not _is_made(connection):
            raise StoreError(
                f"{_shown(url)}: no results yet: `slm sweep` makes some, `slm store rebuild` reads old ones"
            )
        raw: Any = connection.connection.driver_connection
        raw.adapters.register_loader("numeric", FloatLoader)
        raw.adapters.register_loader("json", TextLoader)
        yield lambda query, params: _run(raw, query, params)


def copy(connection: Connection, statement: str, path: Path) -> None:
    """Send a file to a COPY. Raises DBAPIError, as statements do."""
    raw: Any = connection.connection.driver_connection
    try:
        with path.open("rb") as file, raw.cursor().copy(statement) as out:
            while chunk := file.read(CHUNK):
                out.write(chunk)
    except psycopg.Error as error:
        raise DBAPIError.instance(statement, None, error, psycopg.Error) from None


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    try:
        wait = {"connect_timeout": PATIENCE}
        connection = create_engine(url, poolclass=NullPool, connect_args=wait).connect()
    except (ArgumentError, ValueError):
        raise StoreError(
            f"SLM_STORE is no address: write {places.SERVER}USER@HOST/DATABASE"
        ) from None
    except DBAPIError as error:
        raise StoreError(
            f"{_shown(url)}: the server does not let us in: {places.first_line(error.orig)}"
        ) from None
    with connection:
        connection.exec_driver_sql(f"SET search_path TO {SCHEMA}")
        connection.commit()
        yield connection


def _is_made(connection: Connection) -> bool:
    """From the catalogue's rows: names that were looked up before may be remembered as missing."""
    there = f"SELECT count(*) FROM pg_tables WHERE schemaname = '{SCHEMA}' AND tablename = 'schema_version'"
    return bool(connection.exec_driver_sql(there).scalar())


def _shown(url: str) -> str:
    """An address without its password."""
    return make_url(url).render_as_string(hide_password=True)


_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|\?|\$(\w+)""", re.DOTALL)
"""What is no parameter though it may look like one, and parameters."""


def numbered(query: str, params: Parameters | None) -> tuple[str, list[Any]]:
    """A query with `?` or `$name` as PostgreSQL's `$1`, and the values in that order. Raises QueryError for others."""
    named = params if isinstance(params, Mapping) else None
    used: list[str] = []

    def number(match: re.Match[str]) -> str:
        name = str(len(used) + 1) if match[0] == "?" else match[1]
        if name is None:
            return match[0]
        if name not in used:
            used.append(name)
        return f"${used.index(name) + 1}"

    text = _TOKEN.sub(number, query)
    values = (
        named if named is not None else {str(at): value for at, value in enumerate(params or (), 1)}
    )
    if set(used) != set(values):
        there, given = (", ".join(map(str, own)) or "none" for own in (used, values))
        raise QueryError(f"the query's parameters are {there}; given are {given}")
    return text, [values[name] for name in used]


def _run(raw: psycopg.Connection[Any], query: str, params: Parameters | None) -> pandas.DataFrame:
    text, values = numbered(query, params)
    try:
        with psycopg.RawCursor(raw) as cursor:
            cursor.execute(text.encode(), values, prepare=True)  # which refuses several statements
            if cursor.description is None:
                raise QueryError(
                    f"not a query: {places.first_line(query)!r}; the database is read-only"
                )
            return _frame(cursor)
    except psycopg.OperationalError as error:
        raise StoreError(f"the server gave up: {places.first_line(error)}") from None
    except psycopg.Error as error:
        raise QueryError(places.first_line(error)) from None


def _frame(cursor: psycopg.RawCursor[Any]) -> pandas.DataFrame:
    """Rows as DuckDB gives them: numbers as numbers where all are NULL too."""
    import pandas

    rows = cursor.fetchall()
    columns = cursor.description or []
    series = [
        _typed(pandas.Series([row[at] for row in rows], dtype=object), own.type_code)
        for at, own in enumerate(columns)
    ]
    frame = pandas.concat(series, axis=1)
    frame.columns = [own.name for own in columns]
    return frame


_TYPES = {
    16: ("bool", "boolean"),
    20: ("int64", "Int64"),
    21: ("int16", "Int16"),
    23: ("int32", "Int32"),
}
_TYPES |= dict.fromkeys((700, 701, 1700), ("float64", "float64"))
"""Of booleans, integers and floats by PostgreSQL's numbers: pandas' types without NULLs, and with."""


def _typed(values: pandas.Series[Any], type_code: int) -> pandas.Series[Any]:
    dtypes: tuple[Any, Any] | None = _TYPES.get(type_code)
    return (
        values.infer_objects()
        if dtypes is None
        else values.astype(dtypes[bool(values.isna().any())])
    )
