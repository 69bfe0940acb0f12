"""`slm status` and `slm show`: what became of the runs, read from their files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import Json, print_json, print_table, report_problems
from slm.files import read_json

if TYPE_CHECKING:
    from slm.monitor.run_progress import RunProgress
    from slm.run import RunState

LOG_LINES = 15
WHY = 60
"""Characters of a reason in the table."""
Row = dict[str, Any]
ORDER = ("flops_planned", "recipe", "depth", "seed", "run_id")
UNTOLD = ("finished", "planned", "running", "queued")
"""States that need no reason."""


def status(
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment's runs.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Live, until nothing is at work; Ctrl-C ends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every run: how far it is, its result, or why it has none."""
    from slm.sweep import orchestrator as conduct
    from store import home

    if watch and as_json:
        raise ValueError(
            "--watch --json: choose one; `slm status --json` says how the runs are now"
        )
    if watch:
        _watch(home(), experiment)
        return
    rows, problems = rows_of(home(), experiment)
    conductor = conduct.conductor(home())
    report_problems(problems)
    if as_json:
        print_json({"home": str(home()), "conductor": conductor, "runs": rows})
    else:
        _print_status(rows, conductor)
    if conductor is None:
        _ingest_behind(home())


def _ingest_behind(home: Path) -> None:
    """Bring the database up to date for runs that nobody conducts, without waiting for it."""
    import store

    if not store.is_current(home):
        program = "import sys, pathlib, store; store.ingest(pathlib.Path(sys.argv[1]))"
        nothing = subprocess.DEVNULL
        command = [sys.executable, "-P", "-c", program, str(home)]
        subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )


def rows_of(home: Path, experiment: str | None = None) -> tuple[list[Row], list[str]]:
    """The runs of a home, or of an experiment, cheapest first, and a line for each that cannot be read.

    Raises ValueError where there is no such home or experiment.
    """
    run_ids = run_ids_of(home, experiment)
    rows, problems = [], []
    try:
        jobs = statuses_of_jobs([home / run_id for run_id in run_ids])
    except RuntimeError as error:
        jobs, problems = {}, [f"Slurm does not answer: {error}"]
    for run_id in run_ids:
        try:
            rows.append(_row(home / run_id, jobs.get(run_id)))
        except (KeyError, TypeError) as error:
            problems.append(f"{home / run_id}: its documents lack {error}")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return sorted(rows, key=lambda row: tuple(row[name] for name in ORDER)), problems


def run_ids_of(home: Path, experiment: str | None = None) -> list[str]:
    """The runs of a home, or of an experiment. Raises ValueError where there is no such home or experiment."""

    if not home.is_dir():
        raise ValueError(
            f"{home}: there is no such folder; `slm sweep` makes it, SLM_HOME names another"
        )
    if experiment is None:
        return [path.parent.name for path in home.glob("*/plan.json")]
    declared = {path.stem: path for path in sorted(home.glob("experiments/*.json"))}
    if experiment not in declared:
        _refuse_imported(home, experiment)
        raise ValueError(f"no experiment {experiment!r}; there are {', '.join(declared) or 'none'}")
    listed: list[str] = read_json(declared[experiment])["runs"]
    return [run_id for run_id in listed if (home / run_id / "plan.json").exists()]


def _refuse_imported(home: Path, experiment: str) -> None:
    from slm.exchange import importers as imports

    if experiment in imports.kept(home).values():
        raise ValueError(
            f"experiment {experiment!r} is imported, its runs are not here: `slm report {experiment}`"
        )


def statuses_of_jobs(folders: Sequence[Path]) -> dict[str, str | None]:
    """What a cluster says of runs whose jobs it has, by run_id. Raises RuntimeError when it does not answer."""
    from slm.sweep import slurm

    return {folder.name: job.status for folder, job in slurm.jobs_of(folders).items()}


def states_of(folders: Sequence[Path]) -> dict[Path, RunState]:
    """How runs are; by their files alone where a cluster that has their jobs does not answer."""
    from slm.run import run_state

    jobs: dict[str, str | None] = {}
    with suppress(RuntimeError):
        jobs = statuses_of_jobs(folders)
    return {folder: run_state(folder, jobs.get(folder.name)) for folder in folders}


