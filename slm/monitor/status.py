"""Status of runs, derived from their files, their locks and Slurm; nothing stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from slm.files import read_json
from slm.monitor.run_progress import RunProgress, last_events
from slm.run import DoneDocument, RunState, list_attempts, list_runs, run_state

ORDER = ("flops_planned", "recipe", "depth", "seed", "run_id")
"""Fields that rows are sorted by."""


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
    return sorted(rows, key=_order), problems


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ORDER)


def _row(folder: Path, job: str | None) -> StatusRow:
    plan = read_json(folder / "plan.json")  # not as a Plan: any version of slm may have written it
    hp = plan["hyperparameters"]
    state = run_state(folder, job)
    row: StatusRow = {
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
        "val_bpb": None,
        "flops": None,
        "train_seconds": None,
        "step": hp["steps"],
        "seconds_left": None,
    }
    if state.status == "finished":
        done: DoneDocument = read_json(folder / "done.json")
        row["val_bpb"] = done.get("val_bpb")
        row["flops"] = done.get("flops")
        row["train_seconds"] = done.get("train_seconds")
    else:
        progress = run_progress(folder, hp["steps"])
        row["step"] = progress.step
        row["seconds_left"] = progress.seconds_left if state.status == "running" else None
    return row


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

    return {folder.name: job.status for folder, job in slurm.jobs_of(run_folders).items()}


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
