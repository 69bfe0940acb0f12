"""The files of a home and the rows that their documents become. Standard library only."""

from __future__ import annotations

import json
import os
import re
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
    """home, plan, done, attempt, exit, events, evaluation, experiment, fit or import."""
    owner: str
    """Run id, name of the experiment, or hash of the fit or import."""
    attempt: int
    """Number of the attempt; 0 for what belongs to none."""
    size: int
    """Bytes."""
    state: str
    """Size, time of change and inode: what tells a document that was replaced."""


def scan(home: Path) -> Iterator[File]:
    """Every file there is to index. Temporary names are none of them."""
    yield from _file(home, "home.json", "home", "")
    for run in sorted({*_names(home)} - {"data", "experiments", "fits", "imports"}):
        yield from _file(home, f"{run}/plan.json", "plan", run)
        for attempt in filter(str.isdigit, _names(home / run / "attempts")):
            for name in ("attempt.json", "events.jsonl", "exit.json"):
                yield from _file(
                    home,
                    f"{run}/attempts/{attempt}/{name}",
                    name.partition(".")[0],
                    run,
                    int(attempt),
                )
        yield from _file(home, f"{run}/done.json", "done", run)
        for name, _ in _ending(home / run / "evals", ".json"):
            yield from _file(home, f"{run}/evals/{name}", "evaluation", run)
    for kind in ("experiment", "fit"):
        for name, stem in _ending(home / f"{kind}s", ".json"):
            yield from _file(home, f"{kind}s/{name}", kind, stem)
    for digest in _names(home / "imports"):
        yield from _file(home, f"imports/{digest}/import.json", "import", digest)
        for name, run in _ending(home / "imports" / digest / "curves", ".jsonl"):
            yield from _file(home, f"imports/{digest}/curves/{name}", "events", run, attempt=1)


def _ending(folder: Path, ending: str) -> Iterator[tuple[str, str]]:
    """Names in a folder that end so, each with its stem."""
    for name in _names(folder):
        if name.endswith(ending) and not name.startswith("."):
            yield name, name.removesuffix(ending)


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
    yield File(
        path,
        name,
        kind,
        owner,
        attempt,
        found.st_size,
        f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}",
    )


def rows_of(file: File) -> Rows:
    """The rows of a document. Raises ValueError with one line that names the file when it is not what it should be."""
    try:
        content = file.path.read_bytes()
        document = json.loads(content)
        if SURROGATE.search(content):
            json.dumps(document, ensure_ascii=False).encode()
        return _ROWS[file.kind](file, document)
    except KeyError as error:
        raise ValueError(f"{file.path}: it has no {error}") from None
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"{file.path}: {error}") from None


SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half a letter, which JSON can write and no database can hold unless its other half follows."""


_SHAPE = ("depth", "width", "heads", "head_dim", "sequence_length", "vocab_size")
_GROUPS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars")


def _home(file: File, document: Row) -> Rows:
    return [("homes", {"name": document["name"]})]


def _plan(file: File, plan: Row) -> Rows:
    _check_name(plan["run_id"], file)
    given, data = plan["hyperparameters"], plan["data"]
    groups = given["parameters"]
    tokens = int(given["steps"]) * int(given["batch_tokens"])
    taken = (*_SHAPE, "flops_per_token", "tokens_asked", "batch_tokens", "steps")
    row = {
        "run_id": file.owner,
        **{name: plan[name] for name in ("recipe", "horizon", "seed", "code")},
        **{name: given[name] for name in taken},
        **{f"parameters_{name.removeprefix('transformer_')}": groups[name] for name in _GROUPS},
        "parameters_scaling": groups["transformer_matrices"] + groups["lm_head"],
        "parameters_total": sum(groups[group] for group in _GROUPS),
        "tokens": tokens,
        "flops": given["flops_per_token"] * float(tokens),
        **{
            name: data[name]
            for name in ("corpus", "tokenizer", "validation", "validation_rows", "epochs")
        },
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
    ended = {
        "ended": document["time"],
        "exit_code": document.get("code"),
        "exit_signal": document.get("signal"),
    }
    return [("attempts", {"run_id": file.owner, "attempt": file.attempt, **ended, **fields})]


def _done(file: File, document: Row) -> Rows:
    _check_name(document["run_id"], file)
    required = {name: document[name] for name in ("attempt", "step", "tokens", "flops", "val_bpb")}
    names = "time val_loss train_loss core train_seconds wall_seconds tokens_per_second flops_per_second"
    more = (*names.split(), "peak_memory_bytes", "weights_sha256")
    return [
        (
            "finished",
            {"run_id": file.owner, **required, **{name: document.get(name) for name in more}},
        )
    ]


def _evaluation(file: File, document: Row) -> Rows:
    """Of an evaluation and of its tasks; its examples are read when it is written."""
    _check_name(document["run_id"], file)
    key = {"run_id": file.owner, "evaluation": file.path.stem}
    row = {name: document[name] for name in ("metric", "step")} | {
        name: document.get(name) for name in _EVALUATION
    }
    tasks: dict[str, Row] = document.get("tasks") or {}
    if row["metric"] != "val_bpb":
        named = {
            "metric": document.get("name", row["metric"]),
            "mode": document.get("mode") or _mode(document),
        }
        row |= named | {name.replace("centred", "core"): document.get(name) for name in _CENTRED}
    about = [
        {"task": label} | {name: task.get(name) for name in _TASK} for label, task in tasks.items()
    ]
    return [("evaluations", key | row), *(("evaluation_tasks", key | task) for task in about)]


_EVALUATION = (
    *(
        "weights",
        "weights_sha256",
        "bundle",
        "format",
        "max_per_task",
        "tokenizer",
        "validation",
        "code",
        "device",
    ),
    *("time", "seconds", "val_bpb", "val_loss", "rows", "bits_per_byte", "greedy_share"),
    *("examples", "cropped", "skipped", "ties"),
)
_CENTRED = ("centred", "centred_error", "centred_corrected", "centred_corrected_error")
_TASK = (
    *("kind", "shots", "examples", "cropped", "skipped", "ties", "accuracy", "standard_error"),
    *("centred", "centred_corrected", "bits_per_byte", "greedy_share", "gold_probability", "error"),
)


def _mode(document: Row) -> str:
    """Which examples were asked, of a document from before it said so: only over a whole bundle has it a `core`."""
    most = [f"{document['max_per_task']} per task"] if document.get("max_per_task") else []
    some = [] if document.get("core") is not None else [f"tasks {','.join(document['tasks'])}"]
    return ", ".join([*most, *some]) or "full"


def _experiment(file: File, document: Row) -> Rows:
    _check_name(document["name"], file)
    row = {
        name: document.get(name) for name in ("name", "question", "recipe", "declared", "created")
    }
    members = [
        (run_id, position) for position, run_id in enumerate(dict.fromkeys(document["runs"]))
    ]
    return [("experiments", row), *_members(file.owner, members)]


def _members(experiment: str, runs: list[tuple[str, int]]) -> Rows:
    return [
        ("memberships", {"experiment": experiment, "run_id": run_id, "position": position})
        for run_id, position in runs
    ]


def _fit(file: File, document: Row) -> Rows:
    row = {name: document[name] for name in ("created", "experiments")}
    return [("fits", {"hash": file.owner, **row, "document": document})]


def _import(file: File, document: Row) -> Rows:
    """Of an import and of its runs; of the experiment that it is, the writer makes the row."""
    _check_name(document["hash"], file)
    for run in document["rows"]:
        if not run["run_id"].startswith("x"):
            raise ValueError(
                f"run_id {run['run_id']!r}: one of an import begins with x, unlike a plan's hash"
            )
    names = (
        "experiment",
        "format",
        "source",
        "sha256",
        "created",
        "strict",
        "axis",
        "mapping",
        "defects",
    )
    row = {
        "hash": file.owner,
        "rows": len(document["rows"]),
        **{name: document[name] for name in names},
    }
    runs: list[Row] = [
        {name: run.get(name) for name in _IMPORTED}
        | {"hash": file.owner, "flags": ",".join(run["flags"]) or None}
        | {name: run[name] for name in ("run_id", "row", "status", "usable")}
        for run in document["rows"]
    ]
    members = _members(row["experiment"], [(run["run_id"], run["row"]) for run in runs])
    return [("imports", row), *(("imported", run) for run in runs), *members]


_IMPORTED = (
    *(
        "label",
        "recipe",
        "depth",
        "seed",
        "horizon",
        "reason",
        "parameters_wte",
        "parameters_value_embeds",
    ),
    *(
        "parameters_lm_head",
        "parameters_matrices",
        "parameters_scalars",
        "parameters_scaling",
        "parameters_total",
    ),
    *(
        "flops_per_token",
        "tokens_asked",
        "batch_tokens",
        "steps",
        "tokens",
        "flops",
        "train_loss",
        "val_loss",
    ),
    *("val_bpb", "core", "train_seconds", "wall_seconds", "tokens_per_second", "flops_per_second"),
    *(
        "peak_memory_bytes",
        "host",
        "device_name",
        "ranks",
        "commit",
        "corpus",
        "tokenizer",
        "validation",
    ),
    *("sequence_length", "original"),
)


def _check_name(named: str, file: File) -> None:
    if named != file.owner:
        raise ValueError(f"it is about {named!r}")


_ROWS: dict[str, Callable[[File, Row], Rows]] = {
    "home": _home,
    "plan": _plan,
    "attempt": _attempt,
    "exit": _exit,
    "done": _done,
    "evaluation": _evaluation,
    "experiment": _experiment,
    "fit": _fit,
    "import": _import,
}