def _row(folder: Path, job: str | None) -> Row:
    from slm.run import run_state

    row = _planned(read_json(folder / "plan.json"))
    state = run_state(folder, job)
    done = read_json(folder / "done.json") if state.status == "finished" else {}
    row |= {
        "run_id": folder.name,
        "status": state.status,
        "reason": state.reason,
        "message": state.message,
    }
    row |= {name: done.get(name) for name in ("val_bpb", "flops", "train_seconds")}
    row |= {"step": row["steps"], "seconds_left": None}
    if not done:
        track = track_of(folder, row["steps"])
        row |= {
            "step": track.step,
            "seconds_left": track.seconds_left if state.status == "running" else None,
        }
    return row


def _planned(plan: Row) -> Row:
    """What a row says of the document of a plan; one of another version of slm too."""
    given = plan["hyperparameters"]
    row = {name: plan[name] for name in ("run_id", "recipe", "horizon", "seed")}
    flops = given["flops_per_token"] * given["batch_tokens"] * given["steps"]
    return row | {"depth": given["depth"], "steps": given["steps"], "flops_planned": flops}


def track_of(folder: Path, steps: int) -> RunProgress:
    """How far a run is, from the last events of its attempts; those of a damaged file are left out."""
    from slm.monitor.run_progress import RunProgress, last_events
    from slm.run import list_attempts

    track = RunProgress(steps)
    for attempt in list_attempts(folder):
        for event in last_events(attempt / "events.jsonl"):
            track.take(event)
    return track


def _print_status(rows: list[Row], conductor: int | None) -> None:
    columns = {
        "run_id": "run",
        "recipe": "recipe",
        "depth": "d",
        "horizon": "horizon",
        "seed": "seed",
    }
    columns |= {
        "status": "status",
        "progress": "step",
        "left": "left",
        "val_bpb": "val_bpb",
        "flops": "FLOPs",
    }
    columns |= {"train_seconds": "s", "why": "why"}
    cells = [_cells(row) for row in rows]
    shown = [
        name for name in columns if name not in ("left", "why") or any(row[name] for row in cells)
    ]
    print_table([[row[name] for name in shown] for row in cells], [columns[name] for name in shown])
    counts = ", ".join(
        f"{count} {state}" for state, count in Counter(row["status"] for row in rows).most_common()
    )
    sweep = f"; process {conductor} conducts a sweep" if conductor else ""
    print(f"\n{len(rows)} runs{': ' if counts else ''}{counts}{sweep}")


def _cells(row: Row) -> dict[str, str | None]:
    from slm.monitor.screen import one_line
    from slm.text import duration

    left, why = row["seconds_left"], one_line(row["message"] or "")
    formats = {"val_bpb": ".4f", "flops": ".3g", "train_seconds": ".1f"}
    cells = {
        name: None if value is None else format(value, formats.get(name, ""))
        for name, value in row.items()
    }
    return cells | {
        "progress": f"{row['step']:,}/{row['steps']:,}",
        "left": None if left is None else duration(left),
        "why": None
        if row["status"] in UNTOLD
        else f"{why[:WHY]}…"
        if len(why) > WHY
        else why or None,
    }


def _watch(home: Path, experiment: str | None) -> None:
    """Show what is at work until nothing is and nobody conducts; what goes on does so when the watching ends."""
    from slm.monitor import follow
    from slm.monitor.display import Display
    from slm.plan import Plan
    from slm.run import is_done, run_holder
    from slm.sweep import orchestrator as conduct

    plans = []
    for run_id in run_ids_of(home, experiment):
        try:
            plans.append(Plan.read(home / run_id / "plan.json"))
        except ValueError as error:
            report_problems([str(error)])
    plans.sort(key=lambda plan: plan.hyperparameters.flops)
    done = {plan.run_id for plan in plans if is_done(home / plan.run_id)}
    others = [plan for plan in plans if plan.run_id not in done]
    jobs: dict[str, str | None] = {}
    with Display(plans, done) as display:

        def over() -> bool:
            held = display.at_work or jobs or any(run_holder(home / plan.run_id) for plan in others)
            return not held and conduct.conductor(home) is None

        def look_at_jobs() -> dict[str, str | None]:
            with suppress(RuntimeError):  # Slurm does not answer: what it said last holds
                found = statuses_of_jobs([home / plan.run_id for plan in others])
                jobs.clear()
                jobs.update(found)
            return jobs

        try:
            look_at_jobs()
            follow.watch(others, home, display, over, look_at_jobs)
            display.note("nothing is at work")
        except KeyboardInterrupt:
            display.note("watched no more; what is at work goes on")


