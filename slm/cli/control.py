"""`slm stop`, `slm retry` and `slm rm`: stop, retry and remove runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

import store
from slm.cli.options import Json, confirm, print_result, report_problems
from slm.files import read_json
from slm.monitor.progress import report_line
from slm.monitor.status import run_progress, run_states, status_rows
from slm.run import (
    cancel_run,
    find_run,
    is_done,
    last_attempt,
    list_runs,
    other_host,
    remove_run,
    remove_weights,
    retry_run,
    run_holder,
    run_sizes,
    run_state,
    stop_run,
)
from slm.text import count, plural
from store import home

POLL_SECONDS = 0.3
"""Pause between two looks at runs that are stopping."""
ENDS = {
    "running": "still running",
    "cancelled": "stopped; `slm retry` lets a sweep train it again",
    "interrupted": "stopped; the same `slm sweep` resumes it",
    "finished": "finished",
}
"""Text for the states of a run after `slm stop`."""
RUN_IDS = "Run_ids, or their first digits."
Runs = Annotated[list[str] | None, Argument(help=RUN_IDS)]


def stop(
    runs: Runs = None,
    no_wait: Annotated[
        bool, Option("--no-wait", help="Return before the runs have ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stop the sweep and all runs after a checkpoint; or cancel some runs until `slm retry`."""
    from slm.sweep.orchestrator import sweep_process

    named = _find_runs(runs)
    folders = named or _active(list_runs(home()))
    hosts = {folder.name: host for folder in folders if (host := other_host(folder))}
    local = [folder for folder in folders if folder.name not in hosts]
    process = None if named else sweep_process(home())
    active = _active(local) if named else local
    _request_stop(local, cancel=bool(named), process=process)
    names = ", ".join(folder.name for folder in active) or "no run"
    if process is not None:
        report_line(f"asked the sweep (process {process}) to stop; active: {names}")
    elif active:
        report_line(f"asked to checkpoint and stop: {names}")
    if not no_wait:
        while any(map(run_holder, active)) or (process and sweep_process(home()) == process):
            time.sleep(POLL_SECONDS)
    rows = [_stopped(folder) for folder in local]
    print_result(
        as_json,
        {"home": home(), "conductor": process, "runs": rows, "elsewhere": hosts},
        "\n".join(map(_describe, rows)) or "no run is active on this machine",
    )
    for run_id, host in hosts.items():
        report_problems([f"run {run_id} runs on {host}: type `slm stop {run_id}` there"])
    if hosts:
        raise Exit(1)


def _find_runs(runs: Sequence[str] | None) -> list[Path]:
    """Return the folders of runs, each once."""
    return list(dict.fromkeys(find_run(home(), run) for run in runs or ()))


def _active(folders: Sequence[Path]) -> list[Path]:
    """Return the runs that a process holds or that have a Slurm job."""
    from slm.sweep import slurm

    jobs = slurm.jobs_of(folders)
    return [folder for folder in folders if folder in jobs or run_holder(folder)]


def _request_stop(folders: Sequence[Path], cancel: bool, process: int | None) -> None:
    """Ask the orchestrator to stop, or where there is none, the runs themselves."""
    from slm.sweep import slurm

    if process is not None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        return
    jobs = slurm.jobs_of(folders)
    for folder in folders:
        if not cancel:
            stop_run(folder)
        elif not is_done(folder):
            cancel_run(folder)
        if folder in jobs and (attempt := last_attempt(folder)):
            slurm.stop_job(jobs[folder], attempt)


