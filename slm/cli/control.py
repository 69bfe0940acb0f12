"""`slm stop`, `slm retry` and `slm rm`: what is to become of runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import Json, print_json
from slm.cli.runs import rows_of, run_folder, run_ids_of, states_of, track_of
from slm.files import read_json
from slm.text import count

LOOK_SECONDS = 0.3
Runs = Annotated[list[str] | None, typer.Argument(help="Run_ids, or their first digits.")]


def stop(
    runs: Runs = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask, and do not wait.")] = False,
    as_json: Json = False,
) -> None:
    """Have everything at work checkpoint and stop; or these runs, which no sweep trains then until `slm retry`."""
    from slm.sweep import orchestrator as conduct
    from store import home

    given = [run_folder(home(), run) for run in runs or ()]
    folders = given or _at_work(home())
    far = {folder.name: host for folder in folders if (host := _elsewhere(folder))}
    here = [folder for folder in folders if folder.name not in far]
    conductor = None if given else conduct.conductor(home())
    asked = _ask(here, given=bool(given), conductor=conductor)
    _say_what_was_asked(asked, conductor)
    if not no_wait:
        _wait(home(), asked, conductor)
    ended = [_ended(folder) for folder in here]
    if as_json:
        print_json({"home": str(home()), "conductor": conductor, "runs": ended, "elsewhere": far})
    else:
        print("\n".join(_sentence(row) for row in ended) or "nothing is at work here")
    for run_id, host in far.items():
        print(
            f"slm: run {run_id} is at work on {host}: type `slm stop {run_id}` there",
            file=sys.stderr,
        )
    if far:
        raise typer.Exit(1)


def _at_work(home: Path) -> list[Path]:
    """Runs that somebody holds, or whose job a cluster has."""
    from slm.run import run_holder
    from slm.sweep import slurm

    folders = [home / run_id for run_id in run_ids_of(home)]
    jobs = slurm.jobs_of(folders)
    return [folder for folder in folders if folder in jobs or run_holder(folder)]


def _elsewhere(folder: Path) -> str | None:
    """The other machine on which a run is at work: its process numbers mean nothing here."""
    from slm.run import (
        is_done,
        is_on_this_machine,
        last_attempt,
        read_attempt,
        read_exit,
        run_holder,
    )

    attempt = last_attempt(folder)
    if attempt is None or read_exit(attempt) or is_done(folder) or is_on_this_machine(folder):
        return None
    document = read_attempt(attempt)
    return document["host"] if document["launcher"] == "local" and run_holder(folder) else None


def _ask(folders: Sequence[Path], given: bool, conductor: int | None) -> list[Path]:
    """Ask the conductor, or whoever holds these runs; those that were at work."""
    from slm.run import cancel_run, is_done, last_attempt, run_holder, stop_run
    from slm.sweep import slurm

    jobs = slurm.jobs_of(folders)
    at_work = [folder for folder in folders if folder in jobs or run_holder(folder)]
    if conductor is not None:
        with suppress(ProcessLookupError):
            os.kill(conductor, signal.SIGTERM)
    for folder in folders if conductor is None else ():
        if not given:
            stop_run(folder)
        elif not is_done(folder):
            cancel_run(folder)
        if folder in jobs and (attempt := last_attempt(folder)):
            slurm.stop(jobs[folder], attempt)
    return at_work


def _say_what_was_asked(asked: Sequence[Path], conductor: int | None) -> None:
    names = ", ".join(folder.name for folder in asked) or "nothing"
    if conductor is not None:
        print(f"asked the sweep (process {conductor}) to stop: {names} at work", file=sys.stderr)
    elif asked:
        print(f"asked to checkpoint and stop: {names}", file=sys.stderr)


def _wait(home: Path, asked: Sequence[Path], conductor: int | None) -> None:
    """Until those that were asked have ended."""
    from slm.run import run_holder
    from slm.sweep import orchestrator as conduct

    while any(run_holder(folder) for folder in asked) or (
        conductor and conduct.conductor(home) == conductor
    ):
        time.sleep(LOOK_SECONDS)


def _ended(folder: Path) -> dict[str, Any]:
    from slm.run import run_state

    try:
        steps = read_json(folder / "plan.json")["hyperparameters"]["steps"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'plan.json'} lacks {error}: what was asked to stop was asked"
        ) from None
    return {"run_id": folder.name, "step": track_of(folder, steps).step, "steps": steps} | vars(
        run_state(folder)
    )


def _sentence(row: dict[str, Any]) -> str:
    words = {
        "running": "is still at work",
        "cancelled": "stopped; `slm retry` lets a sweep train it again",
        "interrupted": "stopped; `slm sweep` typed again goes on",
        "finished": "is finished",
    }
    what = words.get(row["status"], f"{row['status']}: {row['message'] or 'no word'}")
    return f"{row['run_id']} at step {row['step']:,} of {row['steps']:,}: {what}"


def retry(
    runs: Runs = None,
    failed: Annotated[bool, typer.Option("--failed", help="All runs that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Forgive runs their ends so far, so that a sweep trains them again from their last checkpoints."""
    from slm.run import retry_run, run_state
    from slm.sweep import orchestrator as conduct
    from store import home

    if bool(runs) == failed:
        raise ValueError("name the runs to retry, or say --failed")
    states = {folder: run_state(folder).status for folder in _named(home(), runs, failed)}
    for folder, status in states.items():
        if status in ("finished", "running"):
            raise ValueError(f"run {folder.name} is {status}: there is nothing to retry")
    for folder in states:
        retry_run(folder)
    conductor = conduct.conductor(home())
    if as_json:
        print_json(
            {
                "home": str(home()),
                "conductor": conductor,
                "runs": [folder.name for folder in states],
            }
        )
        return
    print(
        f"{len(states)} runs to be trained again{': ' if states else ''}{', '.join(path.name for path in states)}"
    )
    if states:
        print(_who_trains(list(states), conductor))