def show(
    run: Annotated[str, typer.Argument(help="A run_id, or its first digits.")],
    as_json: Json = False,
) -> None:
    """Show one run: plan, attempts and how each ended, result, and the end of its log when it failed."""
    from slm.run import last_attempt, list_attempts
    from store import home

    folder = run_folder(home(), run)
    state = states_of([folder])[folder]
    document = {
        name: read_json(folder / f"{name}.json")
        for name in ("plan", "done")
        if _there(folder, name)
    }
    document |= {
        "status": state.status,
        "attempts": [_attempt(path) for path in list_attempts(folder)],
    }
    if as_json:
        print_json(document)
        return
    try:
        lines = [
            f"run {folder.name}: {label_of(document['plan'])}, {state.status}",
            *_facts(document),
        ]
    except (KeyError, TypeError) as error:
        anew = "`slm sweep` typed again writes a plan anew"
        raise ValueError(
            f"{folder}: its documents lack {error}; {anew}, `slm show {run} --json` shows all"
        ) from None
    if state.status not in UNTOLD and (attempt := last_attempt(folder)):
        lines += [
            f"  end of {attempt / 'log'}:",
            *(f"    {line}" for line in log_lines(attempt)[-LOG_LINES:]),
        ]
    print("\n".join(lines))


def _facts(document: Row) -> list[str]:
    """Shape, attempts and result of a run, in words."""
    from slm.text import duration

    given = document["plan"]["hyperparameters"]
    lines = [
        f"{given['steps']:,} steps of {given['batch_tokens']:,} tokens, width {given['width']}"
    ]
    for attempt in document["attempts"]:
        lines += _attempt_lines(attempt)
    if done := document.get("done"):
        lines.append(
            f"val_bpb {done['val_bpb']:.4f} after {done['tokens']:,} tokens, {done['flops']:.3g} FLOPs"
        )
        lines.append(
            f"{duration(done['train_seconds'])} of training, {done['tokens_per_second']:,.0f} tokens/s"
        )
    return [f"  {line}" for line in lines]


def _attempt_lines(attempt: Row) -> list[str]:
    """Where an attempt was, how it ended, and how long that took beside the estimate for the whole run."""
    from slm.monitor.screen import one_line
    from slm.text import duration

    ended, own = attempt["exit"], ", ".join(attempt.get("ids") or ())
    state = "no word yet" if ended is None else ended["reason"] or "finished"
    where = f"{attempt['ranks']} x {attempt['device_name'] or attempt['device']}{f' ({own})' if own else ''}"
    where += f", {attempt['threads']} threads, {attempt['micro_batch']} rows a pass, on {attempt['host']}"
    took = f" after {duration(ended['time'] - attempt['created'])}" if ended else ""
    estimate = attempt.get("estimated_seconds")
    foretold = f" (the whole run was estimated at {duration(estimate)})" if estimate else ""
    lines = [f"attempt {attempt['attempt']}: {state}{took}{foretold}", f"  {where}"]
    lines += [f"  warning: {message}" for message in attempt["warnings"][-LOG_LINES:]]
    return lines + ([f"  {one_line(ended['message'])}"] if ended and ended["message"] else [])


def run_folder(home: Path, run: str) -> Path:
    """Folder of the run whose run_id starts with these digits. Raises ValueError unless there is exactly one."""
    found = [path.parent for path in home.glob(f"{run}*/plan.json")] if run.isalnum() else []
    if not found and re.fullmatch("x[0-9a-f]{1,11}", run):
        raise ValueError(
            f"run {run!r} is imported, its weights and log are not here: `slm query` reads its row of `results`"
        )
    if len(found) != 1:
        raise ValueError(
            f"run {run!r}: {'none' if not found else len(found)} in {home}; `slm status` lists them"
        )
    return found[0]


def label_of(plan: Row) -> str:
    """A run's name for people, from the document of its plan. Raises KeyError or TypeError where it is none."""
    return f"{plan['recipe']} d{plan['hyperparameters']['depth']} {plan['horizon']} seed {plan['seed']}"


def log_lines(attempt: Path) -> list[str]:
    """What torchrun and the trainers said."""
    path = attempt / "log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def _attempt(folder: Path) -> Row:
    from slm.run import read_exit

    document = read_json(folder / "attempt.json")
    return {
        **document,
        "exit": read_exit(folder),
        "warnings": _warnings(folder / "events.jsonl"),
    }


def _warnings(path: Path) -> list[str]:
    """Messages of the warnings in an events.jsonl."""
    from slm import events

    return [event["message"] for event in events.Reader(path).new() if event["event"] == "warning"]