def _stopped(folder: Path) -> dict[str, Any]:
    """Return step and state of a run for the document of `slm stop`."""
    path = folder / "plan.json"
    try:
        steps = read_json(path)["hyperparameters"]["steps"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: stop was requested, but plan.json lacks {error}") from None
    step = run_progress(folder, steps).step
    return {"run_id": folder.name, "step": step, "steps": steps, **vars(run_state(folder))}


def _describe(row: dict[str, Any]) -> str:
    end = ENDS.get(row["status"], f"{row['status']}: {row['message'] or 'no message'}")
    return f"{row['run_id']} at step {row['step']:,} of {row['steps']:,}: {end}"


def retry(
    runs: Runs = None,
    failed: Annotated[bool, Option("--failed", help="All runs that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Clear the failures of runs, so that the next sweep resumes them from their checkpoints."""
    from slm.sweep.orchestrator import sweep_process

    if bool(runs) == failed:
        raise ValueError("name the runs to retry, or say --failed")
    folders = _find_runs(runs)
    if failed:
        rows, _ = status_rows(list_runs(home()))
        folders = [home() / row["run_id"] for row in rows if row["status"] == "failed"]
    for folder in folders:
        status = run_state(folder).status
        if status in ("finished", "running"):
            raise ValueError(f"run {folder.name} is {status}: there is nothing to retry")
    for folder in folders:
        retry_run(folder)
    process = sweep_process(home())
    names = [folder.name for folder in folders]
    text = f"{plural(len(names), 'run')} to retry"
    if names:
        text += f": {', '.join(names)}\n{_next_command(folders, process)}"
    print_result(as_json, {"home": home(), "conductor": process, "runs": names}, text)


def _next_command(folders: Sequence[Path], process: int | None) -> str:
    """Return which sweep trains these runs, or the command to type."""
    command = "type their `slm sweep` again"
    if len(folders) == 1:
        command += f", or `slm sweep --plan {folders[0] / 'plan.json'}`"
    if process is None:
        return f"no sweep is running: {command}"
    return (
        f"process {process} runs a sweep and retries its own runs; for others, {command} after it"
    )


def rm(
    runs: Annotated[list[str], Argument(help=RUN_IDS)],
    checkpoints: Annotated[
        bool, Option("--checkpoints", help="Only weights and checkpoints.")
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs with their results, or only weights and checkpoints, after showing the sizes."""
    folders = _find_runs(runs)
    with without_sweep():
        refuse_active(folders)
        freed = 0
        for folder in folders:
            sizes = run_sizes(folder)
            if checkpoints:
                del sizes["records"]
            freed += sum(sizes.values())
            report_line(_loss(folder, sizes))
        parts = "weights and checkpoints" if checkpoints else "results and files"
        confirm(f"remove the {parts} of {plural(len(folders), 'run')}?", yes)
        for folder in folders:
            remove_weights(folder) if checkpoints else remove_run(folder)
    store.ingest(home())
    names = [folder.name for folder in folders]
    print_result(as_json, {"home": home(), "runs": names, "bytes": freed}, f"freed {count(freed)}B")


@contextmanager
def without_sweep() -> Iterator[None]:
    """Keep sweeps from starting in this block. Raises ValueError while one is running."""
    from slm.sweep.orchestrator import sweep_lock, sweep_process

    with sweep_lock(home()) as acquired:
        if not acquired:
            process = sweep_process(home())
            raise ValueError(f"{home()} is being swept by process {process}: `slm stop` first")
        yield


def refuse_active(folders: Sequence[Path], why: str = "") -> None:
    """Raise ValueError, saying why they must not be active, for a run that is running or queued."""
    for folder, state in run_states(folders).items():
        if process := run_holder(folder):
            reason = f"is running (process {process})"
        elif state.status in ("running", "queued"):
            reason = f"is {state.status} on Slurm"
        else:
            continue
        raise ValueError(f"run {folder.name} {why}{reason}: `slm stop {folder.name}` first")


def _loss(folder: Path, sizes: dict[str, int]) -> str:
    """Describe what removing these parts of a run frees and loses."""
    status = run_state(folder).status
    parts = ", ".join(f"{part} {count(size)}B" for part, size in sizes.items())
    restarts = "records" not in sizes and sizes["checkpoints"] and status != "finished"
    return f"{folder.name} ({status}): {parts}{'; it will start over' if restarts else ''}"
