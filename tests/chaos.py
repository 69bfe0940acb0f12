"""A sweep under fire: whoever takes part is killed at random, again and again, and the sweep is typed again each time.

`python -m tests.chaos HOME` disturbs a sweep in a home that has prepared data, and prints what it did; `python -m
tests.chaos HOME --conduct` is the conductor that it starts and kills.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

import store
from slm import events
from slm.cli.sweep import _ingest
from slm.experiment import Experiment
from slm.hardware.runtime import RuntimeModel
from slm.monitor.follow import View
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import checkpoint_step, is_done
from slm.sweep import orchestrator as conduct
from slm.sweep.local import Local, Machine
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.planning import Corpora, make_plans, record

TWO = Machine("cpu", "test", ("0", "1"), None)
KINDS = {"trainer": 5, "torchrun": 3, "supervisor": 4, "conductor": 4}
"""Who is killed, and how often beside the others."""
PAUSE_SECONDS = 2.5
"""Longest pause between two kills that are due."""
LAST_KILL = 0.75
"""Share of the sweep's steps before which all kills are due."""
FULL_SECONDS = 6.0
"""How long the disk stays full."""
CHECKPOINT_SECONDS = 0.3
RESULTS = """
SELECT r.run_id, r.depth, r.seed, r.status, r.tokens, r.flops, r.train_loss, r.val_loss, r.val_bpb, f.weights_sha256
FROM results r LEFT JOIN finished f ON f.run_id = r.run_id ORDER BY r.run_id
"""
"""What two sweeps of the same plans must agree in."""


LOOK = """
SELECT run_id, status,
       count(val_bpb) + count(val_loss) + count(train_loss) + count(tokens) + count(flops) AS measured
FROM results GROUP BY ALL
"""
"""How many of a run's results are there."""


@dataclass(frozen=True)
class Question:
    """The sweep that is disturbed."""

    depths: tuple[int, ...] = (1, 2)
    """Of the runs."""
    seeds: int = 3
    """Runs a depth."""
    steps: int = 3000
    """Of each run."""

    def experiment(self) -> Experiment:
        """As it is declared."""
        return Experiment(
            "chaos", (pocket,), self.depths, steps=self.steps, seeds=tuple(range(self.seeds))
        )

    def arguments(self) -> list[str]:
        """As it is typed."""
        depths = ",".join(map(str, self.depths))
        return [f"--depths={depths}", f"--seeds={self.seeds}", f"--steps={self.steps}"]

    def plans(self, home: Path) -> tuple[Corpora, list[Plan]]:
        """Its plans, and the data they were made from."""
        corpora = Corpora(self.experiment(), home)
        return corpora, make_plans(
            self.experiment(), lambda asked: corpora.prepare(asked, lambda line: None)
        )


@dataclass
class Tally:
    """What was done to a sweep, and what was seen meanwhile."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind."""
    torn: int = 0
    """Half lines that were appended to the events of a killed trainer."""
    spells: int = 0
    """Times that the disk was full."""
    typed: int = 0
    """Times that the sweep was typed."""
    looks: int = 0
    """Looks at the results on the way."""
    values: int = 0
    """Results that these looks found."""
    seconds: float = 0.0
    """Until every run was finished."""


