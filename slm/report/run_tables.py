"""Tables of an experiment's runs: results, replicates, CORE, throughput, and the cost of
failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

from slm.figures.style import count_text
from slm.hardware import devices
from slm.report.gather import (
    ExperimentData,
    Row,
    core_name,
    depth_label,
    devices_of,
    distinct,
    replicates,
    run_label,
)
from slm.report.render import Part, Table
from slm.text import duration, flops, plural

Columns = dict[str, Callable[[Any], str]]
"""Headers, and the cell of each for a row."""


def table(caption: str, columns: Columns, rows: Iterable[Any]) -> Table:
    """Build a table with a row for each of `rows`."""
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return Table(caption, list(columns), cells)


def run_table(data: ExperimentData) -> Table:
    """Build a table of all runs, without columns that are the same for all."""
    rows = data.rows
    columns: Columns = {"depth": depth_label, **varying(rows, "recipe", "horizon", "seed", "label")}
    if len(data.finished) < len(rows):
        columns["status"] = text("status")
    columns |= {
        "parameters N": lambda row: _count(row["parameters_scaling"]),
        "tokens D": lambda row: _count(row["tokens"]),
        "D/N": lambda row: _ratio(row["tokens"], row["parameters_scaling"], ".4g"),
        "FLOPs": compute,
        "steps": number("steps", ",.0f"),
        "train loss": number("train_loss", ".4f"),
        "val_bpb": number("val_bpb", ".4f"),
    }
    if any(row["core"] is not None for row in rows):
        columns[core_name(rows)] = number("core", ".4f")
    columns |= varying(rows, "flags")
    columns["run"] = text("run_id")
    horizons = distinct(rows, "horizon")
    horizon = f", {horizons[0]}" if len(horizons) == 1 else ""
    caption = f"{plural(len(rows), 'run')}{horizon}; N is the matrices and the head"
    return table(caption, columns, rows)


def seed_tables(data: ExperimentData) -> list[Table]:
    """Build a table of runs that differ only in the seed; none without such runs."""
    groups = replicates(data.finished)
    if not groups:
        return []
    columns: Columns = {"depth": lambda group: depth_label(group[0])}
    if len({group[0]["recipe"] for group in groups}) > 1:
        columns["recipe"] = lambda group: str(group[0]["recipe"])
    columns |= {
        "horizon": lambda group: str(group[0]["horizon"]),
        "seeds": lambda group: str(len(group)),
        "mean val_bpb": lambda group: f"{fmean(_losses(group)):.4f}",
        "standard deviation": lambda group: f"{stdev(_losses(group)):.4f}",
        "of the mean": lambda group: f"{100 * stdev(_losses(group)) / group[0]['val_bpb']:.2f} %",
    }
    return [table("Seeds: how much of a difference is luck", columns, groups)]


def _losses(group: Sequence[Row]) -> list[float]:
    return [row["val_bpb"] for row in group]


def core_table(name: str, scored: Sequence[Row]) -> Table:
    """Build a table of the scores of evaluated runs."""
    columns: Columns = {"depth": depth_label, **varying(scored, "recipe", "horizon", "seed")}
    columns |= {
        "FLOPs": compute,
        name: number("core", ".4f"),
        "standard error": number("core_error", ".4f"),
        "val_bpb": number("val_bpb", ".4f"),
        "mode": text("core_mode"),
    }
    return table(f"{name} of the final weights: 0 is chance, 1 is perfect", columns, scored)


def throughput(finished: Sequence[Row]) -> list[Part]:
    """Return speed, time and memory of every finished run."""
    timed = [row for row in finished if row["train_seconds"]]
    if not timed:
        return []
    columns: Columns = {"depth": depth_label, **varying(timed, "recipe", "horizon", "seed")}
    columns["tokens/s"] = number("tokens_per_second", ",.0f")
    columns["FLOP/s"] = partial(compute, column="flops_per_second")
    if any(_mfu(row) for row in timed):
        columns["MFU"] = lambda row: f"{share:.1%}" if (share := _mfu(row)) else ""
    columns |= {
        "training": lambda row: duration(row["train_seconds"]),
        "wall": lambda row: duration(row["wall_seconds"]) if row["wall_seconds"] else "",
        "training share": lambda row: _ratio(row["train_seconds"], row["wall_seconds"], ".0%"),
        "peak memory": _memory,
        "on": devices_of,
    }
    train = sum(row["train_seconds"] or 0.0 for row in timed)
    wall = sum(row["wall_seconds"] or 0.0 for row in timed)
    summary = f"{duration(train)} of training"
    if wall:
        summary += f" in {duration(wall)} of wall time, with evaluation and checkpoints"
    summary += "."
    if "MFU" not in columns:
        summary += " MFU is unknown: the peak of the device is not known."
    return [Part(text=summary, tables=[table("Speed of each run", columns, timed)])]


def _mfu(row: Row) -> float | None:
    return devices.mfu(row["flops_per_second"], row["device_name"], row["ranks"])


def _memory(row: Row) -> str:
    return f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if row["peak_memory_bytes"] else ""


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
        "run": lambda attempt: run_label(rows[attempt["run_id"]]),
        "attempt": lambda attempt: f"{attempt['attempt']:g}",
        "ended by": text("reason"),
        "after": lambda attempt: duration(_seconds(attempt)) if attempt["ended"] else "",
        "on": text("host"),
        "message": lambda attempt: " ".join(str(attempt["message"] or "").split())[:300],
    }
    summary = (
        f"{counts}; {len(failed)} ended without finishing, after {duration(seconds)} together. "
        "Steps up to their last checkpoints were not lost."
    )
    title = "Attempts that ended without finishing"
    return [Part(text=summary, tables=[table(title, columns, failed)])]


def _seconds(attempt: Row) -> float:
    return attempt["ended"] - attempt["created"] if attempt["ended"] else 0.0


def varying(rows: Sequence[Row], *names: str) -> Columns:
    """Return those columns of `results` in which the rows differ."""
    return {name: text(name) for name in names if len({row[name] for row in rows}) > 1}


def text(name: str) -> Callable[[Row], str]:
    """Return a column of text; a missing value is empty, whole floats have no decimals."""

    def cell(row: Row) -> str:
        value = row[name]
        if value is None:
            return ""
        return f"{value:g}" if isinstance(value, float) else str(value)

    return cell


def number(name: str, form: str) -> Callable[[Row], str]:
    """Return a column of numbers in a format; a missing value is empty."""
    return lambda row: "" if row[name] is None else format(row[name], form)


def compute(row: Row, column: str = "flops") -> str:
    """Return FLOPs with three digits, empty if unknown."""
    return flops(row[column]) if row[column] else ""


def _count(value: float | None) -> str:
    return count_text(value) if value else ""


def _ratio(value: float | None, divisor: float | None, form: str) -> str:
    return format(value / divisor, form) if value and divisor else ""
