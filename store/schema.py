"""Tables of the results database.

The run folders are the truth; these rows are their index and hold nothing else.

Natural keys, no foreign keys and no secondary indexes: DuckDB refuses updates and alterations that
touch them. Metrics and examples have no primary key either: an ingest cursor, moved in the same
transaction, makes every row appear once. PostgreSQL holds many homes, DuckDB one: every row names
its home.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Connection,
    Double,
    Index,
    Integer,
    String,
    insert,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.paths import VERSION

VIEWS = Path(__file__).parent / "views.sql"
POSITIVE = "{0} > 0 and {0} < cast('infinity' as double precision)"
"""Rule that also refuses NaN: both databases order it after infinity."""
Key = Annotated[str, mapped_column(primary_key=True)]


def _check(name: str, columns: str, rule: str) -> CheckConstraint:
    """Return a constraint that applies a rule, `{}` being the column, to columns; NULL passes."""
    return CheckConstraint(
        " and ".join(f"({rule.format(column)})" for column in columns.split()), name=name
    )


class Base(DeclarativeBase):
    """Base of all tables, with the column type of each Python type."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        float: Double,
        str: String,
        dict[str, Any]: JSON(none_as_null=True),
    }


class SchemaVersion(Base):
    """The version that made this database, in one row."""

    __tablename__ = "schema_version"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Home(Base):
    """A folder of runs whose rows are in this database."""

    __tablename__ = "homes"
    home: Mapped[Key]
    name: Mapped[str]


class Cursor(Base):
    """Position up to which a file has been read."""

    __tablename__ = "cursors"
    home: Mapped[Key]
    file: Mapped[Key]
    offset: Mapped[int]
    state: Mapped[str]


class Experiment(Base):
    """An experiment."""

    __tablename__ = "experiments"
    home: Mapped[Key]
    name: Mapped[Key]
    question: Mapped[str | None]
    recipe: Mapped[str | None]
    declared: Mapped[dict[str, Any] | None]
    created: Mapped[float | None]


class Membership(Base):
    """A run that belongs to an experiment."""

    __tablename__ = "memberships"
    home: Mapped[Key]
    experiment: Mapped[Key]
    run_id: Mapped[Key]
    position: Mapped[int] = mapped_column(Integer)


class Run(Base):
    """A planned run."""

    __tablename__ = "runs"
    __table_args__ = (
        _check("positive_horizon", "tokens flops steps tokens_asked batch_tokens", "{} > 0"),
        _check(
            "counted_parameters", "parameters_scaling parameters_total flops_per_token", "{} > 0"
        ),
    )
    home: Mapped[Key]
    run_id: Mapped[Key]
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
    """An attempt at a run, and how it ended."""

    __tablename__ = "attempts"
    __table_args__ = (_check("nothing_negative", "ranks threads estimated_seconds", "{} >= 0"),)
    home: Mapped[Key]
    run_id: Mapped[Key]
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
    """A number of an event, in long format; no primary key, see the module's docstring."""

    __tablename__ = "metrics"
    __table_args__ = (
        CheckConstraint("step >= 0", name="no_negative_step"),
        Index("metrics_of_a_run", "home", "run_id").ddl_if(dialect="postgresql"),
    )
    __mapper_args__ = {  # noqa: RUF012
        "primary_key": ["home", "run_id", "attempt", "time", "event", "name"]
    }
    home: Mapped[str]
    run_id: Mapped[str]
    attempt: Mapped[int]
    event: Mapped[str]
    time: Mapped[float | None]
    step: Mapped[int]
    name: Mapped[str]
    value: Mapped[float]


class Finished(Base):
    """The results of a finished run."""

    __tablename__ = "finished"
    __table_args__ = (
        _check("positive_spending", "step tokens flops", "{} > 0"),
        _check("finished_with_a_value", "val_bpb val_loss", POSITIVE),
        _check("nothing_negative", "train_seconds wall_seconds peak_memory_bytes", "{} >= 0"),
        _check("core_is_a_share", "core", "{} between -1 and 1"),
    )
    home: Mapped[Key]
    run_id: Mapped[Key]
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


class Evaluation(Base):
    """An evaluation of some weights."""

    __tablename__ = "evaluations"
    __table_args__ = (
        _check("a_value_where_there_is_one", "val_bpb val_loss rows", POSITIVE),
        CheckConstraint("metric <> 'val_bpb' or val_bpb is not null", name="val_bpb_with_a_value"),
        CheckConstraint(
            "position('tasks ' in mode) > 0 or core between -1 and 1", name="core_is_a_share"
        ),
        _check("nothing_negative", "step seconds core_error core_corrected_error", "{} >= 0"),
    )
    home: Mapped[Key]
    run_id: Mapped[Key]
    evaluation: Mapped[Key]
    metric: Mapped[str]
    step: Mapped[int]
    weights: Mapped[str | None]
    weights_sha256: Mapped[str | None]
    bundle: Mapped[str | None]
    mode: Mapped[str | None]
    format: Mapped[int | None]
    max_per_task: Mapped[int | None]
    tokenizer: Mapped[str | None]
    validation: Mapped[str | None]
    code: Mapped[str | None]
    device: Mapped[str | None]
    time: Mapped[float | None]
    seconds: Mapped[float | None]
    val_bpb: Mapped[float | None]
    val_loss: Mapped[float | None]
    rows: Mapped[int | None]
    core: Mapped[float | None]
    core_error: Mapped[float | None]
    core_corrected: Mapped[float | None]
    core_corrected_error: Mapped[float | None]
    bits_per_byte: Mapped[float | None]
    greedy_share: Mapped[float | None]
    examples: Mapped[int | None]
    cropped: Mapped[int | None]
    skipped: Mapped[int | None]
    ties: Mapped[int | None]


