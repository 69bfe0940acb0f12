"""Options that several commands share, their parsers, and output helpers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.recipe import RECIPES, Recipe

if TYPE_CHECKING:
    import pandas

Depths = Annotated[str, typer.Option(help="Depths: 10-20, or 4,8,12.", metavar="DEPTHS")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Recipe: nanochat where a GPU is found, else pocket.", metavar="NAME"
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Corpus: python, a folder, climbmix, fineweb-edu, or hf:OWNER/NAME."
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help="A .json or .tiktoken file, or a tiktoken name; else one is trained."
    ),
]
Mixed = Annotated[
    bool,
    typer.Option(
        "--allow-mixed", help="Use runs that are not comparable together; the result says so."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
DEEPEST = 100
"""Depth of the deepest model considered."""
DEPTH_LIMIT = 10_000
"""Largest depth that `depths_of` accepts."""
DEPTH_RANGE = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*")


def depths_of(text: str, option: str = "--depths") -> tuple[int, ...]:
    """Parse "10-20" or "4,8,12". Raises ValueError naming the part that is no depth."""
    depths: list[int] = []
    for part in text.split(","):
        name = f"{option} {text}: {part.strip()!r}"
        match = DEPTH_RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"{name} is not a depth; write 10-20, or 4,8,12")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise ValueError(f"{name} runs backwards; write {last}-{first}")
        if last > DEPTH_LIMIT:
            raise ValueError(f"{option} {text}: depth {last} is beyond {DEPTH_LIMIT:,}")
        depths += range(first, last + 1)
    return tuple(dict.fromkeys(depths))


def labels_of(text: str) -> tuple[str, ...]:
    """Parse the names in "a,b", without repetitions."""
    return tuple(dict.fromkeys(label.strip() for label in text.split(",")))


def numbers_of(option: str, text: str | None) -> tuple[float, ...]:
    """Parse the positive numbers of "1e12,2e12". Raises ValueError naming the part that is none."""
    numbers = []
    for part in text.split(",") if text is not None else ():
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"{option} {text}: {part.strip()!r} is not a number") from None
        if not 0 < number < float("inf"):
            raise ValueError(f"{option} {text}: {part.strip()} is not positive and finite")
        numbers.append(number)
    return tuple(numbers)


def recipe_of(name: str | None, needs_gpu: bool = False, option: str = "--recipe") -> Recipe:
    """Return the recipe of a name; for None nanochat with a GPU (or `needs_gpu`), else pocket.

    Raises ValueError for an unknown name.
    """
    if name is None:
        from slm.hardware import devices

        name = "nanochat" if needs_gpu or devices.gpu_count() else "pocket"
    if name not in RECIPES:
        raise ValueError(f"{option} {name}: unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False, default=str)
    print()


def report_problems(problems: Sequence[str]) -> None:
    """Print messages about unreadable files on standard error."""
    for problem in problems:
        print(f"slm: {problem}", file=sys.stderr)


def records(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a DataFrame as dictionaries of plain values, None for missing ones."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[return-value]


def print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """Print a table on standard output, None as a dash."""
    print(table(rows, headers))


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a table as text, None as a dash."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, missingval="-", disable_numparse=True, stralign="right")
