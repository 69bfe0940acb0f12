"""Tables: CSV of any delimiter and Markdown, and their columns under our names."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from slm.exchange.importers.numbers import EMPTY, SECONDS, Number, number, seconds
from slm.exchange.importers.types import COLUMNS, COUNTS, MEASURES, TEXTS, Defect, Found, Row

LONGEST = 100_000
"""Rows of a table."""
TIMES = ("train_seconds", "wall_seconds")


@dataclass(frozen=True)
class Sheet:
    """A table of texts."""

    header: tuple[str, ...]
    """Names of the columns."""
    lines: tuple[tuple[int, dict[str, str]], ...]
    """Rows: the line of the file, the header being on line 1 as a rule, and the cells by column."""
    ragged: tuple[int, ...] = ()
    """Lines with more or fewer cells than the header."""


@dataclass(frozen=True)
class Column:
    """A column of the source under our name."""

    name: str
    """Ours."""
    theirs: str
    """The source's."""
    factor: float = 1.0
    """Multiplies its numbers: 1e6 where the header counts in millions."""


def sheet(text: str) -> Sheet:
    """The table of a text. Raises ValueError for none, several, a repeated or empty column, or too many rows."""
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise ValueError("the file is empty")
    rows = list(
        _markdown(numbered) if is_markdown(text) else _csv(text, _delimiter(numbered[0][1]))
    )
    (_, header), *body = rows
    if not body:
        raise ValueError("a header and no row")
    if len(body) > LONGEST:
        raise ValueError(f"{len(body)} rows are more than {LONGEST:,}")
    names = [name.strip() for name in header]
    while names and not names[-1]:
        names.pop()
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"column {name!r} stands twice in the header")
    ragged = [line for line, cells in body if any(cells[len(names) :]) or len(cells) < len(names)]
    lines = [(line, dict(zip(names, [*cells, *[""] * len(names)]))) for line, cells in body]
    return Sheet(tuple(names), tuple(lines), tuple(ragged))


def is_markdown(text: str) -> bool:
    """Whether a text holds a Markdown table: a line of dashes and bars alone, as `| --- | :-- |`."""
    return any(
        "--" in line and "|" in line and not line.strip(" \t:|-") for line in text.splitlines()
    )


def _delimiter(header: str) -> str:
    return max("\t,;", key=header.count)


