"""A PostgreSQL with the results of several homes, in a separate schema for each store version."""

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

from store import paths, schema
from store.paths import Parameters, QueryError, RunQuery, StoreError

if TYPE_CHECKING:
    import pandas

SCHEMA = f"slm_v{paths.VERSION}"
LOCK = 0x736C6D
"""Advisory lock for creating the tables; the lock for writing a home adds the home's id."""
CONNECT_SECONDS = 10
"""Seconds to wait for a connection."""
CHUNK = 2**20
"""Bytes sent at a time."""


@contextmanager
def open_for_writing(url: str, home: str) -> Iterator[Connection]:
    """Yield the only connection that may write a home, and create the tables if there are none.

    Raises BlockingIOError while another process writes that home, StoreError when the server does
    not answer.
    """
    with _connected(url) as connection:
        with connection.begin():
            key = (LOCK << 32) + int(home, 16)
            if not connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({key})").scalar():
                raise BlockingIOError(
                    f"{_without_password(url)}: another process writes home {home}; "
                    "is there a copy of it?"
                )
            if not _has_tables(connection):
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
                if not _has_tables(connection):
                    connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                    schema.create(connection)
        yield connection


def ping(url: str) -> str:
    """Connect to a server, and return its address without the password.

    Raises StoreError if it does not answer.
    """
    with _connected(url):
        return _without_password(url)


@contextmanager
def open_for_reading(url: str) -> Iterator[RunQuery]:
    """Yield a function that runs queries in one read-only transaction.

    Raises StoreError if there are no tables.
    """
    with _connected(url) as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        if not _has_tables(connection):
            raise paths.no_results(_without_password(url))
        raw: Any = connection.connection.driver_connection
        raw.adapters.register_loader("numeric", FloatLoader)
        raw.adapters.register_loader("json", TextLoader)
        yield lambda query, params: _run(raw, query, params)


def copy_file(connection: Connection, statement: str, path: Path) -> None:
    """Send a file to a COPY statement. Raises DBAPIError, as other statements do."""
    raw: Any = connection.connection.driver_connection
    try:
        with path.open("rb") as file, raw.cursor().copy(statement) as copy:
            while chunk := file.read(CHUNK):
                copy.write(chunk)
    except psycopg.Error as error:
        raise DBAPIError.instance(statement, None, error, psycopg.Error) from None


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    try:
        arguments = {"connect_timeout": CONNECT_SECONDS}
        connection = create_engine(url, poolclass=NullPool, connect_args=arguments).connect()
    except (ArgumentError, ValueError):
        raise StoreError(
            f"SLM_STORE is not an address: write {paths.POSTGRES_SCHEME}USER@HOST/DATABASE"
        ) from None
    except DBAPIError as error:
        reason = paths.first_line(error.orig)
        raise StoreError(f"{_without_password(url)}: cannot connect: {reason}") from None
    with connection:
        connection.exec_driver_sql(f"SET search_path TO {SCHEMA}")
        connection.commit()
        yield connection


def _has_tables(connection: Connection) -> bool:
    """Whether the tables exist, by the catalogue: a table looked up before is cached as missing."""
    condition = f"schemaname = '{SCHEMA}' AND tablename = 'schema_version'"
    query = f"SELECT count(*) FROM pg_tables WHERE {condition}"  # noqa: S608
    return bool(connection.exec_driver_sql(query).scalar())


def _without_password(url: str) -> str:
    return make_url(url).render_as_string(hide_password=True)


_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/|\?|\$(\w+)""", re.DOTALL)
"""Parameters, and quoted text and comments, where `?` and `$` mean nothing."""


def numbered(query: str, params: Parameters | None) -> tuple[str, list[Any]]:
    """Convert `?` and `$name` of a query to PostgreSQL's `$1`, and return it with the values in
    order.

    Raises QueryError when the parameters are not those of the query.
    """
    if isinstance(params, Mapping):
        values = dict(params)
    else:
        values = {str(number): value for number, value in enumerate(params or (), 1)}
    used: list[str] = []

    def number(match: re.Match[str]) -> str:
        name = str(len(used) + 1) if match[0] == "?" else match[1]
        if name is None:
            return match[0]
        if name not in used:
            used.append(name)
        return f"${used.index(name) + 1}"

    text = _TOKEN.sub(number, query)
    if set(used) != set(values):
        expected = ", ".join(used) or "none"
        raise QueryError(
            f"the query's parameters are {expected}; got {', '.join(values) or 'none'}"
        )
    return text, [values[name] for name in used]


def _run(raw: psycopg.Connection[Any], query: str, params: Parameters | None) -> pandas.DataFrame:
    text, values = numbered(query, params)
    try:
        with psycopg.RawCursor(raw) as cursor:
            cursor.execute(text.encode(), values, prepare=True)  # refuses several statements
            if cursor.description is None:
                raise QueryError(
                    f"not a query: {paths.first_line(query)!r}; the database is read-only"
                )
            return _frame(cursor)
    except psycopg.OperationalError as error:
        raise StoreError(f"the server gave up on the query: {paths.first_line(error)}") from None
    except psycopg.Error as error:
        raise QueryError(paths.first_line(error)) from None


def _frame(cursor: psycopg.RawCursor[Any]) -> pandas.DataFrame:
    """Return rows with the types that DuckDB gives: a column of numbers stays numeric if all are
    NULL."""
    import pandas

    rows = cursor.fetchall()
    columns = cursor.description or []
    series = []
    for index, column in enumerate(columns):
        values = pandas.Series([row[index] for row in rows], dtype=object)
        series.append(_typed(values, column.type_code))
    frame = pandas.concat(series, axis=1)
    frame.columns = [column.name for column in columns]
    return frame


_TYPES = {
    16: ("bool", "boolean"),
    20: ("int64", "Int64"),
    21: ("int16", "Int16"),
    23: ("int32", "Int32"),
}
_TYPES |= dict.fromkeys((700, 701, 1700), ("float64", "float64"))
"""Pandas types without and with NULLs, by PostgreSQL's codes of booleans, integers and floats."""


def _typed(values: pandas.Series[Any], type_code: int) -> pandas.Series[Any]:
    dtypes: tuple[Any, Any] | None = _TYPES.get(type_code)
    if dtypes is None:
        return values.infer_objects()
    return values.astype(dtypes[bool(values.isna().any())])
