"""`slm status` and `slm show`: the state of runs, read from their files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import store
from slm import events
from slm.cli.options import Json, RunId, print_json, report_problems, table
from slm.files import read_json, start_session
from slm.monitor import follow
from slm.monitor.status import (
    NO_REASON,
    StatusRow,
    experiment_runs,
    job_states,
    run_states,
    status_rows,
    status_table,
)
from slm.run import (
    find_run,
    is_done,
    last_attempt,
    list_attempts,
    read_attempt,
    read_exit,
    read_log,
    read_plans,
    run_holder,
    run_label,
)
from slm.text import duration, one_line, plural
from store import home

LOG_LINES = 15
"""Lines of a failed run's log, and warnings of an attempt, that `slm show` prints."""


def status(
    experiment: Annotated[str | None, Argument(help="Only this experiment's runs.")] = None,
    watch: Annotated[
        bool, Option("--watch", help="Live, until no run is active; Ctrl-C ends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show every run: its progress, its result, or why it has none."""
    from slm.sweep.orchestrator import sweep_process

    if watch and as_json:
        raise ValueError("--watch --json: choose one; `slm status --json` shows the present state")
    folders = experiment_runs(home(), experiment)
    if watch:
        _watch(folders)
        return
    rows, problems = status_rows(folders)
    process = sweep_process(home())
    report_problems(problems)
    if as_json:
        print_json({"home": home(), "conductor": process, "runs": rows})
    else:
        print(_describe(rows, process))
    if process is None:
        _start_ingest()


def _start_ingest() -> None:
    """Start a process that updates the database for runs of no sweep; do not wait for it."""
    if not store.is_current(home()):
        program = "import sys, pathlib, store; store.ingest(pathlib.Path(sys.argv[1]))"
        start_session(["-c", program, str(home())], Path(os.devnull))


def _describe(rows: Sequence[StatusRow], process: int | None) -> str:
    headings, cells = status_table(rows)
    counts = Counter(row["status"] for row in rows).most_common()
    states = ", ".join(f"{number} {state}" for state, number in counts)
    sweep = f"; process {process} runs a sweep" if process else ""
    total = f"{plural(len(rows), 'run')}{': ' if states else ''}{states}{sweep}"
    return f"{table(cells, headings)}\n\n{total}"


def _watch(run_folders: Sequence[Path]) -> None:
    """Show active runs until there are none and no sweep is running."""
    from slm.monitor.display import Display
    from slm.sweep.orchestrator import sweep_process

    plans, problems = read_plans(run_folders)
    report_problems(problems)
    plans.sort(key=lambda plan: plan.hyperparameters.flops)
    done = {plan.run_id for plan in plans if is_done(home() / plan.run_id)}
    unfinished = [plan for plan in plans if plan.run_id not in done]
    folders = [home() / plan.run_id for plan in unfinished]
    jobs: dict[str, str | None] = {}

    def look_up_jobs() -> dict[str, str | None]:
        nonlocal jobs
        with suppress(RuntimeError):  # Slurm does not answer: its last answer holds
            jobs = job_states(folders)
        return jobs

    def is_over() -> bool:
        active = display.active or jobs or any(map(run_holder, folders))
        return not active and sweep_process(home()) is None

    with Display(plans, done) as display:
        try:
            look_up_jobs()
            follow.watch(unfinished, home(), display, is_over, look_up_jobs)
            display.note("no run is active")
        except KeyboardInterrupt:
            display.note("stopped watching; the runs continue")


def show(run: RunId, as_json: Json = False) -> None:
    """Show one run: plan, attempts and their ends, result, and the end of a failed run's log."""
    folder = find_run(home(), run)
    state = run_states([folder])[folder]
    document: dict[str, Any] = {}
    for name in ("plan", "done"):
        path = folder / f"{name}.json"
        if path.exists():
            document[name] = read_json(path)
    document["status"] = state.status
    document["attempts"] = [_attempt(path) for path in list_attempts(folder)]
    if as_json:
        print_json(document)
        return
    try:
        lines = [f"run {folder.name}: {run_label(document['plan'])}, {state.status}"]
        lines += _facts(document)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: its documents lack {error}; `slm show {run} --json` shows them, "
            "the same `slm sweep` writes the plan again"
        ) from None
    if state.status not in NO_REASON and (attempt := last_attempt(folder)):
        lines.append(f"  end of {attempt / 'log'}:")
        lines += [f"    {line}" for line in read_log(attempt)[-LOG_LINES:]]
    print("\n".join(lines))


def _attempt(folder: Path) -> dict[str, Any]:
    """Return attempt.json with the attempt's exit.json and the messages of its warnings."""
    every = events.Reader(folder / "events.jsonl").new()
    warnings = [event["message"] for event in every if event["event"] == "warning"]
    return {**read_attempt(folder), "exit": read_exit(folder), "warnings": warnings}


def _facts(document: Mapping[str, Any]) -> list[str]:
    """Describe the shape, the attempts and the result of a run."""
    hp = document["plan"]["hyperparameters"]
    lines = [f"{hp['steps']:,} steps of {hp['batch_tokens']:,} tokens, width {hp['width']}"]
    for attempt in document["attempts"]:
        lines += _attempt_lines(attempt)
    if done := document.get("done"):
        tokens = f"{done['tokens']:,} tokens, {done['flops']:.3g} FLOPs"
        speed = f"{done['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"val_bpb {done['val_bpb']:.4f} after {tokens}")
        lines.append(f"{duration(done['train_seconds'])} of training, {speed}")
    return [f"  {line}" for line in lines]


def _attempt_lines(attempt: Mapping[str, Any]) -> list[str]:
    """Describe where an attempt ran, how it ended, and its time against the estimate."""
    ended = attempt["exit"]
    line = f"attempt {attempt['attempt']}: "
    if ended is None:
        line += "no exit.json yet"
    else:
        seconds = ended["time"] - attempt["created"]
        line += f"{ended['reason'] or 'finished'} after {duration(seconds)}"
    if estimate := attempt.get("estimated_seconds"):
        line += f" (the whole run was estimated at {duration(estimate)})"
    ids = ", ".join(attempt.get("ids") or ())
    devices = f"{attempt['ranks']} x {attempt['device_name'] or attempt['device']}"
    devices += f" ({ids})" if ids else ""
    batch = f"{attempt['threads']} threads, {attempt['micro_batch']} rows a pass"
    lines = [line, f"  {devices}, {batch}, on {attempt['host']}"]
    lines += [f"  warning: {message}" for message in attempt["warnings"][-LOG_LINES:]]
    if ended and ended["message"]:
        lines.append(f"  {one_line(ended['message'])}")
    return lines
