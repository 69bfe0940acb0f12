"""Run folders -> rows: one short-lived writer that reads what is new, commits, closes and publishes a snapshot.

A cursor per file moves in the same transaction as the rows read from it: nothing is lost, nothing counted twice,
whenever the writer is killed. Readers attach the snapshot, never the database that is written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, NullPool, create_engine, delete, inspect, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from store import schema

DATABASE, SNAPSHOT = "slm.duckdb", "results.duckdb"
LOCK_SECONDS = 30.0
"""How long a writer waits for another."""
EVENT_COLUMNS = {"run_id": "VARCHAR", "attempt": "BIGINT", "event": "VARCHAR", "time": "DOUBLE", "step": "BIGINT"}
METRICS: tuple[str, ...] = (
    "tokens",
    "flops",
    "loss",
    "lr",
    "tokens_per_second",
    "train_seconds",
    "val_bpb",
    "val_loss",
    "rows",
)
METRICS += ("seconds", "bytes", "wall_seconds")


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message says why and what to do."""


@dataclass
class Counts:
    """What an ingest read."""

    runs: int = 0
    """Runs planned anew or changed."""
    metrics: int = 0
    """Metric values."""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, a line each."""


def ingest(home: Path) -> Counts:
    """Read what is new in a home into its database and publish a snapshot if anything was.

    Raises StoreError when another process holds the database for long, when it is damaged, or when the disk is full.
    """
    home.mkdir(parents=True, exist_ok=True)
    counts = Counts()
    with _writing(home) as connection:
        changed = _Reader(home, connection, counts).read_all()
    if changed or not (home / SNAPSHOT).exists():
        _publish(home)
    return counts


def rebuild(home: Path) -> Counts:
    """Delete a home's database and read everything again; the same rows each time."""
    for name in (DATABASE, f"{DATABASE}.wal", SNAPSHOT):
        (home / name).unlink(missing_ok=True)
    return ingest(home)


@contextmanager
def _writing(home: Path) -> Iterator[Connection]:
    """One transaction on the live database, which exists and has our schema; closed at the end."""
    engine = create_engine(f"duckdb:///{home / DATABASE}", poolclass=NullPool)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with engine.begin() as connection:
                _ensure_schema(connection, home)
                yield connection
            return
        except SQLAlchemyError as error:
            line = _first_line(error)
            if "Could not set lock" in line and time.monotonic() < deadline:
                time.sleep(random.uniform(0.05, 0.3))
                continue
            raise _explained(line, home) from error


def _explained(line: str, home: Path) -> StoreError:
    if "Could not set lock" in line:
        return StoreError(f"{home / DATABASE} is held by another process for more than {LOCK_SECONDS:.0f} s: {line}")
    if "No space left" in line:
        return StoreError(f"the disk is full: {home / DATABASE} stays as it was; free some space and run it again")
    return StoreError(f"{home / DATABASE} cannot be used ({line}): `slm store rebuild` makes it anew from the runs")


def _first_line(error: SQLAlchemyError) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).splitlines()[0]


def _ensure_schema(connection: Connection, home: Path) -> None:
    if not inspect(connection).has_table("schema_version"):
        schema.Base.metadata.create_all(connection)
        for view in schema.VIEWS.read_text().split("\n---\n"):
            connection.execute(text(view.replace(":", r"\:")))
        connection.execute(insert(schema.SchemaVersion).values(version=schema.VERSION))
    version = connection.scalar(select(schema.SchemaVersion.version))
    if version != schema.VERSION:
        raise StoreError(
            f"{home / DATABASE} has schema {version}, not {schema.VERSION}: `slm store rebuild` upgrades it"
        )


def _publish(home: Path) -> None:
    """Copy the closed database to a temporary name and rename it over the snapshot."""
    temporary = home / f".{SNAPSHOT}.{os.getpid()}"
    try:
        shutil.copyfile(home / DATABASE, temporary)
        temporary.replace(home / SNAPSHOT)
    finally:
        temporary.unlink(missing_ok=True)


