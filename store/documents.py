"""The files of a home, and the rows that their documents become. Standard library only."""

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
    """A file that the database indexes, as it was when scanned."""

    path: Path
    name: str
    """Path relative to the home, the key of its cursor."""
    kind: str
    """home, plan, done, attempt, exit, events, evaluation, experiment, fit or import."""
    owner: str
    """Run id, name of the experiment, or hash of the fit or import."""
    attempt: int
    """Number of the attempt; 0 for files that belong to none."""
    size: int
    """Bytes."""
    state: str
    """Size, modification time and inode, which show that a document was replaced."""


def scan(home: Path) -> Iterator[File]:
    """Yield every file to index; temporary files are skipped."""
    yield from _file(home, "home.json", "home", "")
    for run in sorted({*_names(home)} - {"data", "experiments", "fits", "imports"}):
        yield from _file(home, f"{run}/plan.json", "plan", run)
        for attempt in filter(str.isdigit, _names(home / run / "attempts")):
            folder = f"{run}/attempts/{attempt}"
            yield from _file(home, f"{folder}/attempt.json", "attempt", run, int(attempt))
            yield from _file(home, f"{folder}/events.jsonl", "events", run, int(attempt))
            yield from _file(home, f"{folder}/exit.json", "exit", run, int(attempt))
        yield from _file(home, f"{run}/done.json", "done", run)
        for name, _ in _with_ending(home / run / "evals", ".json"):
            yield from _file(home, f"{run}/evals/{name}", "evaluation", run)
    for kind in ("experiment", "fit"):
        for name, stem in _with_ending(home / f"{kind}s", ".json"):
            yield from _file(home, f"{kind}s/{name}", kind, stem)
    for digest in _names(home / "imports"):
        yield from _file(home, f"imports/{digest}/import.json", "import", digest)
        for name, run in _with_ending(home / "imports" / digest / "curves", ".jsonl"):
            yield from _file(home, f"imports/{digest}/curves/{name}", "events", run, attempt=1)


def _with_ending(folder: Path, ending: str) -> Iterator[tuple[str, str]]:
    """Yield name and stem of each file in a folder with this ending."""
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
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    state = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    yield File(path, name, kind, owner, attempt, stat.st_size, state)


def rows_of(file: File) -> Rows:
    """Return the rows of a document.

    Raises ValueError, one line with the file's name, for an invalid document.
    """
    try:
        content = file.path.read_bytes()
        document = json.loads(content)
        if SURROGATE.search(content):
            json.dumps(document, ensure_ascii=False).encode()
        return _READERS[file.kind](file, document)
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
"""Half of a surrogate pair: JSON can hold one alone, no database can."""


def _check_name(name: str, file: File) -> None:
    if name != file.owner:
        raise ValueError(f"it is about {name!r}")


def _required(document: Row, names: str) -> Row:
    """Return the fields with these names, separated by spaces.

    Raises KeyError for a missing one.
    """
    return {name: document[name] for name in names.split()}


def _optional(document: Row, names: str) -> Row:
    """Return the fields with these names, None for a missing one."""
    return {name: document.get(name) for name in names.split()}


def _read_home(file: File, document: Row) -> Rows:
    return [("homes", {"name": document["name"]})]


_PARAMETER_GROUPS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars")


def _read_plan(file: File, plan: Row) -> Rows:
    _check_name(plan["run_id"], file)
    hp, data = plan["hyperparameters"], plan["data"]
    groups = hp["parameters"]
    tokens = int(hp["steps"]) * int(hp["batch_tokens"])
    row = {
        "run_id": file.owner,
        **_required(plan, "recipe horizon seed code"),
        **_required(hp, "depth width heads head_dim sequence_length vocab_size"),
        **_required(hp, "flops_per_token tokens_asked batch_tokens steps"),
        **{
            f"parameters_{name.removeprefix('transformer_')}": groups[name]
            for name in _PARAMETER_GROUPS
        },
        "parameters_scaling": groups["transformer_matrices"] + groups["lm_head"],
        "parameters_total": sum(groups[name] for name in _PARAMETER_GROUPS),
        "tokens": tokens,
        "flops": hp["flops_per_token"] * float(tokens),
        **_required(data, "corpus tokenizer validation validation_rows epochs"),
        "train_rows": data["train"],
        "plan": plan,
    }
    return [("runs", row)]


def _read_attempt(file: File, document: Row) -> Rows:
    fields = _optional(
        document,
        "created launcher host platform device device_name ranks threads nodes micro_batch "
        "evaluation_tokens estimated_seconds python versions commit diff",
    )
    return [("attempts", {"run_id": file.owner, "attempt": file.attempt, **fields})]


