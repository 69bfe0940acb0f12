"""Chaos test of a sweep: kill its processes at random, and repeat the command each time it ends.

`python -m tests.chaos HOME` disturbs a sweep in a home that has prepared data, and prints a tally;
`python -m tests.chaos HOME --orchestrate` is the orchestrator that it starts and kills.
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
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

import store
from slm import events
from slm.experiment import Experiment
from slm.hardware.runtime import RuntimeModel
from slm.monitor.follow import View
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import checkpoint_step, is_done
from slm.sweep import orchestrator
from slm.sweep.local import Local, Machine
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.orchestrator import Orchestrator, Outcome, Sweep, sweep_lock, sweep_process
from slm.sweep.planning import Planner, plans_of, record

TWO = Machine("cpu", "test", ("0", "1"), None)
KINDS = {"trainer": 5, "torchrun": 3, "supervisor": 4, "orchestrator": 4}
"""Kinds of processes that are killed, with the weights of their draw."""
PAUSE_SECONDS = 2.5
"""Longest pause between two kills that are due."""
LAST_KILL = 0.75
"""Share of the sweep's steps before which all kills are due."""
FULL_SECONDS = 6.0
"""Time for which the disk stays full."""
CHECKPOINT_SECONDS = 0.3
RESULTS = """
SELECT r.run_id, r.depth, r.seed, r.status, r.tokens, r.flops, r.train_loss, r.val_loss, r.val_bpb,
       f.weights_sha256
FROM results r LEFT JOIN finished f ON f.run_id = r.run_id ORDER BY r.run_id
"""
"""Results in which two sweeps of the same plans must agree."""


MEASURED = """
SELECT run_id, status,
       count(val_bpb) + count(val_loss) + count(train_loss) + count(tokens) + count(flops)
       AS measured
FROM results GROUP BY ALL
"""
"""Number of results that each run has."""


@dataclass(frozen=True)
class Question:
    """The sweep that is disturbed."""

    depths: tuple[int, ...] = (1, 2)
    seeds: int = 3
    steps: int = 3000

    def experiment(self) -> Experiment:
        """Return the experiment that declares it."""
        return Experiment(
            "chaos", (pocket,), self.depths, steps=self.steps, seeds=tuple(range(self.seeds))
        )

    def arguments(self) -> list[str]:
        """Return the options of `tests.chaos` that describe it."""
        depths = ",".join(map(str, self.depths))
        return [f"--depths={depths}", f"--seeds={self.seeds}", f"--steps={self.steps}"]

    def plans(self, home: Path) -> tuple[Planner, list[Plan]]:
        """Return its plans and the planner that made them."""
        planner = Planner(self.experiment(), home)
        return planner, plans_of(planner.prepare())


@dataclass
class Tally:
    """Disturbances of a sweep, and observations on the way."""

    kills: Counter[str] = field(default_factory=Counter)
    """Processes killed, by kind."""
    torn: int = 0
    """Killed trainers to whose events half a line was appended."""
    spells: int = 0
    """Times that the disk was full."""
    starts: int = 0
    """Times that the sweep was started."""
    looks: int = 0
    """Queries of the results on the way."""
    values: int = 0
    """Finished runs that these queries returned."""
    seconds: float = 0.0
    """Time until every run was finished."""


class Lines:
    """View that writes plain lines on standard error."""

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


def run_sweep(home: Path, question: Question, view: View | None = None) -> Outcome:
    """Do what `slm sweep` does, in two slots, with frequent checkpoints and polls."""
    planner, plans = question.plans(home)
    with sweep_lock(home) as acquired:
        if not acquired:
            sys.exit(f"process {sweep_process(home)} sweeps")
        record(question.experiment(), plans, home)
        launcher = Local(TWO, (1,), RuntimeModel(home), MicroBatches())
        sweep = Sweep(
            plans,
            home,
            planner.dataset,
            checkpoint_seconds=CHECKPOINT_SECONDS,
            poll_seconds=0.1,
        )
        return Orchestrator(sweep, launcher, view or Lines()).run()


@contextmanager
def frequent_ingests() -> Iterator[None]:
    """Let orchestrators ingest twice a second within the block."""
    with (
        mock.patch.object(orchestrator, "INGEST_SECONDS", 0.5),
        mock.patch.object(orchestrator, "INGEST_SHARE", 0.3),
    ):
        yield


def start(home: Path, question: Question) -> subprocess.Popen[bytes]:
    """Start an orchestrator process, whose output goes to HOME.log."""
    command = [sys.executable, "-m", "tests.chaos", str(home), "--orchestrate"]
    with home.with_name(f"{home.name}.log").open("ab") as log:
        return subprocess.Popen([*command, *question.arguments()], stdout=log, stderr=log)


def alive(home: Path) -> dict[str, list[psutil.Process]]:
    """Return the processes that work on a home, by kind."""
    processes: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if any(word == str(home) or word.startswith(f"{home}/") for word in words):
                kind = next((kind for name, kind in _NAMES.items() if name in words), None)
                if kind and process.status() != psutil.STATUS_ZOMBIE:
                    processes[kind].append(process)
    return processes


_NAMES = {
    "--orchestrate": "orchestrator",
    "slm.sweep.supervisor": "supervisor",
    "torch.distributed.run": "torchrun",
    "slm.train": "trainer",
}
"""Words that identify a command line; the first match counts, as torchrun's has "slm.train" too."""


