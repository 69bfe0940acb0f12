"""Read tables (CSV with any delimiter, Markdown) and map their columns to the project's names."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slm.exchange.importers.numbers import EMPTY, SECONDS, Number, number, seconds
from slm.exchange.importers.types import COLUMNS, COUNTS, MEASURES, TEXTS, Defect, ParsedSource, Row

MAX_ROWS = 100_000
TIMES = ("train_seconds", "wall_seconds")
SIGNED = ("val_bpb", "val_loss", "train_loss", "core")
"""Measured columns that may be negative."""


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    header: tuple[str, ...]
    lines: tuple[tuple[int, dict[str, str]], ...]
    """Line number in the file, and cells by column."""
    ragged: tuple[int, ...] = ()
    """Lines with more or fewer cells than the header."""


@dataclass(frozen=True)
class Column:
    """A column of the source under the project's name."""

    name: str
    source: str
    """The column's name in the source."""
    factor: float = 1.0
    """Multiplier of its numbers: 1e6 where the header counts in millions."""


def read_table(text: str) -> Table:
    """Parse the only table of a text.

    Raises ValueError for no table or several, a repeated column, no rows or too many.
    """
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise ValueError("the file is empty")
    if is_markdown(text):
        rows = list(_markdown_rows(numbered))
    else:
        rows = list(_csv_rows(text, _delimiter(numbered[0][1])))
    (_, header), *body = rows
    if not body:
        raise ValueError("the table has a header and no rows")
    if len(body) > MAX_ROWS:
        raise ValueError(f"the table has {len(body):,} rows; at most {MAX_ROWS:,} are read")
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    for name, repeats in Counter(names).items():
        if repeats > 1:
            raise ValueError(f"column {name!r} appears twice in the header")
    ragged = [line for line, cells in body if any(cells[len(names) :]) or len(cells) < len(names)]
    lines = [(line, dict(zip(names, [*cells, *[""] * len(names)]))) for line, cells in body]
    return Table(tuple(names), tuple(lines), tuple(ragged))


def is_markdown(text: str) -> bool:
    """Whether a text has a Markdown table, recognised by its separator line (`| --- | :-- |`)."""
    return any(
        "--" in line and "|" in line and not line.strip(" \t:|-") for line in text.splitlines()
    )


