"""`slm logs`: the events of a run's trainers in words, and their raw log."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from slm.cli.options import Json, RunId, print_json
from slm.events import Reader
from slm.files import read_json
from slm.monitor.run_progress import ACTIVITIES
from slm.monitor.status import run_states
from slm.run import (
    find_run,
    last_attempt,
    list_attempts,
    read_exit,
    read_log,
    run_holder,
    run_label,
    run_state,
)
from slm.text import one_line
from store import home

FOLLOW_SECONDS = 0.5
"""Pause between two looks at a run that is running."""


def logs(
    run: RunId,
    follow: Annotated[
        bool, Option("-f", "--follow", help="Print until the run ends; Ctrl-C ends it.")
    ] = False,
    attempt: Annotated[
        int | None, Option(min=1, help="Number of an attempt; else the newest.")
    ] = None,
    lines: Annotated[int, Option("-n", "--lines", min=0, help="Last lines of each kind.")] = 20,
    as_json: Json = False,
) -> None:
    """Show a run's events, one a line, then the end of its raw log, each line after a bar."""
    if follow and as_json:
        raise ValueError("--follow --json: choose one; events.jsonl of an attempt is JSON lines")
    folder = find_run(home(), run)
    tail = _Tail(_select_attempt(folder, attempt))
    if as_json:
        events = [_finite(event) for event in deque(tail.events(), lines)]
        document = {"run_id": folder.name, "attempt": int(tail.attempt.name), "events": events}
        print_json(document | {"log": [*deque(tail.log(), lines)]})
        return
    tail.print(lines)
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(folder, tail, newest=attempt is None)


def _select_attempt(folder: Path, number: int | None) -> Path:
    """Return an attempt of a run, the newest for None. Raises ValueError if there is none."""
    attempts = {int(path.name): path for path in list_attempts(folder)}
    if not attempts:
        raise ValueError(f"run {folder.name} has no attempt yet: `slm sweep` trains it")
    if number is not None and number not in attempts:
        numbers = ", ".join(map(str, attempts))
        raise ValueError(f"--attempt {number}: run {folder.name} has attempts {numbers}")
    return attempts[number or max(attempts)]


def _follow(folder: Path, tail: _Tail, newest: bool) -> None:
    """Print new lines until the run ends, or only this attempt unless `newest`."""
    from slm.sweep import slurm

    while True:
        over = _is_over(folder) or (not newest and read_exit(tail.attempt) is not None)
        last = last_attempt(folder)
        tail.print()
        if newest and last and last != tail.attempt:
            tail = _Tail(last)
            tail.print()
        if over:
            print(f"run {folder.name}: {run_states([folder])[folder].status}")
            return
        time.sleep(FOLLOW_SECONDS if run_holder(folder) else slurm.QUEUE_SECONDS)


def _is_over(folder: Path) -> bool:
    """Whether no process trains a run or may try it again."""
    from slm.sweep.orchestrator import sweep_process

    status = run_state(folder).status
    if status in ("finished", "diverged", "cancelled"):
        return True
    if status == "running" or sweep_process(folder.parent) is not None:
        return False
    return run_states([folder])[folder].status not in ("running", "queued")


class _Tail:
    """Events and log lines of one attempt that were not read yet."""

    def __init__(self, attempt: Path) -> None:
        self.attempt = attempt
        self._events = Reader(attempt / "events.jsonl")
        self._log_lines = 0
        self._has_heading = False

    def events(self) -> list[dict[str, Any]]:
        """Return new events."""
        return list(self._events.new())

    def log(self) -> list[str]:
        """Return new lines of the log."""
        lines = read_log(self.attempt)[self._log_lines :]
        self._log_lines += len(lines)
        return lines

    def print(self, limit: int | None = None) -> None:
        """Print new events and log lines, the last `limit` of each."""
        if not self._has_heading:
            self._has_heading = True
            folder = self.attempt.parent.parent
            label = run_label(read_json(folder / "plan.json"))
            print(f"run {folder.name}: {label}, attempt {self.attempt.name}")
        for event in deque(self.events(), limit):
            clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            print(f"{clock}  {_describe(event)}")
        for line in deque(self.log(), limit):
            print(f"| {one_line(line)}", flush=True)


def _finite(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event with null for numbers that JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in event.items()
    }


def _describe(event: dict[str, Any]) -> str:
    """Return an event as a line of text."""
    step = f"step {event['step']:,}" if "step" in event else ""
    seconds = f"in {event['seconds']:.1f} s" if "seconds" in event else ""
    match event["event"]:
        case "started":
            resumed = f", resumed from {step}" if event["resumed_from"] else ""
            devices = f"{event['ranks']} x {event['device']}"
            return f"started on {devices}, {event['micro_batch']} rows a pass{resumed}"
        case "train":
            return f"{step}, loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s"
        case "eval":
            return f"{step}, val_bpb {event['val_bpb']:.4f} {seconds}"
        case "core":
            value = "without a value"
            if event["core"] is not None:
                value = f"{event['core']:.4f} +- {event['core_error']:.4f}"
            return f"{step}, {event['metric']} ({event['mode']}) {value} {seconds}"
        case "checkpoint":
            return f"{step}, checkpoint of {event['bytes'] / 1e6:.1f} MB {seconds}"
        case "working":
            share = event.get("share")
            activity = ACTIVITIES[event["what"]]
            return f"{step}, {activity}" + ("" if share is None else f" {share:.0%}")
        case "finished":
            return f"finished, val_bpb {event['val_bpb']:.4f}"
        case "failed":
            return f"{event['reason']}: {one_line(event['message'])}"
        case kind:
            return f"{kind}: {one_line(str(event.get('message', step)))}"