def _read_exit(file: File, document: Row) -> Rows:
    row = {
        "run_id": file.owner,
        "attempt": file.attempt,
        "ended": document["time"],
        "exit_code": document.get("code"),
        "exit_signal": document.get("signal"),
        **_optional(document, "reason message"),
    }
    return [("attempts", row)]


def _read_done(file: File, document: Row) -> Rows:
    _check_name(document["run_id"], file)
    row = {
        "run_id": file.owner,
        **_required(document, "attempt step tokens flops val_bpb"),
        **_optional(document, "time val_loss train_loss core train_seconds wall_seconds"),
        **_optional(
            document, "tokens_per_second flops_per_second peak_memory_bytes weights_sha256"
        ),
    }
    return [("finished", row)]


def _read_evaluation(file: File, document: Row) -> Rows:
    """Return the rows of an evaluation and its tasks; the writer reads the examples itself."""
    _check_name(document["run_id"], file)
    key: Row = {"run_id": file.owner, "evaluation": file.path.stem}
    row: Row = (
        key
        | _required(document, "metric step")
        | _optional(
            document, "weights weights_sha256 bundle format max_per_task tokenizer validation"
        )
        | _optional(document, "code device time seconds val_bpb val_loss rows")
        | _optional(document, "bits_per_byte greedy_share examples cropped skipped ties")
    )
    if row["metric"] != "val_bpb":
        row["metric"] = document.get("name", row["metric"])
        row["mode"] = document.get("mode") or _mode(document)
        for suffix in ("", "_error", "_corrected", "_corrected_error"):
            row[f"core{suffix}"] = document.get(f"centred{suffix}")
    rows: Rows = [("evaluations", row)]
    for label, task in (document.get("tasks") or {}).items():
        fields = _optional(
            task,
            "kind shots examples cropped skipped ties accuracy standard_error centred "
            "centred_corrected bits_per_byte greedy_share gold_probability error",
        )
        rows.append(("evaluation_tasks", key | {"task": label} | fields))
    return rows


def _mode(document: Row) -> str:
    """Return the mode of a document that has none: only a whole bundle gives a `core`."""
    parts = []
    if document.get("max_per_task"):
        parts.append(f"{document['max_per_task']} per task")
    if document.get("core") is None:
        parts.append(f"tasks {','.join(document['tasks'])}")
    return ", ".join(parts) or "full"


def _read_experiment(file: File, document: Row) -> Rows:
    _check_name(document["name"], file)
    runs = [(run_id, position) for position, run_id in enumerate(dict.fromkeys(document["runs"]))]
    row = _optional(document, "name question recipe declared created")
    return [("experiments", row), *_memberships(file.owner, runs)]


def _memberships(experiment: str, runs: list[tuple[str, int]]) -> Rows:
    return [
        ("memberships", {"experiment": experiment, "run_id": run_id, "position": position})
        for run_id, position in runs
    ]


def _read_fit(file: File, document: Row) -> Rows:
    row = {"hash": file.owner, **_required(document, "created experiments"), "document": document}
    return [("fits", row)]


_IMPORTED = """
label recipe depth seed horizon reason
parameters_wte parameters_value_embeds parameters_lm_head parameters_matrices parameters_scalars
parameters_scaling parameters_total
flops_per_token tokens_asked batch_tokens steps tokens flops train_loss val_loss val_bpb core
train_seconds wall_seconds tokens_per_second flops_per_second peak_memory_bytes
host device_name ranks commit corpus tokenizer validation sequence_length original
"""


def _read_import(file: File, document: Row) -> Rows:
    """Return the rows of an import and its runs; the writer makes the row of its experiment."""
    _check_name(document["hash"], file)
    row = {
        "hash": file.owner,
        "rows": len(document["rows"]),
        **_required(
            document, "experiment format source sha256 created strict axis mapping defects"
        ),
    }
    rows: Rows = [("imports", row)]
    members = []
    for run in document["rows"]:
        if not run["run_id"].startswith("x"):
            raise ValueError(
                f"run_id {run['run_id']!r}: an import's run ids begin with x, unlike a plan's hash"
            )
        imported = {
            "hash": file.owner,
            "flags": ",".join(run["flags"]) or None,
            **_optional(run, _IMPORTED),
            **_required(run, "run_id row status usable"),
        }
        rows.append(("imported", imported))
        members.append((run["run_id"], run["row"]))
    return [*rows, *_memberships(row["experiment"], members)]


_READERS: dict[str, Callable[[File, Row], Rows]] = {
    "home": _read_home,
    "plan": _read_plan,
    "attempt": _read_attempt,
    "exit": _read_exit,
    "done": _read_done,
    "evaluation": _read_evaluation,
    "experiment": _read_experiment,
    "fit": _read_fit,
    "import": _read_import,
}
