"""`slm stop`, `slm retry` and `slm rm`: stop, retry and remove runs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import Json, print_json
from slm.files import read_json
from slm.text import count, plural

POLL_SECONDS = 0.3
"""Pause between two looks at runs that are stopping."""
ENDS = {
    "running": "still running",
    "cancelled": "stopped; `slm retry` lets a sweep train it again",
    "interrupted": "stopped; the same `slm sweep` resumes it",
    "finished": "finished",
}
"""Text for the states of a run after `slm stop`."""
Runs = Annotated[list[str] | None, typer.Argument(help="Run_ids, or their first digits.")]


def stop(
    runs: Runs = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return before the runs have ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stop the sweep and all runs after a checkpoint; or cancel some runs until `slm retry`."""
    from slm.run import find_run, list_runs, other_host
    from slm.sweep.orchestrator import sweep_process
    from store import home

    named = [find_run(home(), run) for run in runs or ()]
    folders = named or _active(list_runs(home()))
    hosts = {folder.name: host for folder in folders if (host := other_host(folder))}
    local = [folder for folder in folders if folder.name not in hosts]
    process = None if named else sweep_process(home())
    active = _active(local) if named else local
    _request_stop(local, cancel=bool(named), process=process)
    names = ", ".join(folder.name for folder in active) or "no run"
    if process is not None:
        print(f"asked the sweep (process {process}) to stop; active: {names}", file=sys.stderr)
    elif active:
        print(f"asked to checkpoint and stop: {names}", file=sys.stderr)
    if not no_wait:
        _wait(home(), active, process)
    rows = [_stopped(folder) for folder in local]
    if as_json:
        print_json({"home": str(home()), "conductor": process, "runs": rows, "elsewhere": hosts})
    else:
        print("\n".join(map(_describe, rows)) or "no run is active on this machine")
    for run_id, host in hosts.items():
        print(f"slm: run {run_id} runs on {host}: type `slm stop {run_id}` there", file=sys.stderr)
    if hosts:
        raise typer.Exit(1)


def _active(folders: Sequence[Path]) -> list[Path]:
    """Return the runs that a process holds or that have a Slurm job."""
    from slm.run import run_holder
    from slm.sweep import slurm

    jobs = slurm.jobs_of(folders)
    return [folder for folder in folders if folder in jobs or run_holder(folder)]


def _request_stop(folders: Sequence[Path], cancel: bool, process: int | None) -> None:
    """Ask the orchestrator to stop, or where there is none, the runs themselves."""
    from slm.run import cancel_run, is_done, last_attempt, stop_run
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


def _wait(home: Path, folders: Sequence[Path], process: int | None) -> None:
    """Wait until no process holds these runs and the orchestrator has ended."""
    from slm.run import run_holder
    from slm.sweep.orchestrator import sweep_process

    while any(map(run_holder, folders)) or (process and sweep_process(home) == process):
        time.sleep(POLL_SECONDS)


def _stopped(folder: Path) -> dict[str, Any]:
    """Return step and state of a run for the document of `slm stop`."""
    from slm.monitor.status import run_progress
    from slm.run import run_state

    path = folder / "plan.json"
    try:
        steps = read_json(path)["hyperparameters"]["steps"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: stop was requested, but plan.json lacks {error}") from None
    progress = run_progress(folder, steps)
    return {"run_id": folder.name, "step": progress.step, "steps": steps, **vars(run_state(folder))}


def _describe(row: dict[str, Any]) -> str:
    end = ENDS.get(row["status"], f"{row['status']}: {row['message'] or 'no message'}")
    return f"{row['run_id']} at step {row['step']:,} of {row['steps']:,}: {end}"


def retry(
    runs: Runs = None,
    failed: Annotated[bool, typer.Option("--failed", help="All runs that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Clear the failures of runs, so that the next sweep resumes them from their checkpoints."""
    from slm.monitor.status import status_rows
    from slm.run import find_run, list_runs, retry_run, run_state
    from slm.sweep.orchestrator import sweep_process
    from store import home

    if bool(runs) == failed:
        raise ValueError("name the runs to retry, or say --failed")
    if failed:
        rows, _ = status_rows(list_runs(home()))
        folders = [home() / row["run_id"] for row in rows if row["status"] == "failed"]
    else:
        folders = [*dict.fromkeys(find_run(home(), run) for run in runs or ())]
    for folder in folders:
        status = run_state(folder).status
        if status in ("finished", "running"):
            raise ValueError(f"run {folder.name} is {status}: there is nothing to retry")
    for folder in folders:
        retry_run(folder)
    process = sweep_process(home())
    names = [folder.name for folder in folders]
    if as_json:
        print_json({"home": str(home()), "conductor": process, "runs": names})
        return
    retried = plural(len(names), "run") + " to retry"
    print(f"{retried}: {', '.join(names)}" if names else retried)
    if names:
        print(_next_command(folders, process))


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
    runs: Annotated[list[str], typer.Argument(help="Run_ids, or their first digits.")],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Only weights and checkpoints.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs with their results, or only weights and checkpoints, after showing the sizes."""
    import store
    from slm.run import find_run, remove_run, remove_weights, run_sizes
    from slm.sweep.orchestrator import sweep_lock, sweep_process

    home = store.home()
    folders = [*dict.fromkeys(find_run(home, run) for run in runs)]
    with sweep_lock(home) as locked:
        if not locked:
            process = sweep_process(home)
            raise ValueError(f"{home} is being swept by process {process}: `slm stop` first")
        _refuse_active(folders)
        freed = 0
        for folder in folders:
            sizes = run_sizes(folder)
            if checkpoints:
                del sizes["records"]
            freed += sum(sizes.values())
            print(_loss(folder, sizes), file=sys.stderr)
        if not yes:
            _confirm(len(folders), checkpoints)
        for folder in folders:
            remove_weights(folder) if checkpoints else remove_run(folder)
    store.ingest(home)
    if as_json:
        print_json({"home": str(home), "runs": [folder.name for folder in folders], "bytes": freed})
    else:
        print(f"freed {count(freed)}B")


def _refuse_active(folders: Sequence[Path]) -> None:
    from slm.monitor.status import run_states
    from slm.run import run_holder

    for folder, state in run_states(folders).items():
        if process := run_holder(folder):
            reason = f"is running (process {process})"
        elif state.status in ("running", "queued"):
            reason = f"is {state.status} on Slurm"
        else:
            continue
        raise ValueError(f"run {folder.name} {reason}: `slm stop {folder.name}` first")


def _loss(folder: Path, sizes: dict[str, int]) -> str:
    """Describe what removing these parts of a run frees and loses."""
    from slm.run import run_state

    status = run_state(folder).status
    parts = ", ".join(f"{part} {count(size)}B" for part, size in sizes.items())
    restarts = "records" not in sizes and sizes["checkpoints"] and status != "finished"
    return f"{folder.name} ({status}): {parts}{'; it will start over' if restarts else ''}"


def _confirm(number: int, checkpoints: bool) -> None:
    parts = "weights and checkpoints" if checkpoints else "results and files"
    if not sys.stdin.isatty():
        raise ValueError("no terminal to ask on: --yes removes without asking")
    typer.confirm(f"remove the {parts} of {plural(number, 'run')}?", abort=True, err=True)
