"""`slm import`: other people's results in, each defect named."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import progress
from slm.cli.options import Json, print_json, report_problems
from slm.results import columns_of

if TYPE_CHECKING:
    from slm.exchange.importers import Import

SHOWN = 5
"""Rows named of one kind of defect."""


def import_results(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of results, or folders: of nanochat's harness, or exported."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Experiment to import as (else the file's name).")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Format, instead of what the content says.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--map", help="Columns: OURS=THEIRS,…, as loss=val_bpb,flops=flops_6nd."),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option("--axis", help="Compare with other imports of this axis, on your word."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a file with a defect.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check; keep nothing.")
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option("--remove", help="Take an import out again: its experiment, or its hash."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Import results of other programs, flagged where they cannot be trusted, or a folder that `slm export` wrote."""
    import store

    if remove is not None:
        _remove(remove, as_json)
        return
    if not paths:
        raise ValueError("nothing to import: name a file")
    if name is not None and len(paths) > 1:
        raise ValueError(f"--name {name} names one import, and {len(paths)} paths are given")
    outcomes, refusals = [], []
    for path in paths:
        try:
            outcomes.append(_one(path, name, format, columns, axis, strict, dry_run))
        except ValueError as error:
            refusals.append(str(error))
    if outcomes and not dry_run:
        report_problems(store.ingest(store.home()).problems)
    if as_json:
        print_json({"home": str(store.home()), "imports": outcomes, "refused": refusals})
    elif outcomes:
        print("\n\n".join(_told(outcome) for outcome in outcomes))
    for refusal in refusals[: len(refusals) - 1]:
        print(f"slm: {refusal}", file=sys.stderr)
    if refusals:
        raise ValueError(refusals[-1])


def _one(
    path: Path,
    name: str | None,
    format: str | None,
    columns: str | None,
    axis: str | None,
    strict: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """Import one path, and tell what came of it."""
    import store
    from slm.exchange import importers as imports

    if (path / "export.json").is_file():
        _check_merge(path, {"--name": name, "--format": format, "--map": columns, "--axis": axis})
        _check_merge(path, {"--strict": strict, "--dry-run": dry_run})
        return _merge(path)
    found = imports.read(path, name, format, columns_of(columns), axis)
    if strict and (faults := found.faults()):
        raise ValueError(f"{path}: {_first(faults)}; without --strict its rows come in flagged")
    if dry_run:
        return _outcome(found, "read")
    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    try:
        new = imports.write(found, home, strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _outcome(found, "imported" if new else "imported before")


def _check_merge(folder: Path, options: Mapping[str, object]) -> None:
    """Refuse what goes with a file alone."""
    given = [option for option, value in options.items() if value]
    if given:
        raise ValueError(f"{folder}: an exported folder is merged as it is: without {given[0]}")


def _merge(folder: Path) -> dict[str, Any]:
    """Merge a folder that `slm export` wrote."""
    import store
    from slm.exchange import merge

    home = store.home()
    home.mkdir(parents=True, exist_ok=True)
    merged = merge(folder, home, progress("files and runs"))
    counts = {what: count for what, count in merged.counts.items() if count}
    return {
        "source": folder.name,
        "format": "export",
        "outcome": "merged",
        "merged": counts,
        "lines": merged.lines,
    }


def _first(faults: Sequence[Any]) -> str:
    """The first defects in words."""
    told = [
        f"{fault.code}{f' in row {fault.row}' if fault.row else ''} ({fault.message})"
        for fault in faults[:3]
    ]
    return f"{len(faults)} defects: {'; '.join(told)}{'; …' if len(faults) > 3 else ''}"


def _outcome(found: Import, outcome: str) -> dict[str, Any]:
    """What is told of an import."""
    return {
        "source": found.source.name,
        "format": found.format,
        "outcome": outcome,
        "hash": found.hash,
        "experiment": found.experiment,
        "columns": dict(found.columns),
        "rows": len(found.rows),
        "usable": sum(found.usable(row) for row in found.rows),
        "curves": sum(bool(row.curve) for row in found.rows),
        "defects": grouped(found),
    }


def grouped(found: Import) -> list[dict[str, Any]]:
    """Defects by kind, the worst first: how many, in which rows, what the kind means, and the first message."""
    from slm.exchange.importers.checks import CODES

    kinds: dict[str, list[Any]] = {}
    for defect in found.defects:
        kinds.setdefault(defect.code, []).append(defect)
    return [
        {
            "code": code,
            "weight": CODES[code].weight,
            "count": len(defects),
            "rows": list(dict.fromkeys(defect.row for defect in defects if defect.row is not None)),
            "meaning": CODES[code].meaning,
            "first": defects[0].message,
        }
        for code, defects in kinds.items()
    ]


def _told(outcome: dict[str, Any]) -> str:
    """An outcome for people."""
    from tabulate import tabulate

    if "hash" not in outcome:
        return f"{outcome['source']}: {outcome['outcome']}: " + "\n".join(outcome["lines"])
    head = (
        f"{outcome['source']} ({outcome['format']}): {outcome['outcome']} as {outcome['experiment']!r} "
        f"({outcome['hash']}): {_counted(outcome['rows'], 'row')}, {outcome['usable']} usable in fits, "
        f"{_counted(outcome['curves'], 'curve')}"
    )
    read_as = ", ".join(
        f"{ours} = {theirs}" for ours, theirs in outcome["columns"].items() if ours != theirs
    )
    lines = [head, *([f"columns: {read_as}"] if read_as else [])]
    if outcome["defects"]:
        rows = [
            [
                kind["code"],
                kind["weight"],
                kind["count"],
                _rows(kind["rows"]),
                f"{kind['meaning']} ({kind['first']})",
            ]
            for kind in outcome["defects"]
        ]
        headers = ("defect", "", "count", "rows", "meaning (first case)")
        lines.append(
            tabulate(rows, headers, disable_numparse=True, maxcolwidths=[None, None, None, 22, 90])
        )
    return "\n".join(lines)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _rows(rows: Sequence[int]) -> str:
    if not rows:
        return "all"
    return ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")


def _remove(name: str, as_json: bool) -> None:
    """Take an import out, and say so."""
    import store
    from slm.exchange import importers as imports

    experiment = imports.remove(store.home(), name)
    report_problems(store.ingest(store.home()).problems)
    if as_json:
        print_json({"home": str(store.home()), "removed": experiment})
    else:
        print(f"removed import {experiment!r}")