def disturb(
    home: Path,
    question: Question,
    kinds: Sequence[str],
    draw: random.Random,
    disk: Path | None = None,
    pause: float = PAUSE_SECONDS,
    patience: float = 1200.0,
) -> Tally:
    """Sweep until every run is finished, killing one process of each kind at random steps.

    All kills are made, since the steps are drawn before. A `disk` is filled for a while half-way.
    Raises TimeoutError after `patience` seconds.
    """
    plans = question.plans(home)[1]
    due = sorted(draw.uniform(0, LAST_KILL) for _ in kinds)
    pending = list(zip(due, kinds))
    tally = Tally()
    began = time.monotonic()
    process = None
    next_kill = 0.0
    spell = due[len(due) // 2] if disk else 2.0
    try:
        while True:
            if process is None or process.poll() is not None:
                if all(is_done(home / plan.run_id) for plan in plans):
                    break
                process = start(home, question)
                tally.starts += 1
            if time.monotonic() - began > patience:
                raise TimeoutError(f"not finished after {patience} s: {tally}")
            done = progress(home, plans)
            if disk and done >= spell:
                fill(disk)
                tally.spells += 1
                spell = 2.0
            is_due = pending and done >= pending[0][0] and time.monotonic() > next_kill
            if is_due and kill(home, pending[0][1], draw, tally):
                pending.pop(0)
                next_kill = time.monotonic() + draw.uniform(0, pause)
            check_results(home, tally)
            time.sleep(0.1)
    finally:
        if process and process.poll() is None:
            process.kill()
            process.wait()
    tally.seconds = time.monotonic() - began
    return tally


def progress(home: Path, plans: Sequence[Plan]) -> float:
    """Return the share of all runs' steps that is finished or in a checkpoint."""
    done = 0
    for plan in plans:
        folder = home / plan.run_id
        done += plan.hyperparameters.steps if is_done(folder) else checkpoint_step(folder)
    return done / sum(plan.hyperparameters.steps for plan in plans)


def kill(home: Path, kind: str, draw: random.Random, tally: Tally) -> bool:
    """Kill a process of a kind, if one is alive; a trainer leaves half a line of events behind."""
    processes = alive(home)[kind]
    if not processes:
        return False
    victim = draw.choice(processes)
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


def fill(disk: Path) -> None:
    """Take all the space of a disk for FULL_SECONDS."""
    ballast = disk / "ballast"
    until = time.monotonic() + FULL_SECONDS
    with ballast.open("ab", buffering=0) as file:
        while time.monotonic() < until:  # take what is freed meanwhile, too
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while time.monotonic() < until:
                        file.write(bytes(size))
            time.sleep(0.02)
    ballast.unlink()


def check_results(home: Path, tally: Tally) -> None:
    """Check that no unfinished run has results, and that no run has two rows."""
    with suppress(store.StoreError):  # no database yet
        rows = store.sql(MEASURED, home=home).to_dict("records")
        tally.looks += 1
        assert len({row["run_id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["measured"] == (5 if row["status"] == "finished" else 0), row
            assert row["status"] != "finished" or is_done(home / row["run_id"]), row
            tally.values += row["status"] == "finished"


def results(home: Path) -> list[dict[str, Any]]:
    """Return the results of a sweep from the store."""
    store.ingest(home)
    return [
        {str(name): value for name, value in row.items()}
        for row in store.sql(RESULTS, home=home).to_dict("records")
    ]


def check_events(home: Path) -> int:
    """Check that the store has every number of every complete event once; return the events."""
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
    """Check that no two attempts of a run overlap; return the number of attempts."""
    attempts = 0
    for run in home.glob("*/attempts"):
        times = []
        for attempt in sorted(run.glob("[0-9]*")):
            attempts += 1
            reader = events.Reader(attempt / "events.jsonl")
            moments = [event["time"] for event in reader.new()]
            times += [(moments[0], moments[-1])] if moments else []
        assert all(before[1] < after[0] for before, after in pairwise(sorted(times))), (run, times)
    return attempts


def kill_all(home: Path) -> None:
    """Kill every process that works on the home, and what it starts meanwhile."""
    while processes := [process for kind in alive(home).values() for process in kind]:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


def check_no_process_left(home: Path, seconds: float = 300.0) -> None:
    """Wait until no process works on the home."""
    deadline = time.monotonic() + seconds
    while any(processes := alive(home).values()):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """Mount a small file system on a folder; yield None without the right to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--orchestrate", action="store_true")
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
    options = parser.parse_args()
    depths = tuple(map(int, options.depths.split(",")))
    question = Question(depths, options.seeds, options.steps)
    if options.orchestrate:
        with frequent_ingests():  # more moments to be killed at
            run_sweep(options.home, question)
        return
    draw = random.Random(options.seed)
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=options.kills)
    tally = disturb(options.home, question, kinds, draw, options.disk)
    check_no_process_left(options.home)
    store.ingest(options.home)
    lines = check_events(options.home)
    attempts = check_attempts(options.home)
    sys.stdout.write(json.dumps(vars(tally) | {"lines": lines, "attempts": attempts}) + "\n")


if __name__ == "__main__":
    main()
