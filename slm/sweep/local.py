"""Attempts on this machine: its devices shared out to several runs at once, and one supervisor for each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm.files import NO_HOLDER, hand_over_lock, hold_lock
from slm.hardware import devices
from slm.hardware.runtime import STARTUP_SECONDS, RuntimeModel
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import ExitDocument, record_exit, run_holder, stop_run
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.schedule import Job, Placement, schedule

if TYPE_CHECKING:
    from slm.sweep.launcher import Waiting, Working

MOST_RANKS = 8
"""Processes of one run on a CPU, at most; further cores are threads."""


@dataclass(frozen=True)
class Machine:
    """The devices of one machine that a sweep may use."""

    device: str
    """"cpu", "cuda" or "mps"."""
    device_name: str
    """The device, for people and for estimates."""
    ids: tuple[str, ...]
    """Each GPU as CUDA_VISIBLE_DEVICES names it, or each core."""
    memory: int | None
    """Bytes of one GPU, or of the whole machine for its cores; None where that is not known."""

    def slot(self, places: Sequence[int]) -> Slot:
        """Some of the devices, by their places in `ids`, for one run."""
        ids = tuple(self.ids[place] for place in places)
        if self.device != "cpu":
            return Slot(self.device, len(ids), 1, self.device_name, ids, memory=self.memory)
        ranks = min(len(ids), MOST_RANKS)
        memory = None if self.memory is None else self.memory * len(ids) // (len(self.ids) * ranks)
        return Slot("cpu", ranks, len(ids) // ranks, self.device_name, ids, memory=memory)


def sizes(text: str, machine: Machine) -> tuple[int, ...]:
    """Devices of a run as asked: "auto" (the powers of two there are), "all", or a number. Raises ValueError."""
    count, option = (
        len(machine.ids),
        "--cores-per-run" if machine.device == "cpu" else "--gpus-per-run",
    )
    if text == "auto":
        return tuple(2**power for power in range(count.bit_length()))
    if text == "all":
        return (count,)
    if not text.isdigit() or not 1 <= int(text) <= count:
        raise ValueError(f"{option} {text}: choose auto, all, or 1 to {count}")
    return (int(text),)


def imagined(gpus: int, name: str) -> Machine:
    """A machine with so many GPUs of a name, to plan for. Raises ValueError for a name that is not known."""
    memory = next((size for part, size in devices.MEMORIES.items() if part in name), None)
    if memory is None:
        raise ValueError(f"--gpu {name}: unknown; there are {', '.join(devices.MEMORIES)}")
    return Machine("cuda", name, tuple(map(str, range(gpus))), int(memory))


def machine(gpus: int | None = None, cores: int | None = None) -> Machine:
    """All GPUs found (or so many), else the CPU's cores. Raises ValueError for more than there are."""
    found = devices.gpus()
    if gpus is not None and cores is not None:
        raise ValueError(f"--gpus {gpus} and --cores {cores}: choose one")
    if gpus == 1 and not found and devices.apple_gpu():
        return Machine("mps", devices.name("mps"), ("0",), devices.memory())
    if gpus is not None and gpus > len(found):
        raise ValueError(f"--gpus {gpus}: {len(found)} found here")
    if cores is None and found:
        return Machine("cuda", devices.name("cuda"), found[:gpus], devices.gpu_memory())
    here = devices.cores()
    if cores is not None and not 1 <= cores <= here:
        raise ValueError(f"--cores {cores}: {here} found here")
    return Machine(
        "cpu", devices.name("cpu"), tuple(map(str, range(cores or here))), devices.memory()
    )


class Local:
    """Starts attempts here and knows how they are."""

    name = "local"

    def __init__(
        self, machine: Machine, sizes: Sequence[int], seconds: RuntimeModel, memory: MicroBatches
    ) -> None:
        """Runs may take so many devices each, powers of two where there is a choice."""
        self.machine, self._sizes, self.seconds, self.memory = machine, sizes, seconds, memory
        self.unit = sizes[0] if len(sizes) == 1 else 1
        """Devices that are shared out together."""
        self._supervisors: dict[Path, subprocess.Popen[bytes]] = {}

    @property
    def where(self) -> str:
        """The devices, for people."""
        return f"{len(self.machine.ids)} x {self.machine.device_name}"

    def timetable(self, waiting: Sequence[Waiting], working: Sequence[Working]) -> list[Placement]:
        """When each run starts on which units of the devices, so that the whole sweep ends soonest."""
        ids, busy = self.machine.ids, dict[int, float]()
        for run in working:
            for own in set(run.ids).intersection(ids):
                busy[ids.index(own) // self.unit] = max(run.seconds_left, 1.0)
        return schedule([self._job(run) for run in waiting], len(ids) // self.unit, busy)

    def places(
        self, waiting: Sequence[Waiting], working: Sequence[Working]
    ) -> list[tuple[str, Slot]]:
        """The runs to start now, each with its slot."""
        taken = {own for run in working for own in run.ids}
        if taken.issuperset(self.machine.ids):
            return []
        now = [placed for placed in self.timetable(waiting, working) if placed.start == 0]
        return [(placed.job.name, self.slot(placed)) for placed in now]

    def slot(self, placed: Placement) -> Slot:
        """The slot of a placement."""
        return self.machine.slot(
            [unit * self.unit + own for unit in placed.devices for own in range(self.unit)]
        )

    def _job(self, run: Waiting) -> Job:
        useful = [size for size in self._sizes if size <= run.given.batch_rows] or self._sizes[:1]
        sizes = [size for size in useful if size == run.devices] or useful
        slots = {size: self.machine.slot(range(size)) for size in sizes}
        seconds = {
            size: self.seconds(run.given, slot)
            for size, slot in slots.items()
            if self._fits(run.given, slot)
        }
        if not seconds:
            self.memory.rows(run.given, slots[max(sizes)])  # says what is missing
        left = {
            size // self.unit: STARTUP_SECONDS + run.left * (whole - STARTUP_SECONDS) for size, whole in seconds.items()
        }
        return Job(run.name, left)

    def _fits(self, given: Hyperparameters, slot: Slot) -> bool:
        try:
            self.memory.rows(given, slot)
        except ValueError:
            return False
        return True

    def start(self, attempt: Path) -> None:
        """Start the supervisor of an attempt in a session of its own; it holds the run's lock from its first moment.

        Does nothing where another holds the run.
        """
        lock = hold_lock(
            attempt.parent.parent / "lock", NO_HOLDER
        )  # a stop is meant for the supervisor
        if lock is None:
            return
        with (attempt / "log").open("ab") as log:
            supervisor = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "slm.sweep.supervisor",
                    str(attempt.resolve()),
                    str(lock.fileno()),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        hand_over_lock(lock, supervisor.pid)
        self._supervisors[attempt.parent.parent] = supervisor

    def living(self, attempts: Iterable[Path]) -> set[Path]:
        """Those that somebody works at."""
        return {attempt for attempt in attempts if self._lives(attempt)}

    def _lives(self, attempt: Path) -> bool:
        supervisor = self._supervisors.get(attempt.parent.parent)
        if supervisor is not None and supervisor.poll() is None:
            return True
        return run_holder(attempt.parent.parent) is not None

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and end, or to end at once."""
        stop_run(attempt.parent.parent, at_once)

    def reap(self, attempt: Path) -> ExitDocument:
        """Record the end of an attempt that ended without a word."""
        why = "supervisor and trainer ended without a word: killed, or a full disk"
        return record_exit(attempt, 1, "interrupted", why)
