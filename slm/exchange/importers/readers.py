"""Read tables (CSV with any delimiter, Markdown) and map their columns to the project's names."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slm.exchange.importers.numbers import SECONDS, is_empty, number, seconds
from slm.exchange.importers.types import (
    COLUMNS,
    COUNTS,
    MEASURES,
    TEXTS,
    Defect,
    Names,
    ParsedSource,
    Row,
)

MAX_ROWS = 100_000
SIGNED = ("seed", "val_bpb", "val_loss", "train_loss", "core")
"""Columns of numbers that may be negative."""
TIMES = ("train_seconds", "wall_seconds")
TIME_UNITS = {name: size for name, size in SECONDS.items() if name not in "mhd"}
MEMORY_UNITS = {"mb": 1e6, "gb": 1e9, "mib": 2.0**20, "gib": 2.0**30}
COUNT_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "millions": 1e6, "billions": 1e9}
UNITS = {
    **dict.fromkeys(COUNTS, COUNT_UNITS),
    **dict.fromkeys(TIMES, TIME_UNITS),
    "peak_memory_bytes": MEMORY_UNITS,
}
"""Factors of the units that the header of a column may name."""
ALIASES = {
    "loss": "val_bpb",
    "params": "parameters_scaling",
    "parameters": "parameters_scaling",
    "tokens": "tokens",
    "flops": "flops",
    "depth": "depth",
    "run": "label",
    "seconds": "train_seconds",
}
"""Short names that `--map` accepts for columns."""


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    header: Sequence[str]
    lines: Sequence[tuple[int, dict[str, str]]]
    """Line number in the file, and cells by column."""
    ragged: Sequence[int] = ()
    """Lines with more or fewer cells than the header."""

    @property
    def names(self) -> dict[str, str]:
        """Header by its normalised form."""
        return {plain(name): name for name in self.header}


@dataclass(frozen=True)
class Column:
    """A column of the source under the project's name."""

    name: str
    source: str
    """The column's name in the source."""
    factor: float
    """Multiplier of its numbers: 1e6 where the header counts in millions."""

    @property
    def description(self) -> str:
        """The column's name in the source, with its factor if it has one."""
        return self.source if self.factor == 1.0 else f"{self.source} × {self.factor:g}"


# Tables


def read_table(text: str) -> Table:
    """Parse the only table of a text.

    Raises ValueError for no table or several, a repeated column, no rows or too many.
    """
    if not text.strip():
        raise ValueError("the file is empty")
    rows = _markdown_rows(text) if is_markdown(text) else _csv_rows(text)
    (_, names), *body = rows
    if not body:
        raise ValueError("the table has a header and no rows")
    if len(body) > MAX_ROWS:
        raise ValueError(f"the table has {len(body):,} rows; at most {MAX_ROWS:,} are read")
    while names and not names[-1]:
        names.pop()
    for name, repeats in Counter(names).items():
        if repeats > 1:
            raise ValueError(f"column {name!r} appears twice in the header")
    lines = []
    ragged = []
    for line, cells in body:
        if len(cells) < len(names) or any(cells[len(names) :]):
            ragged.append(line)
        padded = cells + [""] * len(names)
        lines.append((line, dict(zip(names, padded))))
    return Table(names, lines, ragged)


def is_markdown(text: str) -> bool:
    """Whether a text has a Markdown table, recognised by its separator line (`| --- | :-- |`)."""
    return any(
        "--" in line and "|" in line and not line.strip(" \t:|-") for line in text.splitlines()
    )


