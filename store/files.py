"""The files of a home and the rows that their documents become. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = list[tuple[str, Row]]
"""Rows, each with the name of its table."""


@dataclass(frozen=True)
class File:
    """A file that the database indexes, as it was when looked at."""

    path: Path
    """Where it is."""
    name: str
    """Path below the home, the key of its cursor."""
    kind: str
    """plan, done, attempt, exit, events, experiment or fit."""
    owner: str
    """Run id, name of the experiment or hash of the fit."""
    attempt: int
    """Number of the attempt; 0 for what belongs to none."""
    size: int
    """Bytes."""
    state: str
    """Size, time of change and inode: what tells a document that was replaced."""


def scan(home: Path) -> Iterator[File]:
    """Every file there is to index. Temporary names are none of them."""
    for run in sorted({*_names(home)} - {"data", "experiments", "fits"}):
        yield from _file(home, f"{run}/plan.json", "plan", run)
        for attempt in filter(str.isdigit, _names(home / run / "attempts")):
            for name in ("attempt.json", "events.jsonl", "exit.json"):
                yield from _file(home, f"{run}/attempts/{attempt}/{name}", name.partition(".")[0], run, int(attempt))
        yield from _file(home, f"{run}/done.json", "done", run)
    for kind in ("experiment", "fit"):
        for name in _names(home / f"{kind}s"):
            stem, ending = os.path.splitext(name)
            if ending == ".json" and not name.startswith("."):
                yield from _file(home, f"{kind}s/{name}", kind, stem)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _file(home: Path, name: str, kind: str, owner: str, attempt: int = 0) -> Iterator[File]:
    path = home / name
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    yield File(path, name, kind, owner, attempt, found.st_size, f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}")


def rows_of(file: File) -> Rows:
    """The rows of a document. Raises ValueError with one line that names the file when it is not what it should be."""
    try:
        document = json.loads(file.path.read_bytes())
        return _ROWS[file.kind](file, document)
    except KeyError as error:
        raise ValueError(f"{file.path}: it has no {error}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.path}: {error}") from None


_SHAPE = ("depth", "width", "heads", "head_dim", "sequence_length", "vocab_size")
_GROUPS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars")


def _plan(file: File, plan: Row) -> Rows:
    _check_name(plan["run_id"], file)
    given, data = plan["hyperparameters"], plan["data"]
    groups = given["parameters"]
    tokens = given["steps"] * given["batch_tokens"]
    taken = (*_SHAPE, "flops_per_token", "tokens_asked", "batch_tokens", "steps")
    row = {
        "run_id": file.owner,
        **{name: plan[name] for name in ("recipe", "horizon", "seed", "code")},
        **{name: given[name] for name in taken},
        **{f"parameters_{name.removeprefix('transformer_')}": groups[name] for name in _GROUPS},
        "parameters_scaling": groups["transformer_matrices"] + groups["lm_head"],
        "parameters_total": sum(groups[group] for group in _GROUPS),
        "tokens": tokens,
        "flops": given["flops_per_token"] * tokens,
        **{name: data[name] for name in ("corpus", "tokenizer", "validation", "validation_rows", "epochs")},
        "train_rows": data["train"],
        "plan": plan,
    }
    return [("runs", row)]


def _attempt(file: File, document: Row) -> Rows:
    names = "created launcher host platform device device_name ranks threads nodes micro_batch evaluation_tokens"
    more = "estimated_seconds python versions commit diff"
    fields = {name: document.get(name) for name in (*names.split(), *more.split())}
    return [("attempts", {"run_id": file.owner, "attempt": file.attempt, **fields})]


def _exit(file: File, document: Row) -> Rows:
    fields = {name: document.get(name) for name in ("reason", "message")}
    ended = {"ended": document["time"], "exit_code": document.get("code"), "exit_signal": document.get("signal")}
    return [("attempts", {"run_id": file.owner, "attempt": file.attempt, **ended, **fields})]


def _done(file: File, document: Row) -> Rows:
    _check_name(document["run_id"], file)
    required = {name: document[name] for name in ("attempt", "step", "tokens", "flops", "val_bpb")}
    names = "time val_loss train_loss core train_seconds wall_seconds tokens_per_second flops_per_second"
    more = (*names.split(), "peak_memory_bytes", "weights_sha256")
    return [("finished", {"run_id": file.owner, **required, **{name: document.get(name) for name in more}})]


def _experiment(file: File, document: Row) -> Rows:
    _check_name(document["name"], file)
    row = {name: document.get(name) for name in ("name", "question", "recipe", "declared", "created")}
    members: Rows = [
        ("memberships", {"experiment": file.owner, "run_id": run_id, "position": position})
        for position, run_id in enumerate(dict.fromkeys(document["runs"]))
    ]
    return [("experiments", row), *members]


def _fit(file: File, document: Row) -> Rows:
    row = {name: document[name] for name in ("created", "experiments")}
    return [("fits", {"hash": file.owner, **row, "document": document})]


def _check_name(named: str, file: File) -> None:
    if named != file.owner:
        raise ValueError(f"it is about {named!r}")


_ROWS: dict[str, Callable[[File, Row], Rows]] = {
    "plan": _plan,
    "attempt": _attempt,
    "exit": _exit,
    "done": _done,
    "experiment": _experiment,
    "fit": _fit,
}