def _delimiter(header: str) -> str:
    return max("\t,;", key=header.count)


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _markdown_rows(numbered: Sequence[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    tables: list[list[tuple[int, list[str]]]] = []
    for (line, text), (_, next_text) in zip(numbered, [*numbered[1:], (0, "")]):
        if "|" not in text:
            continue
        if is_markdown(next_text):
            tables.append([(line, _markdown_cells(text))])
        elif tables and line - tables[-1][-1][0] <= 2 and not is_markdown(text):
            tables[-1].append((line, _markdown_cells(text)))
    if len(tables) != 1:
        raise ValueError(f"{len(tables)} Markdown tables: keep one in the file")
    yield from tables[0]


def _markdown_cells(line: str) -> list[str]:
    inner = re.sub(r"^\s*\||\|\s*$", "", line)
    return [re.sub(r"\*\*|`", "", cell).strip() for cell in re.split(r"(?<!\\)\|", inner)]


def plain(header: str) -> str:
    """Normalise a header: "CORE (Centered)" is core, "Val BPB" is val_bpb."""
    without_brackets = re.sub(r"\(.*?\)|\[.*?\]", "", header.lower())
    return re.sub(r"[^a-z0-9]+", "_", without_brackets).strip("_")


def match_columns(header: Sequence[str], synonyms: Mapping[str, str]) -> list[Column]:
    """Map headers to the project's columns by synonyms (normalised header -> column).

    Units in headers become factors, and a synonym "name:7" multiplies by 7. The first match of a
    column counts.
    """
    columns: dict[str, Column] = {}
    for source in header:
        for name, factor in _readings(source):
            target, _, multiplier = synonyms.get(name, "").partition(":")
            if target and _unit_fits(target, source, factor):
                columns.setdefault(target, Column(target, source, factor * float(multiplier or 1)))
                break
    return list(columns.values())


UNITS = {
    "k": 1e3,
    "m": 1e6,
    "b": 1e9,
    "t": 1e12,
    "millions": 1e6,
    "billions": 1e9,
    "mb": 1e6,
    "gb": 1e9,
    "mib": 2.0**20,
    "gib": 2.0**30,
    **{name: value for name, value in SECONDS.items() if name not in "mhd"},
}
"""Factors of the units that headers end with."""


def _readings(source: str) -> Iterator[tuple[str, float]]:
    """Yield readings (name, factor) of a header: unit in brackets, no unit, last word as unit."""
    name = plain(source)
    bracket = re.search(r"[(\[]\s*([a-zA-Z]+)\s*[)\]]", source)
    if bracket and bracket[1].lower() in UNITS:
        yield name, UNITS[bracket[1].lower()]
    yield name, 1.0
    base, _, unit = name.rpartition("_")
    if base and unit in UNITS:
        yield base, UNITS[unit]


def _unit_fits(target: str, source: str, factor: float) -> bool:
    """Whether the unit in a header suits a column: minutes for times, millions for counts."""
    if factor == 1.0:
        return True
    unit = (re.findall(r"[a-z]+", source.lower()) or [""])[-1]
    if unit in SECONDS and unit not in "mhd":
        return target in TIMES
    if unit in ("mb", "gb", "mib", "gib"):
        return target == "peak_memory_bytes"
    return target in COUNTS and target != "peak_memory_bytes"


def parse_rows(table: Table, columns: Sequence[Column]) -> ParsedSource:
    """Convert cells to values under the project's names; report cells that are not numbers."""
    rows: list[Row] = []
    defects = [
        Defect("ragged", "more or fewer cells than the header", line) for line in table.ragged
    ]
    for line, cells in table.lines:
        values: dict[str, object] = {}
        units: dict[str, float] = {}
        for column in columns:
            text = cells[column.source]
            if text.lower() in EMPTY:
                continue
            if column.name in TEXTS:
                values[column.name] = text
                continue
            parsed = _parse_cell(column, text)
            if isinstance(parsed, Number):
                is_count = column.name in COUNTS
                values[column.name] = round(parsed.value) if is_count else parsed.value
                units[column.name] = parsed.unit
                defects += _spreadsheet_defects(text, line, column.source)
            elif parsed:
                defects.append(Defect("bad-number", parsed, line, column.source))
        rows.append(Row(line, values, dict(cells), units))
    return ParsedSource(rows, defects, {column.name: _describe(column) for column in columns})


def _parse_cell(column: Column, text: str) -> Number | str:
    """Return the number of a cell, or its fault; a count of -1 means "off" and is no fault ("")."""
    parsed = seconds(text, column.factor) if column.name in TIMES else number(text)
    if parsed is None:
        return f"{text[:40]!r} is not a number"
    if column.name not in TIMES:
        parsed = parsed.times(column.factor)
    if parsed.value < 0 and column.name in MEASURES and column.name not in SIGNED:
        return f"{text[:40]!r} is negative"
    if parsed.value < 0 and column.name in COUNTS and column.name != "seed":
        return "" if parsed.value == -1 else f"{text[:40]!r} is not a count"
    return parsed


def _spreadsheet_defects(text: str, line: int, column: str) -> Iterator[Defect]:
    if re.search(r"E[+-]0\d\d$", text):
        digits = len(re.sub("[^0-9]", "", text.split("E")[0]))
        yield Defect("spreadsheet", f"{text}: {digits} digits remain", line, column)


def _describe(column: Column) -> str:
    return column.source if column.factor == 1.0 else f"{column.source} × {column.factor:g}"


def choose_columns(
    header: Sequence[str], synonyms: Mapping[str, str], mapping: Mapping[str, str]
) -> list[Column]:
    """Return the columns to read: those of `--map` first, then those known by synonym.

    Raises ValueError as `mapped_columns` does.
    """
    mapped = mapped_columns(header, mapping)
    targets = {column.name for column in mapped}
    sources = {column.source for column in mapped}
    known = match_columns([name for name in header if name not in sources], synonyms)
    return [*mapped, *(column for column in known if column.name not in targets)]


def mapped_columns(header: Sequence[str], mapping: Mapping[str, str]) -> list[Column]:
    """Return the columns of a `--map`. Raises ValueError for an unknown target or source."""
    columns = []
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
        factors = [factor for _, factor in _readings(source) if _unit_fits(target, source, factor)]
        factor = next((factor for factor in factors if factor != 1.0), 1.0)
        columns.append(Column(target, source, factor))
    return columns


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
