"""What a report is made of, before it is a page: plain words, tables and drawings, without markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str
    """As they are; a command in them stands between backticks."""


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    words: str
    """As they are."""


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    words: Sequence[str]
    """Of each."""


@dataclass(frozen=True)
class Table:
    """Rows under headers."""

    caption: str
    """What it is."""
    headers: Sequence[str]
    """Of the columns; the first names the row."""
    rows: Sequence[Sequence[str]]
    """Cells; an empty one is what is not known or does not apply."""


@dataclass(frozen=True)
class Drawing:
    """A figure."""

    path: Path
    """Its .svg; the .png lies beside it."""
    alt: str
    """What it shows, for whoever does not see it."""
    caption: str
    """How to read it."""


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]
    """In order."""


@dataclass(frozen=True)
class Cautions:
    """What a reader must know before using a number."""

    pairs: Sequence[tuple[str, str]]
    """Stable code and sentence of each."""


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: Sequence[str]
    """As they are typed."""


Block = Text | Heading | Items | Table | Drawing | Facts | Cautions | Commands


@dataclass(frozen=True)
class Key:
    """A number that people look for first."""

    value: str
    """The number."""
    name: str
    """Of what."""
    detail: str
    """Its interval, or what it is of."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    """The heading."""
    blocks: Sequence[Block]
    """What follows it."""


@dataclass(frozen=True)
class Report:
    """An experiment as it is told to others."""

    name: str
    """Of the experiment."""
    question: str
    """What it is to find out; empty where nobody said."""
    facts: str
    """Recipe, depths and time in one line."""
    answer: Sequence[str]
    """What came of it, a paragraph each."""
    keys: Sequence[Key]
    """The numbers beside the answer."""
    sections: Sequence[Section]
    """All the rest."""
    made: str
    """By what."""
