"""A home's results, or some experiments', into a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import store
from slm import __version__
from slm.exchange.archive import FORMAT, Json, copied, digest_of, end_of_lines, files_of
from slm.files import read_json, write_json
from store import tables

Report = Callable[[int, int], None]
"""Told how many of how many files are done."""


def export(
    home: Path,
    folder: Path,
    experiments: Sequence[str] = (),
    weights: bool = False,
    reports: tuple[Report, Report] = (lambda done, of: None,) * 2,
) -> Json:
    """Write a folder that holds the results of a home, or of some experiments: Parquet, dictionary, and truth files.

    `reports` are told of files and of tables. Gives what export.json says. Raises ValueError for a folder that holds
    something and for an unknown experiment.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty: name a folder that is not there yet")
    problems = store.ingest(home).problems
    unfinished = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "tables").mkdir(parents=True)
    try:
        names, only = _wanted(home, experiments, weights)
        files = {
            f"runs/{name}": digest
            for name, digest in _copied_out(home, unfinished / "runs", names, reports[0])
        }
        described = tables.export(home, unfinished / "tables", only, reports[1])
        write_json(unfinished / "columns.json", described)
        shutil.copyfile(tables.DICTIONARY, unfinished / "README.md")
        document = {
            "format": FORMAT,
            "home": read_json(home / "home.json"),
            "created": time.time(),
        }
        document |= {
            "slm": __version__,
            "experiments": list(experiments) or None,
            "problems": problems,
        }
        document |= {"files": _listed(unfinished, files)}
        write_json(unfinished / "export.json", document)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return document


def _listed(folder: Path, known: dict[str, str]) -> list[Json]:
    """Every file below a folder, with its size and its SHA-256 where that is not known yet."""
    written = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    return [
        {"name": name, "bytes": path.stat().st_size, "sha256": known.get(name) or digest_of(path)}
        for name, path in sorted(written.items())
    ]


def _wanted(
    home: Path, experiments: Sequence[str], weights: bool
) -> tuple[list[str], dict[str, list[str]] | None]:
    """The files to export, by name; with experiments named, theirs alone and what their rows are about."""
    names = [name for name in files_of(home) if weights or not name.endswith(".safetensors")]
    if not experiments:
        return names, None
    asked = {path.stem: read_json(path)["runs"] for path in (home / "experiments").glob("*.json")}
    imported = [read_json(path) for path in (home / "imports").glob("*/import.json")]
    known = sorted({*asked, *(document["experiment"] for document in imported)})
    for name in set(experiments) - set(known):
        raise ValueError(f"no experiment {name!r}; there are {', '.join(known) or 'none'}")
    own = [document for document in imported if document["experiment"] in experiments]
    fits = [path.stem for path in (home / "fits").glob("*.json") if _is_about(path, experiments)]
    hashes = [*fits, *(document["hash"] for document in own)]
    runs = {run for name in experiments for run in asked.get(name, ())}
    owners = {*runs, *(f"experiments/{name}.json" for name in experiments)}
    owners |= {f"fits/{name}.json" for name in fits} | {
        f"imports/{document['hash']}" for document in own
    }
    wanted = [
        name
        for name in names
        if {name, name.partition("/")[0], "/".join(name.split("/")[:2])} & owners
    ]
    runs |= {row["run_id"] for document in own for row in document["rows"]}
    return wanted, {"experiment": list(experiments), "hash": hashes, "run_id": sorted(runs)}


def _is_about(fit: Path, experiments: Sequence[str]) -> bool:
    """Whether a fit is of these experiments and of no other."""
    return set(read_json(fit)["experiments"]) <= set(experiments)


def _copied_out(
    home: Path, folder: Path, names: Sequence[str], report: Report
) -> Iterator[tuple[str, str]]:
    """Copy files of a home; each with its digest. A line of events that is still being written stays behind."""
    for number, name in enumerate(names):
        report(number, len(names))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (home / name).open("rb") as source, target.open("wb") as copy:
            yield (
                name,
                copied(
                    source, copy, end_of_lines(source) if name.endswith("/events.jsonl") else None
                ),
            )