class _Reader:
    """Reads a home into one transaction."""

    def __init__(self, home: Path, connection: Connection, counts: Counts) -> None:
        self._home = home
        self._connection = connection
        self._counts = counts
        rows = connection.execute(select(schema.Cursor.file, schema.Cursor.offset, schema.Cursor.state))
        self._cursors = {file: (offset, state) for file, offset, state in rows}
        self._moved: list[dict[str, Any]] = []

    def read_all(self) -> bool:
        """Read every file that changed; whether there was one."""
        self._documents("*/plan.json", schema.Run, _run_row)
        self._documents("*/attempts/*/attempt.json", schema.Attempt, _attempt_row)
        self._documents("*/attempts/*/exit.json", schema.Attempt, _exit_row)
        self._documents("*/done.json", schema.Finished, _finished_row)
        self._documents("experiments/*.json", schema.Experiment, _experiment_row)
        self._documents("fits/*.json", schema.Fit, _fit_row)
        self._events()
        if self._moved:
            self._upsert(schema.Cursor, self._moved)
        return bool(self._moved)

    def _documents(self, pattern: str, table: type[schema.Base], row_of: Callable[[Path, Any], dict[str, Any]]) -> None:
        """Upsert a row for each new or changed JSON file."""
        rows = []
        for path in sorted(self._home.glob(pattern)):
            name = str(path.relative_to(self._home))
            stat = path.stat()
            state = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
            if self._cursors.get(name, (0, ""))[1] == state:
                continue
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                rows.append(row_of(path, document))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._counts.problems.append(f"{path}: not read ({type(error).__name__}: {error})")
                continue
            if table is schema.Experiment:
                self._members(document)
            self._moved.append({"file": name, "offset": stat.st_size, "state": state})
        if rows:
            self._upsert(table, rows)
            self._counts.runs += len(rows) if table is schema.Run else 0

    def _members(self, document: dict[str, Any]) -> None:
        """An experiment's runs, in place of those it had before."""
        name = document["name"]
        self._connection.execute(delete(schema.Membership).where(schema.Membership.experiment == name))
        rows = [{"experiment": name, "run_id": run, "position": i} for i, run in enumerate(document["runs"])]
        if rows:
            self._connection.execute(insert(schema.Membership), rows)

    def _upsert(self, table: type[schema.Base], rows: list[dict[str, Any]]) -> None:
        """Insert rows or, where their key is there, set the columns they bring."""
        statement = insert(table)
        keys = [column.name for column in inspect(table).primary_key]
        values = {name: statement.excluded[name] for name in rows[0] if name not in keys}
        self._connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values), rows)

    def _events(self) -> None:
        """Append the metrics of every events file's new whole lines, through one read_json over all of them."""
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as gathered:
            for path in sorted(self._home.glob("*/attempts/*/events.jsonl")):
                name = str(path.relative_to(self._home))
                offset, _ = self._cursors.get(name, (0, ""))
                if path.stat().st_size > offset:
                    self._gather(path, name, offset, gathered)
            gathered.flush()
            if gathered.tell():
                self._insert_metrics(gathered.name)

    def _gather(self, path: Path, name: str, offset: int, gathered: Any) -> None:
        """Copy whole new lines, each with its run and attempt in front."""
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        if not content:
            return
        mark = f'{{"run_id": "{path.parts[-4]}", "attempt": {int(path.parts[-2])}, '.encode()
        gathered.write(b"".join(mark + line[1:] for line in content.splitlines(keepends=True) if line[:1] == b"{"))
        self._moved.append({"file": name, "offset": offset + len(content), "state": ""})

    def _insert_metrics(self, file: str) -> None:
        columns = EVENT_COLUMNS | dict.fromkeys(METRICS, "DOUBLE")
        typed = ", ".join(f"{name}: '{kind}'" for name, kind in columns.items())
        options = f"format = 'newline_delimited', ignore_errors = true, columns = {{{typed}}}"
        statement = f"""
            insert into metrics (run_id, attempt, event, time, step, name, value)
            select run_id, attempt, event, time, step, name, value from (
              unpivot (
                select * from read_json('{file}', {options})
                where step is not null
              ) on {", ".join(METRICS)} into name name value value
            )
        """  # noqa: S608
        result = self._connection.exec_driver_sql(statement)
        self._counts.metrics += max(result.rowcount, 0)


def _run_row(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    given, data = plan["hyperparameters"], plan["data"]
    counts = given["parameters"]
    same: tuple[str, ...] = ("depth", "width", "heads", "head_dim", "sequence_length", "vocab_size", "flops_per_token")
    same += ("tokens_asked", "batch_tokens", "steps")
    tokens = given["steps"] * given["batch_tokens"]
    return {
        "run_id": path.parent.name,
        **{name: plan[name] for name in ("recipe", "horizon", "seed", "code")},
        **{name: given[name] for name in same},
        "parameters_wte": counts["wte"],
        "parameters_value_embeds": counts["value_embeds"],
        "parameters_lm_head": counts["lm_head"],
        "parameters_matrices": counts["transformer_matrices"],
        "parameters_scalars": counts["scalars"],
        "parameters_scaling": counts["transformer_matrices"] + counts["lm_head"],
        "parameters_total": sum(counts.values()),
        "tokens": tokens,
        "flops": tokens * given["flops_per_token"],
        "corpus": data["corpus"],
        "tokenizer": data["tokenizer"],
        "train_rows": data["train"],
        "validation": data["validation"],
        "validation_rows": data["validation_rows"],
        "epochs": data["epochs"],
        "plan": plan,
    }


def _attempt_row(path: Path, attempt: dict[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = (
        "created",
        "launcher",
        "host",
        "platform",
        "python",
        "versions",
        "commit",
        "diff",
        "device",
    )
    names += ("device_name", "ranks", "threads", "micro_batch")
    return {"run_id": path.parts[-4], "attempt": attempt["attempt"], **{name: attempt.get(name) for name in names}}


def _exit_row(path: Path, ended: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_id": path.parts[-4],
        "attempt": ended["attempt"],
        "ended": ended["time"],
        "exit_code": ended["code"],
        "exit_signal": ended["signal"],
        "reason": ended["reason"],
        "message": ended["message"],
    }


def _finished_row(path: Path, done: dict[str, Any]) -> dict[str, Any]:
    if not (done["val_bpb"] and done["val_bpb"] > 0 and done["tokens"] > 0):
        raise ValueError(f"finished with val_bpb {done['val_bpb']} and {done['tokens']} tokens")
    names = [column.name for column in inspect(schema.Finished).columns if column.name != "run_id"]
    return {"run_id": path.parent.name, **{name: done[name] for name in names}}


def _experiment_row(path: Path, experiment: dict[str, Any]) -> dict[str, Any]:
    return {name: experiment[name] for name in ("name", "question", "recipe", "declared", "created")}


def _fit_row(path: Path, fit: dict[str, Any]) -> dict[str, Any]:
    return {"hash": path.stem, "created": fit["created"], "experiments": fit["experiments"], "document": fit}
