"""`slm logs`: what a run's trainers wrote, their events in words and beside them the raw log."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import Json, print_json
from slm.cli.runs import label_of, log_lines, run_folder, states_of
from slm.files import read_json

FOLLOW_SECONDS = 0.5


def logs(
    run: Annotated[str, typer.Argument(help="A run_id, or its first digits.")],
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the run ends; Ctrl-C ends it.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Number of an attempt; else the newest.")
    ] = None,
    lines: Annotated[
        int, typer.Option("-n", "--lines", min=0, help="Last lines of each kind.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Show a run's events, a line each, and then the end of its raw log, whose lines begin with a bar."""
    from store import home

    if follow and as_json:
        raise ValueError(
            "--follow --json: choose one; the events of an attempt are JSON lines in its events.jsonl"
        )
    folder = run_folder(home(), run)
    source = _Source(_attempt(folder, attempt))
    if as_json:
        told = {"run_id": folder.name, "attempt": int(source.attempt.name)}
        events = [_finite(event) for event in _last(source.events(), lines)]
        print_json(told | {"events": events, "log": _last(source.log(), lines)})
        return
    source.print(lines)
    if follow:
        with suppress(KeyboardInterrupt):
            _follow(folder, source, newest=attempt is None)


def _attempt(folder: Path, number: int | None) -> Path:
    """An attempt of a run, the newest without a number. Raises ValueError where there is none."""
    from slm.run import list_attempts

    attempts = {int(path.name): path for path in list_attempts(folder)}
    if not attempts:
        raise ValueError(f"run {folder.name} has no attempt yet: `slm sweep` trains it")
    if number is not None and number not in attempts:
        raise ValueError(
            f"--attempt {number}: run {folder.name} has attempts {', '.join(map(str, attempts))}"
        )
    return attempts[number or max(attempts)]


def _follow(folder: Path, source: _Source, newest: bool) -> None:
    """Print what is written until the run ends, or the one attempt that is asked for."""
    from slm.run import last_attempt, read_exit, run_holder
    from slm.sweep.slurm import QUEUE_SECONDS

    while True:
        over = _is_over(folder) or (not newest and read_exit(source.attempt) is not None)
        last = last_attempt(folder)
        source.print()
        if newest and last and last != source.attempt:
            source = _Source(last)
            source.print()
        if over:
            print(f"run {folder.name}: {states_of([folder])[folder].status}")
            return
        time.sleep(FOLLOW_SECONDS if run_holder(folder) else QUEUE_SECONDS)


def _is_over(folder: Path) -> bool:
    """Whether nobody works at a run, nor may try it again."""
    from slm.run import run_state
    from slm.sweep import orchestrator as conduct

    status = run_state(folder).status
    if status in ("finished", "diverged", "cancelled"):
        return True
    if status == "running" or conduct.conductor(folder.parent) is not None:
        return False
    return states_of([folder])[folder].status not in ("running", "queued")


class _Source:
    """What one attempt wrote and was not shown yet."""

    def __init__(self, attempt: Path) -> None:
        from slm.events import Reader

        self.attempt = attempt
        self._events, self._log_lines = Reader(attempt / "events.jsonl"), 0
        self._began = True

    def events(self) -> list[dict[str, Any]]:
        """New events."""
        return list(self._events.new())

    def log(self) -> list[str]:
        """New lines of the log."""
        lines = log_lines(self.attempt)[self._log_lines :]
        self._log_lines += len(lines)
        return lines

    def print(self, most: int | None = None) -> None:
        """Print what is new, or the last lines of it."""
        from slm.monitor.screen import one_line

        if self._began:
            self._began = False
            folder = self.attempt.parent.parent
            print(
                f"run {folder.name}: {label_of(read_json(folder / 'plan.json'))}, attempt {self.attempt.name}"
            )
        told = [
            f"{time.strftime('%H:%M:%S', time.localtime(e['time']))}  {_words(e)}"
            for e in self.events()
        ]
        for line in _last(told, most):
            print(line)
        for line in _last(self.log(), most):
            print(f"| {one_line(line)}", flush=True)


def _last(lines: list[Any], most: int | None) -> list[Any]:
    return lines if most is None else lines[len(lines) - min(most, len(lines)) :]


def _finite(event: dict[str, Any]) -> dict[str, Any]:
    """An event as JSON knows it: a loss that is no number is null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in event.items()
    }


def _words(event: dict[str, Any]) -> str:
    """An event in a line for people."""
    from slm.monitor.run_progress import DOING
    from slm.monitor.screen import one_line

    step = f"step {event['step']:,}" if "step" in event else ""
    match event["event"]:
        case "started":
            origin = f", goes on from {step}" if event["resumed_from"] else ""
            return f"started on {event['ranks']} x {event['device']}, {event['micro_batch']} rows a pass{origin}"
        case "train":
            return f"{step}, loss {event['loss']:.4f}, {event['tokens_per_second']:,.0f} tokens/s"
        case "eval":
            return f"{step}, val_bpb {event['val_bpb']:.4f} in {event['seconds']:.1f} s"
        case "core":
            value = (
                "without a value"
                if event["core"] is None
                else f"{event['core']:.4f} +- {event['core_error']:.4f}"
            )
            return (
                f"{step}, {event['metric']} ({event['mode']}) {value} in {event['seconds']:.1f} s"
            )
        case "checkpoint":
            return (
                f"{step}, checkpoint of {event['bytes'] / 1e6:.1f} MB in {event['seconds']:.1f} s"
            )
        case "working":
            share = event.get("share")
            return f"{step}, {DOING[event['what']]}{'' if share is None else f' {share:.0%}'}"
        case "finished":
            return f"finished, val_bpb {event['val_bpb']:.4f}"
        case "failed":
            return f"{event['reason']}: {one_line(event['message'])}"
        case _:
            return f"{event['event']}: {one_line(str(event.get('message', step)))}"