class EvaluationTask(Base):
    """The results of one task of an evaluation, or why there are none."""

    __tablename__ = "evaluation_tasks"
    __table_args__ = (
        _check("shares", "accuracy greedy_share gold_probability", "{} between 0 and 1"),
        _check("nothing_negative", "examples cropped skipped ties standard_error", "{} >= 0"),
        CheckConstraint("accuracy is not null or error is not null", name="answered_or_why_not"),
    )
    home: Mapped[Key]
    run_id: Mapped[Key]
    evaluation: Mapped[Key]
    task: Mapped[Key]
    kind: Mapped[str | None]
    shots: Mapped[int | None]
    examples: Mapped[int | None]
    cropped: Mapped[int | None]
    skipped: Mapped[int | None]
    ties: Mapped[int | None]
    accuracy: Mapped[float | None]
    standard_error: Mapped[float | None]
    centred: Mapped[float | None]
    centred_corrected: Mapped[float | None]
    bits_per_byte: Mapped[float | None]
    greedy_share: Mapped[float | None]
    gold_probability: Mapped[float | None]
    error: Mapped[str | None]


class EvaluationExample(Base):
    """A model's result on one example; no primary key, see the module's docstring."""

    __tablename__ = "evaluation_examples"
    __table_args__ = (
        Index("examples_of_an_evaluation", "home", "run_id").ddl_if(dialect="postgresql"),
    )
    __mapper_args__ = {"primary_key": ["home", "run_id", "evaluation", "task", "example"]}  # noqa: RUF012
    home: Mapped[str]
    run_id: Mapped[str]
    evaluation: Mapped[str]
    task: Mapped[str]
    example: Mapped[int]
    correct: Mapped[bool]
    choice: Mapped[int | None]
    tie: Mapped[bool]
    gold_nats: Mapped[float]
    gold_tokens: Mapped[int]
    gold_greedy: Mapped[int]
    gold_bytes: Mapped[int]
    gold_probability: Mapped[float | None]


class Fit(Base):
    """A recorded fit."""

    __tablename__ = "fits"
    home: Mapped[Key]
    hash: Mapped[Key]
    created: Mapped[float | None]
    experiments: Mapped[list[str]] = mapped_column(JSON)
    document: Mapped[dict[str, Any]]


class Import(Base):
    """A file of results measured elsewhere."""

    __tablename__ = "imports"
    home: Mapped[Key]
    hash: Mapped[Key]
    experiment: Mapped[str]
    format: Mapped[str]
    source: Mapped[str]
    sha256: Mapped[str]
    created: Mapped[float | None]
    strict: Mapped[bool]
    axis: Mapped[str | None]
    mapping: Mapped[dict[str, Any] | None]
    rows: Mapped[int]
    defects: Mapped[list[dict[str, Any]]] = mapped_column(JSON)


class Imported(Base):
    """An imported run."""

    __tablename__ = "imported"
    __table_args__ = (
        CheckConstraint(
            "status <> 'finished' or val_bpb is not null or val_loss is not null "
            "or core is not null",
            name="finished_with_a_value",
        ),
        _check("a_value_where_there_is_one", "val_bpb val_loss train_loss", POSITIVE),
        _check("core_is_a_share", "core", "{} between -1 and 1"),
        _check("positive", "depth batch_tokens tokens_asked flops_per_token ranks", "{} > 0"),
        _check("no_negative_spending", "steps tokens flops train_seconds wall_seconds", "{} >= 0"),
        CheckConstraint(
            "status <> 'finished' or (coalesce(steps, 1) > 0 and coalesce(tokens, 1) > 0 "
            "and coalesce(flops, 1) > 0)",
            name="finished_with_spending",
        ),
    )
    home: Mapped[Key]
    run_id: Mapped[Key]
    hash: Mapped[str]
    row: Mapped[int]
    label: Mapped[str | None]
    recipe: Mapped[str | None]
    depth: Mapped[int | None]
    seed: Mapped[int | None]
    horizon: Mapped[str | None]
    status: Mapped[str]
    reason: Mapped[str | None]
    parameters_wte: Mapped[int | None]
    parameters_value_embeds: Mapped[int | None]
    parameters_lm_head: Mapped[int | None]
    parameters_matrices: Mapped[int | None]
    parameters_scalars: Mapped[int | None]
    parameters_scaling: Mapped[int | None]
    parameters_total: Mapped[int | None]
    flops_per_token: Mapped[float | None]
    tokens_asked: Mapped[float | None]
    batch_tokens: Mapped[int | None]
    steps: Mapped[int | None]
    tokens: Mapped[int | None]
    flops: Mapped[float | None]
    train_loss: Mapped[float | None]
    val_loss: Mapped[float | None]
    val_bpb: Mapped[float | None]
    core: Mapped[float | None]
    train_seconds: Mapped[float | None]
    wall_seconds: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    flops_per_second: Mapped[float | None]
    peak_memory_bytes: Mapped[int | None]
    host: Mapped[str | None]
    device_name: Mapped[str | None]
    ranks: Mapped[int | None]
    commit: Mapped[str | None]
    corpus: Mapped[str | None]
    tokenizer: Mapped[str | None]
    validation: Mapped[str | None]
    sequence_length: Mapped[int | None]
    flags: Mapped[str | None]
    usable: Mapped[bool]
    original: Mapped[dict[str, Any] | None]


def create(connection: Connection) -> None:
    """Create every table and view, in a database that has none."""
    Base.metadata.create_all(connection, checkfirst=False)
    for view in VIEWS.read_text(encoding="utf-8").split("\n---\n"):
        connection.exec_driver_sql(view)
    connection.execute(insert(SchemaVersion).values(version=VERSION))