def _csv(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _markdown(numbered: Sequence[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """The rows of the only Markdown table among lines."""
    tables: list[list[tuple[int, list[str]]]] = []
    for (line, text), (_, below) in zip(numbered, [*numbered[1:], (0, "")]):
        if "|" in text and is_markdown(below):
            tables.append([(line, _cells(text))])
        elif tables and "|" in text and line - tables[-1][-1][0] <= 2 and not is_markdown(text):
            tables[-1].append((line, _cells(text)))
    if len(tables) != 1:
        raise ValueError(f"{len(tables)} Markdown tables: keep one in the file")
    yield from tables[0]


def _cells(line: str) -> list[str]:
    inner = re.sub(r"^\s*\||\|\s*$", "", line)
    return [re.sub(r"\*\*|`", "", cell).strip() for cell in re.split(r"(?<!\\)\|", inner)]


def plain(header: str) -> str:
    """A header without its dressing: "CORE (Centered)" and "Val BPB" are core and val_bpb."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\(.*?\)|\[.*?\]", "", header.lower())).strip("_")


def matched(header: Sequence[str], synonyms: Mapping[str, str]) -> list[Column]:
    """The columns of a header that synonyms (plain name -> ours) know, units in the header noticed.

    The first column of a name wins; a synonym that says "name:7" multiplies by 7.
    """
    found: dict[str, Column] = {}
    for theirs in header:
        for name, factor in _readings(theirs):
            ours, _, own = synonyms.get(name, "").partition(":")
            if ours and _fits(ours, name, theirs, factor):
                found.setdefault(ours, Column(ours, theirs, factor * float(own or 1)))
                break
    return list(found.values())


SUFFIXES = {
    "k": 1e3,
    "m": 1e6,
    "b": 1e9,
    "t": 1e12,
    "millions": 1e6,
    "billions": 1e9,
    "mb": 1e6,
    "gb": 1e9,
}
SUFFIXES |= {
    "mib": 2.0**20,
    "gib": 2.0**30,
    **{name: value for name, value in SECONDS.items() if name not in "mhd"},
}


def _readings(theirs: str) -> Iterator[tuple[str, float]]:
    """A header as it stands, then with its last word, or its brackets, as a unit."""
    name = plain(theirs)
    bracket = re.search(r"[(\[]\s*([a-zA-Z]+)\s*[)\]]", theirs)
    if bracket and bracket[1].lower() in SUFFIXES:
        yield name, SUFFIXES[bracket[1].lower()]
    yield name, 1.0
    base, _, unit = name.rpartition("_")
    if base and unit in SUFFIXES:
        yield base, SUFFIXES[unit]


def _fits(ours: str, name: str, theirs: str, factor: float) -> bool:
    """Whether a unit goes with a column: minutes with times, millions with counts."""
    if factor == 1.0:
        return True
    unit = (re.findall(r"[a-z]+", theirs.lower()) or [""])[-1]
    kind = (
        "time"
        if unit in SECONDS and unit not in "mhd"
        else "bytes"
        if unit in ("mb", "gb", "mib", "gib")
        else "count"
    )
    wanted = "time" if ours in TIMES else "bytes" if ours == "peak_memory_bytes" else "count"
    return kind == wanted and ours not in TEXTS and (kind != "count" or ours in COUNTS)


def typed(table: Sheet, columns: Sequence[Column]) -> Found:
    """The rows of a table: values under our names, everything else as it stands; a cell that is no number is named."""
    rows: list[Row] = []
    defects = [
        Defect("ragged", "its cells are more or fewer than the header's", line)
        for line in table.ragged
    ]
    for line, cells in table.lines:
        values: dict[str, object] = {}
        units: dict[str, float] = {}
        for column in columns:
            text = cells[column.theirs]
            if text.lower() in EMPTY:
                continue
            if column.name in TEXTS:
                values[column.name] = text
            elif isinstance(found := _value(column, text), Number):
                values[column.name] = round(found.value) if column.name in COUNTS else found.value
                units[column.name] = found.unit
                defects += _spreadsheet(text, line, column.theirs)
            elif found:
                defects.append(Defect("bad-number", found, line, column.theirs))
        rows.append(Row(line, values, dict(cells), units))
    return Found(rows, defects, {column.name: _source(column) for column in columns})


def _value(column: Column, text: str) -> Number | str:
    """The number of a cell, or what is wrong with it: nothing for a count switched off by -1."""
    found = seconds(text, column.factor) if column.name in TIMES else number(text)
    if found is None:
        return f"{text[:40]!r} is not a number"
    if column.name not in TIMES:
        found = found.times(column.factor)
    if (
        column.name in MEASURES
        and column.name not in ("val_bpb", "val_loss", "train_loss", "core")
        and found.value < 0
    ):
        return f"{text[:40]!r} is negative"
    if column.name in COUNTS and column.name != "seed" and found.value < 0:
        return "" if found.value == -1 else f"{text[:40]!r} is no count"
    return found


def _spreadsheet(text: str, line: int, column: str) -> Iterator[Defect]:
    if re.search(r"E[+-]0\d\d$", text):
        yield Defect(
            "spreadsheet",
            f"{text}: {len(re.sub('[^0-9]', '', text.split('E')[0]))} digits are left",
            line,
            column,
        )


def _source(column: Column) -> str:
    return column.theirs if column.factor == 1.0 else f"{column.theirs} × {column.factor:g}"


def chosen(
    header: Sequence[str], synonyms: Mapping[str, str], mapping: Mapping[str, str]
) -> list[Column]:
    """The columns to read: those of a `--map`, then what the synonyms know. Raises ValueError as `asked` does."""
    named = asked(header, mapping)
    ours, theirs = {column.name for column in named}, {column.theirs for column in named}
    known = matched([name for name in header if name not in theirs], synonyms)
    return [*named, *(column for column in known if column.name not in ours)]


def asked(header: Sequence[str], mapping: Mapping[str, str]) -> list[Column]:
    """The columns of a `--map`. Raises ValueError for a name that is not ours, and a column that is not there."""
    columns = []
    for name, theirs in mapping.items():
        ours = ALIASES.get(name, name)
        if ours not in COLUMNS:
            raise ValueError(
                f"--map {name}={theirs}: {name!r} is no column of ours; some are {', '.join(ALIASES)}, core"
            )
        if theirs not in header:
            raise ValueError(
                f"--map {name}={theirs}: no column {theirs!r}; there are {', '.join(header)[:300]}"
            )
        units = [factor for _, factor in _readings(theirs) if _fits(ours, "", theirs, factor)]
        columns.append(
            Column(ours, theirs, next((factor for factor in units if factor != 1.0), 1.0))
        )
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
"""Names that `--map` takes beside our columns': those of `slm fit-curves --file`."""
