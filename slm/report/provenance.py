"""Provenance of an experiment's numbers, and the commands that repeat it."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from slm.recipe import RECIPES
from slm.report.gather import ExperimentData, Row, devices_of, row_labels
from slm.report.render import Part
from slm.selection import parsed
from slm.text import plural

PACKAGES = ("slm", "torch", "numpy")


def provenance(data: ExperimentData) -> list[Part]:
    """Return code, data and devices; where runs differ, each value with its runs."""
    rows = data.rows
    versions = [{**row, **parsed(row["versions"])} for row in rows]
    packages = [(name, _values(versions, name)) for name in PACKAGES]
    imported = [row for row in rows if row["source"] != "run"]
    facts = {
        "commit": _values(rows, _commit),
        "trainer's code": _values(rows, "code"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages if version),
        "Python": _values(rows, "python"),
        "host": _values(rows, "host"),
        "devices": _values(rows, _devices),
        "corpus": _values(rows, "corpus"),
        "training rows": _values(rows, "train_rows"),
        "validation rows": _values(rows, _validation),
        "tokeniser": _values(rows, "tokenizer"),
        "context": _values(rows, _context),
        "comparison key": _values(rows, "comparison_key"),
        "evaluation": _values(rows, "core_key"),
        "fits": ", ".join(family.record["hash"] for family in data.families if family.record),
        "source": _values(imported, "source"),
    }
    return [Part(facts=[(name, text) for name, text in facts.items() if text])]


def _values(rows: Sequence[Row], column: str | Callable[[Row], str | None]) -> str:
    """Return the value that all rows share, or each value with the runs that have it."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        value = row.get(column) if isinstance(column, str) else column(row)
        if value is not None:
            groups[str(value)].append(row)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{value} ({row_labels(group)})" for value, group in groups.items())


def _commit(row: Row) -> str | None:
    changed = " with uncommitted changes" if row["modified"] else ""
    return f"{row['commit']}{changed}" if row["commit"] else None


def _devices(row: Row) -> str | None:
    threads = f", {plural(int(row['threads']), 'thread')} each" if row["threads"] else ""
    return f"{devices_of(row)}{threads}" if devices_of(row) else None


def _validation(row: Row) -> str | None:
    size = f", {row['validation_rows']:,.0f} rows" if row["validation_rows"] else ""
    return f"{row['validation']}{size}" if row["validation"] else None


def _context(row: Row) -> str | None:
    return f"{row['sequence_length']:,.0f} tokens" if row["sequence_length"] else None


def repetition(data: ExperimentData) -> list[Part]:
    """Return the command lines that repeat the experiment; none for imported runs."""
    declared = data.declared
    report = f"slm report {data.name}"
    if declared.get("plans"):
        words = []
        for run in declared["plans"]:
            words += ["--plan", f"{run}/plan.json"]
        return [Part(text="In the folder of runs:", commands=[_sweep(data.name, words)])]
    if not declared.get("depths"):
        return []
    if _is_default(declared):
        return [Part(commands=[_sweep(data.name, _options(declared)), report])]
    text = (
        "It was declared in a file, with recipes or seeds that no option sets. With that file, "
        "else run by run from the folder of runs:"
    )
    by_run = f"slm sweep --plan RUN/plan.json --name {data.name}"
    return [Part(text=text, commands=["slm sweep FILE.py", by_run, report])]


def _is_default(declared: Mapping[str, Any]) -> bool:
    """Whether options of `slm sweep` set all of it: one unchanged recipe, seeds from 0 on."""
    seeds = declared["seeds"]
    known = {name: json.loads(json.dumps(asdict(recipe))) for name, recipe in RECIPES.items()}
    is_known = declared["recipes"].items() <= known.items()
    return is_known and len(declared["recipes"]) == 1 and seeds == list(range(len(seeds)))


def _options(declared: Mapping[str, Any]) -> list[str]:
    (recipe,) = declared["recipes"]
    words = ["--recipe", recipe, "--depths", ",".join(map(str, declared["depths"]))]
    for option in ("flops", "ratios"):
        if declared[option]:
            words += [f"--{option}", ",".join(f"{value:g}" for value in declared[option])]
    if declared["steps"]:
        words += ["--steps", str(declared["steps"])]
    if len(declared["seeds"]) > 1:
        words += ["--seeds", str(len(declared["seeds"]))]
    if declared["data"] != "python":
        words += ["--data", declared["data"]]
    return words


def _sweep(name: str, options: Sequence[str]) -> str:
    return shlex.join(["slm", "sweep", *options, "--name", name])
