"""Where the numbers of an experiment come from, and the commands that ask for it again."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from slm.recipe import RECIPES
from slm.report.content import Block, Commands, Facts, Text
from slm.report.gather import Found, Row, counts, names_of, where

PACKAGES = ("slm", "torch", "numpy")
"""Whose versions are told."""


def provenance(found: Found) -> list[Block]:
    """What the numbers rest on; where runs differ, each value with its runs."""
    rows = found.rows
    versions = [{**row, **_object(row["versions"])} for row in rows]
    pairs = {
        "commit": _said(rows, _commit),
        "trainer's code": _said(rows, "code"),
        "versions": ", ".join(
            f"{name} {own}" for name in PACKAGES if (own := _said(versions, name))
        ),
        "Python": _said(rows, "python"),
        "host": _said(rows, "host"),
        "devices": _said(rows, _devices),
        "corpus": _said(rows, "corpus"),
        "training rows": _said(rows, "train_rows"),
        "validation rows": _said(rows, _validation),
        "tokeniser": _said(rows, "tokenizer"),
        "context": _said(rows, _context),
        "comparison key": _said(rows, "comparison_key"),
        "evaluation": _said(rows, "core_key"),
        "fits": ", ".join(own.record["hash"] for own in found.families if own.record),
        "source": _said(rows, lambda row: row["source"] if row["source"] != "run" else None),
    }
    return [Facts([(name, said) for name, said in pairs.items() if said])]


def _commit(row: Row) -> str | None:
    changed = " with uncommitted changes" if row["modified"] else ""
    return f"{row['commit']}{changed}" if row["commit"] else None


def _devices(row: Row) -> str | None:
    threads = f", {counts(row['threads'], 'thread')} each" if row["threads"] else ""
    return f"{where(row)}{threads}" if where(row) else None


def _validation(row: Row) -> str | None:
    size = f", {row['validation_rows']:,.0f} rows" if row["validation_rows"] else ""
    return f"{row['validation']}{size}" if row["validation"] else None


def _context(row: Row) -> str | None:
    return f"{row['sequence_length']:,.0f} tokens" if row["sequence_length"] else None


def _said(rows: Sequence[Row], what: str | Callable[[Row], Any]) -> str:
    """The value that all rows have, or each value with the runs that have it."""
    values: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        value = row.get(what) if isinstance(what, str) else what(row)
        if value is not None:
            values[str(value)].append(row)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({names_of(own)})" for value, own in values.items())


def repeat(found: Found) -> list[Block]:
    """The command lines; nothing for what was imported."""
    asked = found.declared
    if not (asked.get("depths") or asked.get("plans")):
        return []
    if asked.get("plans"):
        plans = [word for run in asked["plans"] for word in ("--plan", f"{run}/plan.json")]
        return [
            Text("In the folder of runs:"),
            Commands([shlex.join(["slm", "sweep", *plans, "--name", found.name])]),
        ]
    ours = {name: json.loads(json.dumps(asdict(own))) for name, own in RECIPES.items()}
    known = [name for name, own in asked["recipes"].items() if own == ours.get(name)]
    seeds = list(asked["seeds"])
    if len(asked["recipes"]) == len(known) == 1 and seeds == list(range(len(seeds))):
        return [Commands([_sweep(found.name, known[0], asked), f"slm report {found.name}"])]
    why = "It was declared in a file, with recipes or seeds that no flag asks for. With that file, else run by run from"
    return [
        Text(f"{why} the folder of runs:"),
        Commands(
            [
                "slm sweep FILE.py",
                f"slm sweep --plan RUN/plan.json --name {found.name}",
                f"slm report {found.name}",
            ]
        ),
    ]


def _sweep(name: str, recipe: str, asked: Row) -> str:
    """The command line that asks for the same."""
    words = ["slm", "sweep", "--recipe", recipe, "--depths", ",".join(map(str, asked["depths"]))]
    for option in ("flops", "ratios"):
        words += (
            [f"--{option}", ",".join(f"{own:g}" for own in asked[option])] if asked[option] else []
        )
    words += ["--steps", str(asked["steps"])] if asked["steps"] else []
    words += ["--seeds", str(len(asked["seeds"]))] if len(asked["seeds"]) > 1 else []
    words += ["--data", asked["data"]] if asked["data"] != "python" else []
    return shlex.join([*words, "--name", name])


def _object(value: Any) -> Row:
    """A JSON column, which a database gives as text or as an object."""
    found = json.loads(value) if isinstance(value, str) else value
    return found if isinstance(found, dict) else {}
