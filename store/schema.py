"""Tables of the results database. The run folders are the truth; these rows are their index and hold nothing else.

Natural keys, no foreign keys and no secondary indexes: DuckDB refuses updates and alterations that touch them. Metrics
have no primary key either: an ingest cursor, moved in the same transaction, keeps every row once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, Integer, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 2
VIEWS = Path(__file__).parent / "views.sql"


class Base(DeclarativeBase):
    """Python types to column types."""

    type_annotation_map = {int: BigInteger, float: Double, str: String, dict[str, Any]: JSON}  # noqa: RUF012


class SchemaVersion(Base):
    """One row: the version that made this database."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Cursor(Base):
    """How far a file has been read."""

    __tablename__ = "cursors"
    file: Mapped[str] = mapped_column(primary_key=True)
    offset: Mapped[int]
    state: Mapped[str]


class Experiment(Base):
    """An experiment."""

    __tablename__ = "experiments"
    name: Mapped[str] = mapped_column(primary_key=True)
    question: Mapped[str | None]
    recipe: Mapped[str | None]
    declared: Mapped[dict[str, Any] | None]
    created: Mapped[float | None]


class Membership(Base):
    """A run that an experiment asks for."""

    __tablename__ = "memberships"
    experiment: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(Integer)


class Run(Base):
    """A planned run."""

    __tablename__ = "runs"
    __table_args__ = (CheckConstraint("tokens > 0 and flops > 0 and steps > 0", name="positive_horizon"),)
    run_id: Mapped[str] = mapped_column(primary_key=True)
    recipe: Mapped[str]
    horizon: Mapped[str]
    seed: Mapped[int]
    depth: Mapped[int]
    width: Mapped[int]
    heads: Mapped[int]
    head_dim: Mapped[int]
    sequence_length: Mapped[int]
    vocab_size: Mapped[int]
    parameters_wte: Mapped[int]
    parameters_value_embeds: Mapped[int]
    parameters_lm_head: Mapped[int]
    parameters_matrices: Mapped[int]
    parameters_scalars: Mapped[int]
    parameters_scaling: Mapped[int]
    parameters_total: Mapped[int]
    flops_per_token: Mapped[int]
    tokens_asked: Mapped[float]
    batch_tokens: Mapped[int]
    steps: Mapped[int]
    tokens: Mapped[int]
    flops: Mapped[float]
    corpus: Mapped[str]
    tokenizer: Mapped[str]
    train_rows: Mapped[str]
    validation: Mapped[str]
    validation_rows: Mapped[int]
    epochs: Mapped[float]
    code: Mapped[str]
    plan: Mapped[dict[str, Any]]


class Attempt(Base):
    """One attempt at a run, and how it ended."""

    __tablename__ = "attempts"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    created: Mapped[float | None]
    launcher: Mapped[str | None]
    host: Mapped[str | None]
    platform: Mapped[str | None]
    python: Mapped[str | None]
    versions: Mapped[dict[str, Any] | None]
    commit: Mapped[str | None]
    diff: Mapped[str | None]
    device: Mapped[str | None]
    device_name: Mapped[str | None]
    ranks: Mapped[int | None]
    threads: Mapped[int | None]
    nodes: Mapped[int | None]
    micro_batch: Mapped[int | None]
    evaluation_tokens: Mapped[int | None]
    estimated_seconds: Mapped[float | None]
    ended: Mapped[float | None]
    exit_code: Mapped[int | None]
    exit_signal: Mapped[int | None]
    reason: Mapped[str | None]
    message: Mapped[str | None]


class Metric(Base):
    """One number of one event, long format; no key, see above."""

    __tablename__ = "metrics"
    __mapper_args__ = {"primary_key": ["run_id", "attempt", "time", "event", "name"]}  # noqa: RUF012
    run_id: Mapped[str]
    attempt: Mapped[int]
    event: Mapped[str]
    time: Mapped[float]
    step: Mapped[int]
    name: Mapped[str]
    value: Mapped[float]


class Finished(Base):
    """What a finished run reached."""

    __tablename__ = "finished"
    __table_args__ = (
        CheckConstraint("tokens > 0 and flops > 0", name="positive_spending"),
        CheckConstraint("val_bpb > 0 and not isnan(val_bpb)", name="finished_with_a_value"),
    )
    run_id: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    time: Mapped[float]
    step: Mapped[int]
    tokens: Mapped[int]
    flops: Mapped[float]
    val_bpb: Mapped[float]
    val_loss: Mapped[float]
    train_loss: Mapped[float | None]
    core: Mapped[float | None]
    train_seconds: Mapped[float]
    wall_seconds: Mapped[float]
    tokens_per_second: Mapped[float]
    flops_per_second: Mapped[float]
    peak_memory_bytes: Mapped[int | None]
    weights_sha256: Mapped[str | None]


class Fit(Base):
    """A recorded fit."""

    __tablename__ = "fits"
    hash: Mapped[str] = mapped_column(primary_key=True)
    created: Mapped[float | None]
    experiments: Mapped[list[str]] = mapped_column(JSON)
    document: Mapped[dict[str, Any]]
