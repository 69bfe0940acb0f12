"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from math import log
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.recipe import RECIPES, Hyperparameters, Recipe

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
        "--tokenizer", help="A .json or .tiktoken file, or tiktoken's name; else one is trained."
    ),
]
DEEPEST = 100
"""Of the models considered."""
Mixed = Annotated[
    bool,
    typer.Option(
        "--allow-mixed", help="Take runs that are not comparable as one; the outcome says so."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def depths_of(text: str, option: str = "--depths") -> tuple[int, ...]:
    """Depths of "10-20" or "4,8,12". Raises ValueError naming what is not a depth."""
    depths: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise ValueError(
                f"{option} {text}: {part.strip()!r} is not a depth; write 10-20, or 4,8,12"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(
                f"{option} {text}: {part.strip()!r} runs backwards; write {last}-{first}"
            )
        if last > 10_000:
            raise ValueError(f"{option} {text}: depth {last} is beyond 10,000")
        depths += range(first, last + 1)
    return tuple(dict.fromkeys(depths))


def labels_of(text: str) -> tuple[str, ...]:
    """The names in "a,b", each once."""
    return tuple(dict.fromkeys(label.strip() for label in text.split(",")))


def numbers_of(option: str, text: str | None) -> tuple[float, ...]:
    """Positive numbers of "1e12,2e12". Raises ValueError naming what is not one."""
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


def recipe_of(name: str | None, gpu_asked: bool = False, option: str = "--recipe") -> Recipe:
    """The recipe of a name; without one nanochat where a GPU is found or asked for, else pocket.

    Raises ValueError for an unknown name.
    """
    if name is None:
        from slm.hardware import devices

        name = "nanochat" if gpu_asked or devices.gpu_count() else "pocket"
    if name not in RECIPES:
        raise ValueError(f"{option} {name}: unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def depth_at(recipe: Recipe, flops: float) -> Hyperparameters | None:
    """The compute-optimal model of a recipe whose training comes nearest to a compute; None beyond DEEPEST."""
    models = [recipe(depth) for depth in range(1, DEEPEST + 1)]
    best = min(models, key=lambda own: abs(log(own.flops / flops)))
    return best if flops <= models[-1].flops else None


def print_json(document: Any) -> None:
    """One document on standard output."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False, default=str)
    print()


def report_problems(problems: Sequence[str]) -> None:
    """Files that the store could not read, a line each on standard error."""
    for problem in problems:
        print(f"slm: {problem}", file=sys.stderr)


def records(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Rows of a DataFrame as dictionaries of plain values to the last digit, None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[return-value]


def print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    """A table on standard output, None as a dash."""
    print(table(rows, headers))


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table as text, None as a dash."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, missingval="-", disable_numparse=True, stralign="right")
