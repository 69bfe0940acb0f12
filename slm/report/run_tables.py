"""The runs of an experiment: results, replicates, speed, and what failures cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from slm.figures.style import flops_text
from slm.hardware import devices
from slm.report.content import Block, Text
from slm.report.gather import (
    Columns,
    Found,
    Row,
    compute,
    core_word,
    counted,
    counts,
    depth,
    each,
    label,
    number,
    ratio,
    replicates,
    table,
    varying,
    where,
)
from slm.text import duration


def of_runs(found: Found) -> list[Block]:
    """A row a run; columns that are the same for all are left to the caption."""
    rows = found.rows
    columns: Columns = {"depth": depth}
    columns |= varying(rows, "recipe", "horizon", "seed", "label")
    if len(found.finished) < len(rows):
        columns["status"] = lambda row: str(row["status"])
    columns |= {
        "parameters N": lambda row: counted(row["parameters_scaling"]),
        "tokens D": lambda row: counted(row["tokens"]),
        "D/N": lambda row: ratio(row["tokens"], row["parameters_scaling"], ".4g"),
        "FLOPs": compute,
        "steps": lambda row: number(row["steps"], ",.0f"),
        "train loss": lambda row: number(row["train_loss"], ".4f"),
        "val_bpb": lambda row: number(row["val_bpb"], ".4f"),
    }
    if any(row["core"] is not None for row in rows):
        columns[core_word(rows)] = lambda row: number(row["core"], ".4f")
    columns |= varying(rows, "flags")
    columns["run"] = lambda row: str(row["run_id"])
    same = ", ".join(each(rows, "horizon")) if len(each(rows, "horizon")) == 1 else ""
    caption = (
        f"{counts(len(rows), 'run')}{f', {same}' if same else ''}; N is the matrices and the head"
    )
    return [table(caption, columns, rows)]


def of_seeds(found: Found) -> list[Block]:
    """A row for runs that differ in nothing but the seed; nothing where there are none."""
    groups = replicates(found.finished)
    columns: Columns = {"depth": lambda own: depth(own[0])}
    columns |= (
        {"recipe": lambda own: str(own[0]["recipe"])}
        if len({own[0]["recipe"] for own in groups}) > 1
        else {}
    )
    columns |= {
        "horizon": lambda own: str(own[0]["horizon"]),
        "seeds": lambda own: str(len(own)),
        "mean val_bpb": lambda own: f"{fmean(row['val_bpb'] for row in own):.4f}",
        "standard deviation": lambda own: f"{stdev(row['val_bpb'] for row in own):.4f}",
        "of the mean": lambda own: (
            f"{100 * stdev(row['val_bpb'] for row in own) / own[0]['val_bpb']:.2f} %"
        ),
    }
    return [table("Seeds: how much of a difference is luck", columns, groups)] if groups else []


def throughput(finished: Sequence[Row]) -> list[Block]:
    """Speed, time and memory of every finished run."""
    timed = [row for row in finished if row["train_seconds"]]
    if not timed:
        return []
    columns: Columns = {"depth": depth}
    columns |= varying(timed, "recipe", "horizon", "seed")
    columns |= {
        "tokens/s": lambda row: number(row["tokens_per_second"], ",.0f"),
        "FLOP/s": lambda row: (
            flops_text(row["flops_per_second"]) if row["flops_per_second"] else ""
        ),
    }
    if any(_mfu(row) for row in timed):
        columns["MFU"] = lambda row: f"{used:.1%}" if (used := _mfu(row)) else ""
    columns |= {
        "training": lambda row: duration(row["train_seconds"]),
        "wall": lambda row: duration(row["wall_seconds"]) if row["wall_seconds"] else "",
        "training share": lambda row: ratio(row["train_seconds"], row["wall_seconds"], ".0%"),
        "peak memory": lambda row: (
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if row["peak_memory_bytes"] else ""
        ),
        "on": where,
    }
    train, wall = (
        sum(row[name] or 0.0 for row in timed) for name in ("train_seconds", "wall_seconds")
    )
    work = f" in {duration(wall)} at work, evaluation and checkpoints included" if wall else ""
    unknown = "" if "MFU" in columns else " MFU is not known: no peak is known of the device."
    return [
        Text(f"{duration(train)} of training{work}.{unknown}"),
        table("How fast each run was", columns, timed),
    ]


def _mfu(row: Row) -> float | None:
    return devices.mfu(row["flops_per_second"], row["device_name"], row["ranks"])


def attempts(found: Found) -> list[Block]:
    """Every attempt that ended without finishing, and what all of them took."""
    lost = [own for own in found.attempts if own["reason"]]
    if not found.attempts:
        return []
    seconds = sum(own["ended"] - own["created"] for own in lost if own["ended"])
    runs = len({own["run_id"] for own in found.attempts})
    said = f"{counts(len(found.attempts), 'attempt')} for {counts(runs, 'run')}"
    if not lost:
        return [Text(f"{said}: none failed, nothing was lost.")]
    rows = {row["run_id"]: row for row in found.rows}
    columns: Columns = {
        "run": lambda own: label(rows[own["run_id"]]),
        "attempt": lambda own: f"{own['attempt']:g}",
        "ended by": lambda own: str(own["reason"]),
        "after": lambda own: duration(own["ended"] - own["created"]) if own["ended"] else "",
        "on": lambda own: str(own["host"] or ""),
        "message": lambda own: " ".join(str(own["message"] or "").split())[:300],
    }
    cost = f"{len(lost)} ended without finishing, after {duration(seconds)} together"
    return [
        Text(f"{said}; {cost}. The steps up to their last checkpoints were kept."),
        table("Attempts that ended without finishing", columns, lost),
    ]
