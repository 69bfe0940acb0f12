"""Export the results of a home, or of some experiments, to a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from operator import itemgetter
from pathlib import Path

import store
from slm import __version__
from slm.exchange.archive import EXPORT_FORMAT, Json, exported_files
from slm.files import read_json, sha256_of, write_json
from slm.monitor.progress import Report, no_report
from store import tables


def export(
    home: Path,
    folder: Path,
    experiments: Sequence[str] = (),
    weights: bool = False,
    report_files: Report = no_report,
    report_tables: Report = no_report,
) -> Json:
    """Write results to a new folder: tables as Parquet, their dictionary, and the home's files.

    Return the content of export.json. Raises ValueError for a folder that is not empty, and for an
    unknown experiment.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    problems = store.ingest(home).problems
    unfinished = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "tables").mkdir(parents=True)
    try:
        names, filters = _select(home, experiments, weights)
        hashes = _copy_files(home, unfinished / "runs", names, report_files)
        columns = tables.export(home, unfinished / "tables", filters, report_tables)
        write_json(unfinished / "columns.json", columns)
        shutil.copyfile(tables.DICTIONARY, unfinished / "README.md")
        document = {
            "format": EXPORT_FORMAT,
            "home": read_json(home / "home.json"),
            "created": time.time(),
            "slm": __version__,
            "experiments": list(experiments) or None,
            "problems": problems,
            "files": _describe_files(unfinished, hashes),
        }
        write_json(unfinished / "export.json", document)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return document


def _describe_files(folder: Path, hashes: dict[str, str]) -> list[Json]:
    """Describe every file below a folder by name, size and SHA-256; `hashes` are those known."""
    files = []
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            sha256 = hashes.get(name) or sha256_of(path)
            files.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256})
    return sorted(files, key=itemgetter("name"))


def _select(
    home: Path, experiments: Sequence[str], weights: bool
) -> tuple[list[str], dict[str, list[str]] | None]:
    """Return the names of files to export, and the values that select rows of the tables."""
    names = exported_files(home)
    if not weights:
        names = [name for name in names if not name.endswith(".safetensors")]
    if not experiments:
        return names, None
    # 1) all experiments, swept and imported
    swept = {path.stem: read_json(path)["runs"] for path in home.glob("experiments/*.json")}
    imports = [read_json(path) for path in home.glob("imports/*/import.json")]
    known = sorted({*swept, *(document["experiment"] for document in imports)})
    for name in experiments:
        if name not in known:
            raise ValueError(f"no experiment {name!r}; there are {', '.join(known) or 'none'}")
    # 2) the parts of a home that belong to those selected
    imports = [document for document in imports if document["experiment"] in experiments]
    fits = [path.stem for path in home.glob("fits/*.json") if _is_about(path, experiments)]
    runs = {run for name in experiments for run in swept.get(name, ())}
    parts = {*runs, *(f"experiments/{name}.json" for name in experiments)}
    parts |= {f"fits/{name}.json" for name in fits}
    parts |= {f"imports/{document['hash']}" for document in imports}
    selected = [name for name in names if _prefixes(name) & parts]
    # 3) the rows of tables
    runs |= {row["run_id"] for document in imports for row in document["rows"]}
    hashes = [*fits, *(document["hash"] for document in imports)]
    return selected, {"experiment": list(experiments), "hash": hashes, "run_id": sorted(runs)}


def _prefixes(name: str) -> set[str]:
    """Return a file's name, its first folder, and its first two."""
    parts = name.split("/")
    return {name, parts[0], "/".join(parts[:2])}


def _is_about(fit: Path, experiments: Sequence[str]) -> bool:
    """Whether a fit is of these experiments and of no other."""
    return set(read_json(fit)["experiments"]) <= set(experiments)


def _copy_files(home: Path, folder: Path, names: Sequence[str], report: Report) -> dict[str, str]:
    """Copy files of a home; return their SHA-256 by exported name.

    An event line that is still being written is left out.
    """
    hashes = {}
    for number, name in enumerate(names):
        report(number, len(names))
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / name, copy)
        if name.endswith("/events.jsonl"):
            _cut_torn_line(copy)
        hashes[f"runs/{name}"] = sha256_of(copy)
    return hashes


def _cut_torn_line(path: Path) -> None:
    """Cut a file after its last newline."""
    if path.stat().st_size:
        with path.open("r+b") as file:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                size = content.rfind(b"\n") + 1
            file.truncate(size)
