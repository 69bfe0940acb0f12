"""Rows of a query as text or Parquet, batch by batch: NULL, NaN and the last digit as they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from itertools import chain
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


SPECIAL = re.compile(r'[,"\r\n]')
"""What a field of CSV is quoted for."""


class Format(StrEnum):
    """How a query's rows are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    MARKDOWN = "markdown"
    PARQUET = "parquet"


def write(rows: pyarrow.RecordBatchReader, kind: Format, file: IO[bytes]) -> None:
    """Write rows to a file. Raises ValueError where JSON or Parquet would have two columns of one name."""
    import io

    if kind is Format.PARQUET:
        from store import tables

        _check_names(rows)
        tables.write_parquet(rows, file)
        return
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        {Format.CSV: _csv, Format.JSON: _json}.get(kind, _table)(rows, text, kind)
    finally:
        text.detach()


def _check_names(rows: pyarrow.RecordBatchReader) -> None:
    names = rows.schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns are named {twice[0]}: name one of them anew, with AS")


def _values(rows: pyarrow.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    """Rows of plain values; what is a whole number is one, of any size."""
    for batch in rows:
        yield from zip(
            *([_plain(value) for value in column.to_pylist()] for column in batch.columns),
            strict=True,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _csv(rows: pyarrow.RecordBatchReader, file: IO[str], kind: Format) -> None:
    """NULL is nothing between the commas, a text of no letters two quotes."""
    for row in chain([rows.schema.names], _values(rows)):
        file.write(",".join(map(_field, row)) + "\n")


def _field(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    return f'"{text.replace(chr(34), chr(34) * 2)}"' if not text or SPECIAL.search(text) else text


def _json(rows: pyarrow.RecordBatchReader, file: IO[str], kind: Format) -> None:
    """One list; NULL is null, and NaN and infinities, which JSON has not, are the texts NaN, Infinity and -Infinity."""
    _check_names(rows)
    between = "[\n "
    for row in _values(rows):
        named = {name: _finite(value) for name, value in zip(rows.schema.names, row, strict=True)}
        file.write(between + json.dumps(named, allow_nan=False))
        between = ",\n "
    file.write("\n]\n" if between[0] == "," else "[]\n")


def _finite(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _table(rows: pyarrow.RecordBatchReader, file: IO[str], kind: Format) -> None:
    """NULL is a dash; floats have six digits."""
    import pyarrow
    from tabulate import tabulate

    words = [[_cell(value, kind) for value in row] for row in _values(rows)]
    are_numbers = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_decimal)
    aligned = [
        "right" if any(test(field.type) for test in are_numbers) else "left"
        for field in rows.schema
    ]
    style = "github" if kind is Format.MARKDOWN else "simple"
    settings = {"headers": rows.schema.names, "tablefmt": style, "disable_numparse": True}
    file.write(tabulate(words, **settings, colalign=aligned if words else None) + "\n")


def _cell(value: Any, kind: Format) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split("\n"))
    return text.replace("|", "\\|") if kind is Format.MARKDOWN else text