def _csv_rows(text: str) -> list[tuple[int, list[str]]]:
    header = next(line for line in text.splitlines() if line.strip())
    delimiter = max("\t,;", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return [(line, cells) for line, cells in rows if any(cells)]


def _markdown_rows(text: str) -> list[tuple[int, list[str]]]:
    tables: list[list[tuple[int, list[str]]]] = []
    lines = enumerate(text.splitlines(), 1)
    numbered = [(position, line) for position, line in lines if line.strip()]
    next_lines = [line for _, line in numbered[1:]]
    for (position, line), next_line in zip(numbered, [*next_lines, ""]):
        if "|" not in line:
            continue
        if is_markdown(next_line):
            tables.append([(position, _markdown_cells(line))])
        elif tables and position - tables[-1][-1][0] <= 2 and not is_markdown(line):
            tables[-1].append((position, _markdown_cells(line)))
    if len(tables) != 1:
        raise ValueError(f"{len(tables)} Markdown tables: keep one in the file")
    return tables[0]


def _markdown_cells(line: str) -> list[str]:
    without_marks = re.sub(r"\*\*|`", "", line)
    inner = re.sub(r"^\s*\||\|\s*$", "", without_marks)
    cells = re.split(r"(?<!\\)\|", inner)
    return [cell.strip() for cell in cells]


def plain(header: str) -> str:
    """Normalise a header: "CORE (Centered)" is core, "Val BPB" is val_bpb."""
    without_brackets = re.sub(r"\(.*?\)|\[.*?\]", "", header.lower())
    return re.sub(r"[^a-z0-9]+", "_", without_brackets).strip("_")


# Columns


def by_spelling(spellings: Names) -> dict[str, str]:
    """Return the column of each normalised header, from the headers of each column as words."""
    return {name: column for column, names in spellings.items() for name in names.split()}


def _choose_columns(header: Sequence[str], synonyms: Names, mapping: Names) -> list[Column]:
    """Return the columns of `--map`, then those known by synonym (normalised header -> column).

    The first header of a column counts. Raises ValueError for an unknown name in the mapping.
    """
    columns: dict[str, Column] = {}
    for name, source in mapping.items():
        target = ALIASES.get(name, name)
        if target not in COLUMNS:
            known = ", ".join(ALIASES)
            raise ValueError(
                f"--map {name}={source}: unknown column {name!r}; some are {known}, core"
            )
        if source not in header:
            there_are = ", ".join(header)[:300]
            raise ValueError(f"--map {name}={source}: no column {source!r}; there are {there_are}")
        units = UNITS.get(target, {})
        factors = [units[unit] for unit in _units(source) if unit in units]
        columns[target] = Column(target, source, factors[0] if factors else 1.0)
    mapped = set(mapping.values())
    for source in header:
        column = _recognise(source, synonyms)
        if column and source not in mapped:
            columns.setdefault(column.name, column)
    return list(columns.values())


def _recognise(header: str, synonyms: Names) -> Column | None:
    """Return the column that a header names by itself, or without its last word, a unit.

    A synonym for "name:7" multiplies by 7.
    """
    name = plain(header)
    unit, last_word = _units(header)
    is_full_name = name in synonyms
    if not is_full_name:
        name = name.removesuffix(f"_{last_word}")
        unit = last_word
    target, _, multiplier = synonyms.get(name, "").partition(":")
    factor = UNITS.get(target, {}).get(unit, 1.0 if is_full_name else None)
    if factor is None:
        return None
    return Column(target, header, factor * float(multiplier or 1))


def _units(header: str) -> tuple[str, str]:
    """Return what may be a unit: the word in brackets, and the last of several words, else ""."""
    bracket = re.search(r"[(\[]\s*([a-z]+)\s*[)\]]", header.lower())
    words, _, last_word = plain(header).rpartition("_")
    return bracket[1] if bracket else "", last_word if words else ""


# Rows


def parse_rows(table: Table, synonyms: Names, mapping: Names) -> ParsedSource:
    """Convert cells to values under the project's names; report cells that are not numbers.

    `synonyms` maps normalised headers to columns, `mapping` is the user's `--map`. Raises
    ValueError for an unknown name in the mapping.
    """
    columns = _choose_columns(table.header, synonyms, mapping)
    rows = []
    defects = [
        Defect("ragged", "more or fewer cells than the header", line) for line in table.ragged
    ]
    for line, cells in table.lines:
        row = Row(line, {}, cells, {})
        for column in columns:
            text = cells[column.source]
            try:
                _set_value(row, column, text)
            except ValueError as error:
                defects.append(Defect("bad-number", str(error), line, column.source))
            if column.name in row.units and re.search(r"E[+-]0\d\d$", text):
                digits = len(re.sub("[^0-9]", "", text.partition("E")[0]))
                message = f"{text}: {digits} digits remain"
                defects.append(Defect("spreadsheet", message, line, column.source))
        rows.append(row)
    return ParsedSource(rows, defects, {column.name: column.description for column in columns})


def _set_value(row: Row, column: Column, text: str) -> None:
    """Set the value of a cell. Raises ValueError for what is no number; a count of -1 is "off"."""
    name = column.name
    if is_empty(text):
        return
    if name in TEXTS:
        row.values[name] = text
        return
    parsed = seconds(text, column.factor) if name in TIMES else number(text, column.factor)
    if parsed is None:
        raise ValueError(f"{text[:40]!r} is not a number")
    if parsed.value < 0 and name not in SIGNED:
        if name in MEASURES:
            raise ValueError(f"{text[:40]!r} is negative")
        if parsed.value != -1:
            raise ValueError(f"{text[:40]!r} is not a count")
        return
    row.values[name] = round(parsed.value) if name in COUNTS else parsed.value
    row.units[name] = parsed.unit