class Lines:
    """A view of plain lines on standard error."""

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        self.note(f"{plan.run_id} {attempt.name} {'adopted' if adopted else 'started'}")

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            self.note(f"{plan.run_id} {event['message']}")

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        self.note(f"{plan.run_id} {outcome}: {message}")

    def note(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")

    def refresh(self) -> None:
        pass


def conduct_sweep(home: Path, question: Question, view: View | None = None) -> conduct.Outcome:
    """What `slm sweep` does, in two slots, with quick checkpoints and looks."""
    corpora, plans = question.plans(home)
    with conduct.sweep_lock(home) as ours:
        if not ours:
            sys.exit(f"process {conduct.conductor(home)} conducts")
        record(question.experiment(), plans, home)
        launcher = Local(TWO, (1,), RuntimeModel(home), MicroBatches())
        ingest, pause = partial(_ingest, home), CHECKPOINT_SECONDS
        return conduct.Orchestrator(
            plans, corpora.of, home, launcher, view or Lines(), ingest, pause, poll_seconds=0.1
        ).run()


def start(home: Path, question: Question) -> subprocess.Popen[bytes]:
    """The conductor as a process of its own; what it says goes to HOME.log."""
    with home.with_name(f"{home.name}.log").open("ab") as log:
        command = [
            sys.executable,
            "-m",
            "tests.chaos",
            str(home),
            "--conduct",
            *question.arguments(),
        ]
        return subprocess.Popen(command, stdout=log, stderr=log)


def alive(home: Path) -> dict[str, list[psutil.Process]]:
    """The processes at work for a home, by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if any(word == str(home) or word.startswith(f"{home}/") for word in words):
                kind = next((kind for name, kind in _NAMES.items() if name in words), None)
                if kind and process.status() != psutil.STATUS_ZOMBIE:
                    found[kind].append(process)
    return found


_NAMES = {
    "--conduct": "conductor",
    "slm.sweep.supervisor": "supervisor",
    "torch.distributed.run": "torchrun",
    "slm.train": "trainer",
}
"""Words of a command line, each before those that may stand beside it."""


def disturb(
    home: Path,
    question: Question,
    kinds: Sequence[str],
    draw: random.Random,
    disk: Path | None = None,
    pause: float = PAUSE_SECONDS,
    patience: float = 1200.0,
) -> Tally:
    """Sweep, and kill so many on the way, at random moments; a disk of its own is full for a while half-way.

    A kill is due at a step of the sweep drawn before, so that all are made. Raises TimeoutError after `patience`.
    """
    plans = question.plans(home)[1]
    due = sorted(draw.uniform(0, LAST_KILL) for _ in kinds)
    left, tally, began = list(zip(due, kinds)), Tally(), time.monotonic()
    conductor, again, spell = None, 0.0, due[len(due) // 2] if disk else 2.0
    try:
        while True:
            if conductor is None or conductor.poll() is not None:
                if all(is_done(home / plan.run_id) for plan in plans):
                    break
                conductor, tally.typed = start(home, question), tally.typed + 1
            if time.monotonic() - began > patience:
                raise TimeoutError(f"not finished after {patience} s: {tally}")
            done = progress(home, plans)
            if disk and done >= spell:
                tally.spells, spell = tally.spells + fill(disk), 2.0
            if (
                left
                and done >= left[0][0]
                and time.monotonic() > again
                and kill(home, left[0][1], draw, tally)
            ):
                left.pop(0)
                again = time.monotonic() + draw.uniform(0, pause)
            look(home, tally)
            time.sleep(0.1)
    finally:
        if conductor and conductor.poll() is None:
            conductor.kill()
            conductor.wait()
    tally.seconds = time.monotonic() - began
    return tally


def progress(home: Path, plans: Sequence[Plan]) -> float:
    """Share of the steps of all runs that is kept in checkpoints, or done."""
    steps = [plan.hyperparameters.steps for plan in plans]
    folders = [home / plan.run_id for plan in plans]
    kept = [
        all_of if is_done(folder) else checkpoint_step(folder)
        for folder, all_of in zip(folders, steps)
    ]
    return sum(kept) / sum(steps)


def kill(home: Path, kind: str, draw: random.Random, tally: Tally) -> bool:
    """Kill one of a kind, if any is alive. Behind a trainer a line of events is left torn."""
    if not (found := alive(home)[kind]):
        return False
    victim = draw.choice(found)
    with suppress(psutil.NoSuchProcess):
        attempt = Path(victim.cmdline()[-1])
        victim.kill()
        tally.kills[kind] += 1
        psutil.wait_procs([victim], timeout=10)
        if kind == "trainer" and (attempt / "events.jsonl").exists():
            with suppress(OSError), (attempt / "events.jsonl").open("ab", buffering=0) as file:
                file.write(b'{"event": "train", "time": 1.5, "step": 7, "lo')
                tally.torn += 1
        return True
    return False


def fill(disk: Path) -> int:
    """Take all the space of a disk for a while; 1."""
    ballast = disk / "ballast"
    until = time.monotonic() + FULL_SECONDS
    with ballast.open("ab", buffering=0) as file:
        while time.monotonic() < until:  # what others free meanwhile is taken, too
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while time.monotonic() < until:
                        file.write(bytes(size))
            time.sleep(0.02)
    ballast.unlink()
    return 1


def look(home: Path, tally: Tally) -> None:
    """No run has a value in the results unless it is finished, and none is there twice."""
    with suppress(store.StoreError):  # there is none yet
        rows = store.sql(LOOK, home=home).to_dict("records")
        tally.looks += 1
        assert len({row["run_id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["measured"] == (5 if row["status"] == "finished" else 0), row
            assert row["status"] != "finished" or is_done(home / row["run_id"]), row
            tally.values += row["status"] == "finished"


def results(home: Path) -> list[dict[str, Any]]:
    """What a sweep measured, by the store."""
    store.ingest(home)
    return [
        {str(name): value for name, value in row.items()}
        for row in store.sql(RESULTS, home=home).to_dict("records")
    ]


def check_events(home: Path) -> int:
    """Every number of every whole line of events is in the store, once; how many lines."""
    lines, written = 0, Counter[tuple[Any, ...]]()
    for path in home.glob("*/attempts/[0-9]*/events.jsonl"):
        for event in events.Reader(path).new():
            lines += 1
            key = (
                path.parents[2].name,
                int(path.parent.name),
                event.pop("event"),
                event.pop("time"),
            )
            step = event.pop("step", None)
            numbers = {name: value for name, value in event.items() if type(value) in (int, float)}
            written.update(
                (*key, step, name, float(value))
                for name, value in numbers.items()
                if step is not None
            )
    columns = "run_id, attempt, event, time, step, name, value"
    stored = Counter(
        store.sql(f"select {columns} from metrics", home=home).itertuples(index=False, name=None)
    )
    assert stored == written, (
        len(stored),
        len(written),
        list((stored - written) + (written - stored))[:5],
    )
    return lines


def check_attempts(home: Path) -> int:
    """No run was trained by two at a time; how many attempts there were."""
    attempts = 0
    for run in home.glob("*/attempts"):
        times = []
        for attempt in sorted(run.glob("[0-9]*")):
            attempts += 1
            found = [event["time"] for event in events.Reader(attempt / "events.jsonl").new()]
            times += [(found[0], found[-1])] if found else []
        assert all(before[1] < after[0] for before, after in pairwise(sorted(times))), (run, times)
    return attempts


def check_nobody_left(home: Path, seconds: float = 15.0) -> None:
    """Whoever took part is gone, at once or very soon."""
    until = time.monotonic() + seconds
    while any(left := alive(home).values()):
        assert time.monotonic() < until, left
        time.sleep(0.1)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A file system of its own on a folder; None where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> None:
    """By hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--conduct", action="store_true")
    parser.add_argument("--depths", default="1,2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--disk",
        type=Path,
        help="Mount point of a small disk that holds HOME: it is filled half-way.",
    )
    given = parser.parse_args()
    question = Question(tuple(map(int, given.depths.split(","))), given.seeds, given.steps)
    if given.conduct:
        conduct.INGEST_SECONDS, conduct.INGEST_SHARE = 0.5, 0.3  # more moments to be killed at
        conduct_sweep(given.home, question)
        return
    draw = random.Random(given.seed)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=given.kills)
    tally = disturb(given.home, question, kinds, draw, given.disk)
    check_nobody_left(given.home)
    store.ingest(given.home)
    lines, attempts = check_events(given.home), check_attempts(given.home)
    print(json.dumps(vars(tally) | {"lines": lines, "attempts": attempts}))


if __name__ == "__main__":
    main()