def _named(home: Path, runs: Sequence[str] | None, failed: bool) -> list[Path]:
    if not failed:
        return [run_folder(home, run) for run in runs or ()]
    return [home / row["run_id"] for row in rows_of(home)[0] if row["status"] == "failed"]


def _who_trains(folders: Sequence[Path], conductor: int | None) -> str:
    """Who takes runs up, or what to type."""
    plans = " ".join(f"--plan {folder / 'plan.json'}" for folder in folders[:1])
    again = f"type its `slm sweep` again{f', or `slm sweep {plans}`' if len(folders) == 1 else ''}"
    if conductor is None:
        return f"nobody conducts: {again}"
    return f"process {conductor} conducts, and takes those of its own sweep; for another's, {again} when it has ended"


def rm(
    runs: Annotated[list[str], typer.Argument(help="Run_ids, or their first digits.")],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Only weights and checkpoints.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs with all that was measured, or only their weights and checkpoints; says first what that frees."""
    import store
    from slm.sweep import orchestrator as conduct

    home = store.home()
    folders = list(dict.fromkeys(run_folder(home, run) for run in runs))
    with conduct.sweep_lock(home) as ours:
        if not ours:
            raise ValueError(
                f"{home} is being swept by process {conduct.conductor(home)}: `slm stop` first"
            )
        _refuse_held(folders)
        sizes = {folder: _sizes(folder) for folder in folders}
        for folder, size in sizes.items():
            print(_what_goes(folder, size, checkpoints), file=sys.stderr)
        if not yes:
            _confirm(len(folders), checkpoints)
        for folder in folders:
            _remove(folder, checkpoints)
    store.ingest(home)
    freed = sum(sum(size[name] for name in _parts(checkpoints)) for size in sizes.values())
    if as_json:
        print_json({"home": str(home), "runs": [folder.name for folder in folders], "bytes": freed})
    else:
        print(f"freed {count(freed)}B")


def _refuse_held(folders: Sequence[Path]) -> None:
    from slm.run import run_holder

    for folder, state in states_of(folders).items():
        if process := run_holder(folder):
            raise ValueError(
                f"run {folder.name} is at work (process {process}): `slm stop {folder.name}` first"
            )
        if state.status in ("running", "queued"):
            raise ValueError(
                f"run {folder.name} is {state.status} on Slurm: `slm stop {folder.name}` first"
            )


def _parts(checkpoints: bool) -> tuple[str, ...]:
    return ("weights", "checkpoints") if checkpoints else ("weights", "checkpoints", "records")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of a run's weights, checkpoints, and records: plan, events, logs, result, evaluations."""
    sizes = {"weights": 0, "checkpoints": 0, "records": 0}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            kept = path.relative_to(folder).parts[0]
            part = {"model.safetensors": "weights", "checkpoints": "checkpoints"}.get(
                kept, "records"
            )
            sizes[part] += path.stat().st_size
    return sizes


def _what_goes(folder: Path, sizes: dict[str, int], checkpoints: bool) -> str:
    from slm.run import run_state

    status = run_state(folder).status
    parts = ", ".join(f"{part} {count(sizes[part])}B" for part in _parts(checkpoints))
    lost = (
        "; it begins anew" if checkpoints and status != "finished" and sizes["checkpoints"] else ""
    )
    return f"{folder.name} ({status}): {parts}{lost}"


def _confirm(count: int, checkpoints: bool) -> None:
    what = "weights and checkpoints" if checkpoints else "all that was measured"
    if not sys.stdin.isatty():
        raise ValueError("there is nobody to ask: --yes removes without asking")
    typer.confirm(f"remove {count} runs' {what}?", abort=True, err=True)


def _remove(folder: Path, checkpoints: bool) -> None:
    """The plan goes first: a folder without one is no run, should this be cut short."""
    if not checkpoints:
        (folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
        return
    (folder / "model.safetensors").unlink(missing_ok=True)
    for path in (folder / "checkpoints").glob("*"):
        path.unlink()
