"""Options that several commands share, their parsers, questions and output helpers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from slm.monitor.progress import report_line
from slm.recipe import RECIPES, Recipe

Declaration = Annotated[Path | None, Argument(help="A declared experiment (experiments/*.py).")]
RunId = Annotated[str, Argument(help="A run_id, or its first digits.")]
RecipeName = Annotated[
    str | None,
    Option("--recipe", help="Recipe: nanochat where a GPU is found, else pocket.", metavar="NAME"),
]
Data = Annotated[
    str | None,
    Option("--data", help="Corpus: python, a folder, climbmix, fineweb-edu, or hf:OWNER/NAME."),
]
TokenizerName = Annotated[
    str | None,
    Option(
        "--tokenizer", help="A .json or .tiktoken file, or a tiktoken name; else one is trained."
    ),
]
Mixed = Annotated[
    bool,
    Option("--allow-mixed", help="Use runs that are not comparable together; the result says so."),
]
Json = Annotated[bool, Option("--json", help="One JSON document on standard output.")]
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


def labels_of(text: str | None) -> tuple[str, ...]:
    """Parse the names in "a,b", without repetitions."""
    labels = text.split(",") if text else ()
    return tuple(dict.fromkeys(label.strip() for label in labels))


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


def recipe_of(name: str | None, needs_gpu: bool = False) -> Recipe:
    """Return the recipe of a name; for None nanochat with a GPU (or `needs_gpu`), else pocket.

    Raises ValueError for an unknown name.
    """
    if name is None:
        from slm.hardware import devices

        name = "nanochat" if needs_gpu or devices.gpu_count() else "pocket"
    if name not in RECIPES:
        raise ValueError(f"--recipe {name}: unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def refuse(options: Any, why: str, names: Iterable[str] | None = None) -> None:
    """Raise ValueError for the first option of a dataclass that differs from its default.

    `names` are the fields to look at, all by default.
    """
    for name in names or vars(options):
        value = getattr(options, name)
        if value != getattr(type(options), name):
            raise ValueError(f"--{name.replace('_', '-')} {value}: {why}")


def confirm(question: str, yes: bool) -> None:
    """Ask a question unless `yes`. Raises ValueError without a terminal, typer.Abort for a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError(f"{question} There is no terminal to ask on: use --yes")
    typer.confirm(question, abort=True, err=True)


def print_result(as_json: bool, document: Any, text: str) -> None:
    """Print a result as one JSON document, or as text."""
    if as_json:
        print_json(document)
    else:
        print(text)


def print_json(document: Any) -> None:
    """Print one document on standard output."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False, default=str)
    print()


def report_problems(problems: Iterable[str]) -> None:
    """Print messages on standard error."""
    for problem in problems:
        report_line(f"slm: {problem}")


def table(rows: Sequence[Any], headers: Sequence[str] = "keys") -> str:
    """Return a table as text, None as a dash; the rows are sequences, or mappings by header."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, missingval="-", disable_numparse=True, stralign="right")
