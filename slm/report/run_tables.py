"""Tables of an experiment's runs: results, replicates, CORE, throughput, and the cost of
failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from slm.figures.style import count_text
from slm.hardware import devices
from slm.report.gather import (
    ExperimentData,
    Row,
    depth_label,
    devices_of,
    distinct,
    replicates,
    row_label,
)
from slm.report.render import Part, Table
from slm.text import duration, flops, one_line, plural

Columns = dict[str, Callable[[Any], str]]
"""Headers, and the cell of each for a row."""


def table(caption: str, columns: Columns, rows: Iterable[Any]) -> Table:
    """Build a table with a row for each of `rows`."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return Table(caption, list(columns), cells)


def run_table(data: ExperimentData) -> Table:
    """Build a table of all runs, without columns that are the same for all."""
    rows = data.rows
    columns = naming(rows, "label")
    if len(data.finished) < len(rows):
        columns["status"] = cell("status")
    columns |= {
        "parameters N": positive("parameters_scaling", count_text),
        "tokens D": positive("tokens", count_text),
        "D/N": ratio("tokens", "parameters_scaling", ".4g"),
        "FLOPs": positive("flops", flops),
        "steps": cell("steps", ",.0f"),
        "train loss": cell("train_loss", ".4f"),
        "val_bpb": cell("val_bpb", ".4f"),
    }
    if any(row["core"] is not None for row in rows):
        columns[data.core_name] = cell("core", ".4f")
    columns |= varying(rows, "flags")
    columns["run"] = cell("run_id")
    horizons = distinct(rows, "horizon")
    horizon = f", {horizons[0]}" if len(horizons) == 1 else ""
    caption = f"{plural(len(rows), 'run')}{horizon}; N is the matrices and the head"
    return table(caption, columns, rows)


def seed_tables(data: ExperimentData) -> list[Table]:
    """Build a table of runs that differ only in the seed; none without such runs."""
    groups = replicates(data.finished)
    if not groups:
        return []
    rows = []
    for group in groups:
        losses = [row["val_bpb"] for row in group]
        spread = stdev(losses)
        numbers = {"mean": fmean(losses), "spread": spread, "share": 100 * spread / losses[0]}
        rows.append({**group[0], "seeds": len(group), **numbers})
    columns: Columns = {
        "depth": depth_label,
        **varying(rows, "recipe"),
        "horizon": cell("horizon"),
        "seeds": cell("seeds"),
        "mean val_bpb": cell("mean", ".4f"),
        "standard deviation": cell("spread", ".4f"),
        "of the mean": lambda row: f"{row['share']:.2f} %",
    }
    return [table("Seeds: how much of a difference is luck", columns, rows)]


def core_table(data: ExperimentData) -> Table:
    """Build a table of the scores of evaluated runs."""
    columns = naming(data.scored) | {
        "FLOPs": positive("flops", flops),
        data.core_name: cell("core", ".4f"),
        "standard error": cell("core_error", ".4f"),
        "val_bpb": cell("val_bpb", ".4f"),
        "mode": cell("core_mode"),
    }
    caption = f"{data.core_name} of the final weights: 0 is chance, 1 is perfect"
    return table(caption, columns, data.scored)


def throughput(finished: Sequence[Row]) -> list[Part]:
    """Return speed, time and memory of every finished run."""
    timed = [row for row in finished if row["train_seconds"]]
    if not timed:
        return []
    columns = naming(timed)
    columns["tokens/s"] = cell("tokens_per_second", ",.0f")
    columns["FLOP/s"] = positive("flops_per_second", flops)
    if any(map(_mfu, timed)):
        columns["MFU"] = _mfu
    columns |= {
        "training": positive("train_seconds", duration),
        "wall": positive("wall_seconds", duration),
        "training share": ratio("train_seconds", "wall_seconds", ".0%"),
        "peak memory": positive("peak_memory_bytes", _gigabytes),
        "on": devices_of,
    }
    train = sum(row["train_seconds"] for row in timed)
    wall = sum(row["wall_seconds"] or 0.0 for row in timed)
    summary = f"{duration(train)} of training"
    if wall:
        summary += f" in {duration(wall)} of wall time, with evaluation and checkpoints"
    summary += "."
    if "MFU" not in columns:
        summary += " MFU is unknown: the peak of the device is not known."
    return [Part(text=summary, tables=[table("Speed of each run", columns, timed)])]


def _mfu(row: Row) -> str:
    share = devices.mfu(row["flops_per_second"], row["device_name"], row["ranks"])
    return f"{share:.1%}" if share else ""


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def attempts(data: ExperimentData) -> list[Part]:
    """Return every attempt that ended without finishing, and how long all of them took."""
    if not data.attempts:
        return []
    failed = [attempt for attempt in data.attempts if attempt["reason"]]
    runs = len({attempt["run_id"] for attempt in data.attempts})
    counts = f"{plural(len(data.attempts), 'attempt')} for {plural(runs, 'run')}"
    if not failed:
        return [Part(text=f"{counts}: none failed.")]
    seconds = sum(_seconds(attempt) for attempt in failed)
    rows = {row["run_id"]: row for row in data.rows}
    columns: Columns = {
        "run": lambda attempt: row_label(rows[attempt["run_id"]]),
        "attempt": lambda attempt: f"{attempt['attempt']:g}",
        "ended by": cell("reason"),
        "after": lambda attempt: duration(_seconds(attempt)) if attempt["ended"] else "",
        "on": cell("host"),
        "message": lambda attempt: one_line(attempt["message"] or "")[:300],
    }
    summary = (
        f"{counts}; {len(failed)} ended without finishing, after {duration(seconds)} together. "
        "Steps up to their last checkpoints were not lost."
    )
    title = "Attempts that ended without finishing"
    return [Part(text=summary, tables=[table(title, columns, failed)])]


def _seconds(attempt: Row) -> float:
    return attempt["ended"] - attempt["created"] if attempt["ended"] else 0.0


def naming(rows: Sequence[Row], *names: str) -> Columns:
    """Return the columns that name a run: its depth, and what else differs between the rows."""
    return {"depth": depth_label, **varying(rows, "recipe", "horizon", "seed", *names)}


def varying(rows: Sequence[Row], *names: str) -> Columns:
    """Return those columns of `results` in which the rows differ."""
    return {name: cell(name) for name in names if len({row[name] for row in rows}) > 1}


def cell(name: str, form: str = "") -> Callable[[Row], str]:
    """Return a column in a format; a missing value is empty, whole floats have no decimals."""

    def formatted(row: Row) -> str:
        value = row[name]
        if value is None:
            return ""
        default = "g" if isinstance(value, float) else ""
        return format(value, form or default)

    return formatted


def positive(name: str, render: Callable[[float], str]) -> Callable[[Row], str]:
    """Return a column of positive numbers; a missing one is empty."""
    return lambda row: render(row[name]) if row[name] else ""


def ratio(name: str, divisor: str, form: str) -> Callable[[Row], str]:
    """Return a column of quotients; it is empty if a number is missing."""
    return lambda row: format(row[name] / row[divisor], form) if row[name] and row[divisor] else ""
