"""Store imports in a home, with their sources, in $SLM_HOME/imports/<hash>/."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path, PurePosixPath

from slm.exchange.importers.formats import Import, plain_name
from slm.exchange.importers.types import COLUMNS, Row, Values
from slm.files import fingerprint, read_json, write_json


def write_import(parsed: Import, home: Path, strict: bool = False) -> bool:
    """Store an import whole or not at all; return False if it was stored before.

    Raises ValueError where its name belongs to another experiment, or it has another name.
    """
    folder = home / "imports" / parsed.hash
    experiments = imported_experiments(home)
    name = experiments.get(parsed.hash)
    if name == parsed.experiment:
        return False
    if name is not None:
        raise ValueError(
            f"already imported as {name!r}; `slm import --remove {name}` first, to rename it"
        )
    path = home / "experiments" / f"{parsed.experiment}.json"
    if parsed.experiment in experiments.values() or path.exists():
        raise ValueError(f"experiment {parsed.experiment!r} exists: choose another with --name")
    temporary = folder.with_name(f".{parsed.hash}.{os.getpid()}")
    try:
        _write_files(temporary, parsed, strict)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _write_files(folder: Path, parsed: Import, strict: bool) -> None:
    """Write originals and curves, then import.json. File names consist of safe characters."""
    document = import_document(parsed, strict, time.time())
    for name, content in parsed.source.contents.items():
        parts = [plain_name(part) for part in PurePosixPath(name).parts]
        path = folder.joinpath("original", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for row, values in zip(parsed.rows, document["rows"]):
        if row.curve:
            path = folder / "curves" / f"{values['run_id']}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{json.dumps(event)}\n" for event in row.curve))
    write_json(folder / "import.json", document)


def import_document(parsed: Import, strict: bool, created: float) -> Values:
    """Return the content of import.json."""
    return {
        "hash": parsed.hash,
        "experiment": parsed.experiment,
        "format": parsed.format,
        "source": parsed.source.name,
        "sha256": parsed.source.sha256,
        "created": created,
        "strict": strict,
        "axis": parsed.axis,
        "mapping": parsed.columns,
        "defects": [vars(defect) for defect in parsed.defects],
        "rows": [_row_document(parsed, row) for row in parsed.rows],
    }


def _row_document(parsed: Import, row: Row) -> Values:
    values = {name: row.get(name) for name in COLUMNS}
    return {
        "run_id": "x" + fingerprint(f"{parsed.hash}:{row.number}", 11),
        "row": row.number,
        **values,
        "recipe": values["recipe"] or parsed.experiment,
        "status": values["status"] or "finished",
        "flags": parsed.flags(row),
        "usable": parsed.usable(row),
        "original": row.original,
    }


def imported_experiments(home: Path) -> dict[str, str]:
    """Return the experiment of each import of a home, by hash.

    Raises ValueError naming a file that is not an import's.
    """
    experiments = {}
    for path in home.glob("imports/[0-9a-f]*/import.json"):
        document = read_json(path)
        if not isinstance(document, dict) or not isinstance(document.get("experiment"), str):
            raise ValueError(
                f"{path} names no experiment: remove its folder, and import the source again"
            )
        experiments[path.parent.name] = document["experiment"]
    return experiments


def remove_import(home: Path, name: str) -> str:
    """Remove an import by experiment or hash; return the experiment.

    Raises ValueError for an unknown name, and for one that several imports have.
    """
    experiments = imported_experiments(home)
    hashes = [digest for digest, experiment in experiments.items() if name in (digest, experiment)]
    if not hashes:
        names = ", ".join(sorted(experiments.values())) or "none"
        raise ValueError(f"no import {name!r}; there are {names}")
    if len(hashes) > 1:
        raise ValueError(
            f"{len(hashes)} imports are called {name!r}: name one by its hash, "
            f"{' or '.join(sorted(hashes))}"
        )
    folder = home / "imports" / hashes[0]
    hidden = folder.with_name(f".{hashes[0]}.{os.getpid()}")
    folder.rename(hidden)
    shutil.rmtree(hidden)
    return experiments[hashes[0]]
