"""Status of runs, derived from their files, their locks and Slurm; nothing stores it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TypedDict

from slm.files import read_json
from slm.monitor.run_progress import RunProgress, last_events
from slm.run import RunState, list_attempts, list_runs, run_state
from slm.text import duration, one_line

ORDER = ("flops_planned", "recipe", "depth", "seed", "run_id")
"""Fields that rows are sorted by."""
REASON_WIDTH = 60
"""Characters of a reason in the table."""
COLUMNS = {
    "run_id": "run",
    "recipe": "recipe",
    "depth": "d",
    "horizon": "horizon",
    "seed": "seed",
    "status": "status",
    "progress": "step",
    "left": "left",
    "val_bpb": "val_bpb",
    "flops": "FLOPs",
    "train_seconds": "s",
    "why": "why",
}
"""Columns of the table with their headings; `left` and `why` are shown if any run has them."""
NO_REASON = ("finished", "planned", "running", "queued")
"""States that need no reason."""


class StatusRow(TypedDict):
    """Row of `slm status`. Result fields are None for an unfinished run."""

    run_id: str
    recipe: str
    horizon: str
    seed: int
    depth: int
    steps: int
    flops_planned: float
    status: str
    reason: str | None
    message: str | None
    val_bpb: float | None
    flops: float | None
    train_seconds: float | None
    step: int
    seconds_left: float | None
    """None unless the run is running and its speed is known."""


def status_rows(run_folders: Sequence[Path]) -> tuple[list[StatusRow], list[str]]:
    """Return rows of runs, cheapest first, and one error message for each that cannot be read."""
    rows: list[StatusRow] = []
    problems = []
    jobs: dict[str, str | None] = {}
    try:
        jobs = job_states(run_folders)
    except RuntimeError as error:
        problems.append(f"Slurm does not answer: {error}")
    for folder in run_folders:
        try:
            rows.append(_row(folder, jobs.get(folder.name)))
        except (KeyError, TypeError) as error:
            problems.append(f"{folder}: its documents lack {error}")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return sorted(rows, key=itemgetter(*ORDER)), problems


def status_table(rows: Sequence[StatusRow]) -> tuple[list[str], list[list[str | None]]]:
    """Return the headings and the cells of the table of `slm status`."""
    cells = [_cells(row) for row in rows]
    names = [
        name for name in COLUMNS if name not in ("left", "why") or any(row[name] for row in cells)
    ]
    return [COLUMNS[name] for name in names], [[row[name] for name in names] for row in cells]


def _cells(row: StatusRow) -> dict[str, str | None]:
    formats = {"val_bpb": ".4f", "flops": ".3g", "train_seconds": ".1f"}
    cells: dict[str, str | None] = {}
    for name, value in row.items():
        cells[name] = None if value is None else format(value, formats.get(name, ""))
    seconds = row["seconds_left"]
    reason = "" if row["status"] in NO_REASON else one_line(row["message"] or "")
    if len(reason) > REASON_WIDTH:
        reason = f"{reason[:REASON_WIDTH]}…"
    return cells | {
        "progress": f"{row['step']:,}/{row['steps']:,}",
        "left": None if seconds is None else duration(seconds),
        "why": reason or None,
    }


def _row(folder: Path, job: str | None) -> StatusRow:
    plan = read_json(folder / "plan.json")  # not as a Plan: any version of slm may have written it
    hp = plan["hyperparameters"]
    state = run_state(folder, job)
    is_finished = state.status == "finished"
    done = read_json(folder / "done.json") if is_finished else {}
    progress = None if is_finished else run_progress(folder, hp["steps"])
    return {
        "run_id": folder.name,
        "recipe": plan["recipe"],
        "horizon": plan["horizon"],
        "seed": plan["seed"],
        "depth": hp["depth"],
        "steps": hp["steps"],
        "flops_planned": hp["flops_per_token"] * hp["batch_tokens"] * hp["steps"],
        "status": state.status,
        "reason": state.reason,
        "message": state.message,
        "val_bpb": done.get("val_bpb"),
        "flops": done.get("flops"),
        "train_seconds": done.get("train_seconds"),
        "step": progress.step if progress else hp["steps"],
        "seconds_left": progress.seconds_left if progress and state.status == "running" else None,
    }


def run_progress(run_folder: Path, steps: int) -> RunProgress:
    """Return the progress of a run, from the last events of its attempts."""
    progress = RunProgress(steps)
    for attempt in list_attempts(run_folder):
        for event in last_events(attempt / "events.jsonl"):
            progress.update(event)
    return progress


def job_states(run_folders: Sequence[Path]) -> dict[str, str | None]:
    """Return the states of the runs' Slurm jobs by run_id.

    Raises RuntimeError if Slurm does not answer.
    """
    from slm.sweep import slurm

    jobs = slurm.jobs_of(run_folders)
    return {folder.name: job.status for folder, job in jobs.items()}


def run_states(run_folders: Sequence[Path]) -> dict[Path, RunState]:
    """Return the states of runs; from their files alone if Slurm does not answer."""
    jobs: dict[str, str | None] = {}
    with suppress(RuntimeError):
        jobs = job_states(run_folders)
    return {folder: run_state(folder, jobs.get(folder.name)) for folder in run_folders}


def experiment_runs(home: Path, experiment: str | None = None) -> list[Path]:
    """Return the run folders of a home, or of one experiment.

    Raises ValueError if there is no such home or experiment, or if the experiment was imported.
    """
    try:
        return list_runs(home, experiment)
    except ValueError:
        from slm.exchange.importers import imported_experiments

        if experiment in imported_experiments(home).values():
            raise ValueError(
                f"experiment {experiment!r} is imported, without run folders: "
                f"`slm report {experiment}` shows it"
            ) from None
        raise
