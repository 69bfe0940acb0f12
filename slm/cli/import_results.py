"""`slm import`: import results of other programs, or merge an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import store
from slm.cli.fit_curves import columns_of
from slm.cli.options import Json, print_json, print_result, report_problems
from slm.monitor.progress import ProgressBars
from slm.text import first_few, plural
from store import home

if TYPE_CHECKING:
    from slm.exchange.importers import Import
    from slm.exchange.importers.types import Defect

MAX_ROWS_LISTED = 5
MAX_DEFECTS_LISTED = 3


@dataclass(frozen=True)
class Request:
    """Options of `slm import`."""

    paths: Annotated[
        list[Path] | None,
        Argument(help="Files of results, folders of nanochat's harness, or exported folders."),
    ] = None
    name: Annotated[
        str | None, Option(help="Experiment to import as; default: the file's name.")
    ] = None
    format_name: Annotated[
        str | None, Option("--format", help="Format; default: recognised by content.")
    ] = None
    columns: Annotated[
        str | None,
        Option("--map", help="Columns: NAME=COLUMN,…, as in loss=val_bpb,flops=flops_6nd."),
    ] = None
    axis: Annotated[
        str | None, Option(help="Compare with other imports of this axis, on your word.")
    ] = None
    strict: Annotated[bool, Option("--strict", help="Refuse a file with a defect.")] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Read and check only.")] = False
    remove: Annotated[str | None, Option(help="Remove an import, by its experiment or hash.")] = (
        None
    )
    as_json: Json = False

    def check_merge(self, folder: Path) -> None:
        """Raise ValueError for an option that does not apply to an exported folder."""
        options = {
            "--name": self.name,
            "--format": self.format_name,
            "--map": self.columns,
            "--axis": self.axis,
            "--strict": self.strict,
            "--dry-run": self.dry_run,
        }
        for option, value in options.items():
            if value:
                raise ValueError(
                    f"{folder} is an exported folder, which is merged without {option}"
                )


def import_results(request: Request) -> None:
    """Import results of other programs, with every defect named; or merge an exported folder."""
    paths = request.paths or []
    if request.remove is not None:
        _remove(request.remove, request.as_json)
        return
    if not paths:
        raise ValueError("nothing to import: name a file")
    if request.name is not None and len(paths) > 1:
        raise ValueError(
            f"--name {request.name} names one import, but there are {len(paths)} paths"
        )
    outcomes = []
    refusals = []
    for path in paths:
        try:
            outcomes.append(_import_path(path, request))
        except ValueError as error:
            refusals.append(str(error))
    if outcomes and not request.dry_run:
        report_problems(store.ingest(home()).problems)
    if request.as_json:
        print_json({"home": home(), "imports": outcomes, "refused": refusals})
    elif outcomes:
        print("\n\n".join(map(_describe, outcomes)))
    report_problems(refusals[:-1])
    if refusals:
        raise ValueError(refusals[-1])


def _import_path(path: Path, request: Request) -> dict[str, Any]:
    """Import one path; return the outcome as a document."""
    from slm.exchange.importers import read_import, write_import

    if (path / "export.json").is_file():
        request.check_merge(path)
        return _merge(path)
    mapping = columns_of(request.columns)
    parsed = read_import(path, request.name, request.format_name, mapping, request.axis)
    faults = parsed.faults()
    if request.strict and faults:
        raise ValueError(
            f"{path}: {_describe_faults(faults)}; without --strict its rows are imported with flags"
        )
    if request.dry_run:
        return _outcome(parsed, "read")
    home().mkdir(parents=True, exist_ok=True)
    try:
        is_new = write_import(parsed, home(), request.strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _outcome(parsed, "imported" if is_new else "imported before")


def _merge(folder: Path) -> dict[str, Any]:
    """Merge a folder that `slm export` wrote."""
    from slm.exchange import merge

    home().mkdir(parents=True, exist_ok=True)
    with ProgressBars() as bars:
        result = merge(folder, home(), bars.add("files and runs"))
    return {
        "source": folder.name,
        "format": "export",
        "outcome": "merged",
        "merged": {name: count for name, count in result.counts.items() if count},
        "lines": result.lines,
    }


def _describe_faults(faults: Sequence[Defect]) -> str:
    parts = []
    for fault in faults[:MAX_DEFECTS_LISTED]:
        row = f" in row {fault.row}" if fault.row else ""
        parts.append(f"{fault.code}{row} ({fault.message})")
    ellipsis = "; …" if len(faults) > MAX_DEFECTS_LISTED else ""
    return f"{plural(len(faults), 'defect')}: {'; '.join(parts)}{ellipsis}"


def _outcome(parsed: Import, outcome: str) -> dict[str, Any]:
    return {
        "source": parsed.source.name,
        "format": parsed.format,
        "outcome": outcome,
        "hash": parsed.hash,
        "experiment": parsed.experiment,
        "columns": dict(parsed.columns),
        "rows": len(parsed.rows),
        "usable": sum(parsed.usable(row) for row in parsed.rows),
        "curves": sum(bool(row.curve) for row in parsed.rows),
        "defects": _group_defects(parsed),
    }


def _group_defects(parsed: Import) -> list[dict[str, Any]]:
    """Group defects by code, worst first: number, rows, meaning, and the first message."""
    from slm.exchange.importers.checks import CODES

    groups: dict[str, list[Defect]] = {}
    for defect in parsed.defects:
        groups.setdefault(defect.code, []).append(defect)
    return [
        {
            "code": code,
            "weight": CODES[code].weight,
            "count": len(defects),
            "rows": list(dict.fromkeys(defect.row for defect in defects if defect.row is not None)),
            "meaning": CODES[code].meaning,
            "first": defects[0].message,
        }
        for code, defects in groups.items()
    ]


def _describe(outcome: dict[str, Any]) -> str:
    """Return an outcome as text."""
    from tabulate import tabulate

    if "hash" not in outcome:
        return f"{outcome['source']}: {outcome['outcome']}: " + "\n".join(outcome["lines"])
    lines = [
        f"{outcome['source']} ({outcome['format']}): {outcome['outcome']} as "
        f"{outcome['experiment']!r} ({outcome['hash']}): {plural(outcome['rows'], 'row')}, "
        f"{outcome['usable']} usable in fits, {plural(outcome['curves'], 'curve')}"
    ]
    renamed = [
        f"{name} = {source}" for name, source in outcome["columns"].items() if name != source
    ]
    if renamed:
        lines.append(f"columns: {', '.join(renamed)}")
    if outcome["defects"]:
        rows = [
            {
                "defect": group["code"],
                "": group["weight"],
                "count": group["count"],
                "rows": _list_rows(group["rows"]),
                "meaning (first case)": f"{group['meaning']} ({group['first']})",
            }
            for group in outcome["defects"]
        ]
        widths = [None, None, None, 22, 90]
        lines.append(tabulate(rows, "keys", disable_numparse=True, maxcolwidths=widths))
    return "\n".join(lines)


def _list_rows(rows: Sequence[int]) -> str:
    return first_few([str(row) for row in rows], MAX_ROWS_LISTED) if rows else "all"


def _remove(name: str, as_json: bool) -> None:
    from slm.exchange.importers import remove_import

    experiment = remove_import(home(), name)
    report_problems(store.ingest(home()).problems)
    document = {"home": home(), "removed": experiment}
    print_result(as_json, document, f"removed import {experiment!r}")
