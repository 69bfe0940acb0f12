"""Rows of a query as text or Parquet, one batch at a time; NULL, NaN and all digits are kept."""

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


QUOTED_CHARACTERS = re.compile(r'[,"\r\n]')
"""Characters that make a CSV field quoted."""


class Format(StrEnum):
    """Output format of a query's rows."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    MARKDOWN = "markdown"
    PARQUET = "parquet"


def write_rows(rows: pyarrow.RecordBatchReader, output_format: Format, file: IO[bytes]) -> None:
    """Write rows to a file. Raises ValueError for JSON or Parquet with two columns of one name."""
    import io

    if output_format is Format.PARQUET:
        from store import tables

        _check_names(rows)
        tables.write_parquet(rows, file)
        return
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        if output_format is Format.CSV:
            _write_csv(rows, text)
        elif output_format is Format.JSON:
            _write_json(rows, text)
        else:
            _write_table(rows, text, markdown=output_format is Format.MARKDOWN)
    finally:
        text.detach()


def _check_names(rows: pyarrow.RecordBatchReader) -> None:
    names = rows.schema.names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns are named {repeated[0]}: rename one of them with AS")


def _values(rows: pyarrow.RecordBatchReader) -> Iterator[tuple[Any, ...]]:
    for batch in rows:
        yield from zip(
            *([_plain(value) for value in column.to_pylist()] for column in batch.columns),
            strict=True,
        )


def _plain(value: Any) -> Any:
    """Return a value as one of Python's plain types; whole decimals become integers of any size."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _write_csv(rows: pyarrow.RecordBatchReader, file: IO[str]) -> None:
    """Write CSV; NULL is an empty field, an empty text two quotes."""
    for row in chain([rows.schema.names], _values(rows)):
        file.write(",".join(map(_csv_field, row)) + "\n")


def _csv_field(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    if not text or QUOTED_CHARACTERS.search(text):
        return '"' + text.replace('"', '""') + '"'
    return text


def _write_json(rows: pyarrow.RecordBatchReader, file: IO[str]) -> None:
    """Write one list; NaN and infinities are the texts NaN, Infinity and -Infinity."""
    _check_names(rows)
    separator = "[\n "
    for row in _values(rows):
        document = {
            name: _json_value(value) for name, value in zip(rows.schema.names, row, strict=True)
        }
        file.write(separator + json.dumps(document, allow_nan=False))
        separator = ",\n "
    file.write("\n]\n" if separator[0] == "," else "[]\n")


def _json_value(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _write_table(rows: pyarrow.RecordBatchReader, file: IO[str], markdown: bool) -> None:
    """Write an aligned table; NULL is a dash, floats have six digits."""
    import pyarrow
    from tabulate import tabulate

    cells = [[_cell(value, markdown) for value in row] for row in _values(rows)]
    is_number = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_decimal)
    alignment = [
        "right" if any(test(field.type) for test in is_number) else "left" for field in rows.schema
    ]
    table = tabulate(
        cells,
        headers=rows.schema.names,
        tablefmt="github" if markdown else "simple",
        disable_numparse=True,
        colalign=alignment if cells else None,
    )
    file.write(table + "\n")


def _cell(value: Any, markdown: bool) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split("\n"))
    return text.replace("|", "\\|") if markdown else text
