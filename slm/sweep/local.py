"""Local launcher: several runs share the devices of this machine, each with a supervisor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slm.files import NO_HOLDER, hand_over_lock, hold_lock, start_session
from slm.hardware import devices
from slm.hardware.runtime import RuntimeModel
from slm.hardware.slot import Slot
from slm.run import ExitDocument, record_exit, run_holder, stop_run
from slm.sweep.launcher import RunningRun, WaitingRun
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.schedule import Assignment, Job, schedule

MAX_CPU_RANKS = 8
"""Processes of one run on a CPU; further cores become threads."""


@dataclass(frozen=True)
class Machine:
    """The devices of one machine that a sweep may use."""

    device: str
    """"cpu", "cuda" or "mps"."""
    device_name: str
    ids: tuple[str, ...]
    """GPUs as CUDA_VISIBLE_DEVICES names them, or cores."""
    memory: int | None
    """Bytes of one GPU, or of the whole machine for CPU cores; None if unknown."""

    def slot(self, indices: Sequence[int]) -> Slot:
        """Return the slot of some devices, given by their indices in `ids`."""
        ids = tuple(self.ids[index] for index in indices)
        ranks = len(ids)
        memory = self.memory
        if self.device == "cpu":
            ranks = min(ranks, MAX_CPU_RANKS)
            if memory is not None:
                memory = memory * len(ids) // (len(self.ids) * ranks)
        return Slot(self.device, ranks, len(ids) // ranks, self.device_name, ids, memory=memory)

    def run_sizes(self, text: str) -> tuple[int, ...]:
        """Return the numbers of devices that a run may take.

        `text` is "auto" (all powers of two), "all" or a number. Raises ValueError for anything
        else.
        """
        count = len(self.ids)
        if text == "auto":
            return tuple(2**power for power in range(count.bit_length()))
        if text == "all":
            return (count,)
        if not text.isdigit() or not 1 <= int(text) <= count:
            option = "--cores-per-run" if self.device == "cpu" else "--gpus-per-run"
            raise ValueError(f"{option} {text}: choose auto, all, or 1 to {count}")
        return (int(text),)


def planned_machine(gpus: int, name: str) -> Machine:
    """Return a machine with GPUs that need not exist, for a dry run.

    Raises ValueError for an unknown name.
    """
    return Machine("cuda", name, tuple(map(str, range(gpus))), planned_gpu_memory(name))


def planned_gpu_memory(name: str) -> int:
    """Return the bytes of a GPU by its name. Raises ValueError for an unknown name."""
    for part, size in devices.MEMORIES.items():
        if part in name:
            return int(size)
    raise ValueError(f"--gpu {name}: unknown; there are {', '.join(devices.MEMORIES)}")


def this_machine(gpus: int | None = None, cores: int | None = None) -> Machine:
    """Return this machine: its GPUs, or the first `gpus`, else its CPU cores.

    Raises ValueError for more devices than there are.
    """
    ids = devices.gpus()
    if gpus is not None and cores is not None:
        raise ValueError(f"--gpus {gpus} and --cores {cores}: choose one")
    if gpus == 1 and not ids and devices.apple_gpu():
        return Machine("mps", devices.name("mps"), ("0",), devices.memory())
    if gpus is not None and gpus > len(ids):
        raise ValueError(f"--gpus {gpus}: this machine has {len(ids)}")
    if cores is None and ids:
        return Machine("cuda", devices.name("cuda"), ids[:gpus], devices.gpu_memory())
    count = devices.cores()
    if cores is not None and not 1 <= cores <= count:
        raise ValueError(f"--cores {cores}: this machine has {count}")
    ids = tuple(map(str, range(cores or count)))
    return Machine("cpu", devices.name("cpu"), ids, devices.memory())


@dataclass
class Local:
    """Start attempts on this machine, which runs share."""

    machine: Machine
    sizes: Sequence[int]
    """Numbers of devices that a run may take, powers of two if several."""
    runtime: RuntimeModel
    micro_batches: MicroBatches
    name = "local"
    _supervisors: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def unit(self) -> int:
        """Number of devices that are scheduled together."""
        return self.sizes[0] if len(self.sizes) == 1 else 1

    @property
    def description(self) -> str:
        return f"{len(self.machine.ids)} x {self.machine.device_name}"

    @property
    def units(self) -> int:
        """Number of units that the machine's devices form."""
        return len(self.machine.ids) // self.unit

    def timetable(
        self, waiting: Sequence[WaitingRun], running: Sequence[RunningRun] = ()
    ) -> list[Assignment]:
        """Schedule the waiting runs on units of the devices so that the whole sweep ends soonest.

        Raises ValueError for a run that fits on no slot.
        """
        ids = self.machine.ids
        busy = {}
        for run in running:
            for device in set(run.ids).intersection(ids):
                busy[ids.index(device) // self.unit] = max(run.seconds_left, 1.0)
        return schedule([self._job(run) for run in waiting], self.units, busy)

    def assign(
        self, waiting: Sequence[WaitingRun], running: Sequence[RunningRun]
    ) -> list[tuple[str, Slot]]:
        """Return the names of the runs to start now, each with its slot."""
        idle = set(self.machine.ids)
        idle.difference_update(*(run.ids for run in running))
        if not idle:
            return []
        timetable = self.timetable(waiting, running)
        return [(item.job.name, self.slot(item)) for item in timetable if item.start == 0]

    def slot(self, assignment: Assignment) -> Slot:
        """Return the slot of an assignment, whose devices are units."""
        first = assignment.devices[0] * self.unit
        return self.machine.slot(range(first, first + len(assignment.devices) * self.unit))

    def _job(self, run: WaitingRun) -> Job:
        sizes = [size for size in self.sizes if size <= run.hp.batch_rows] or self.sizes[:1]
        sizes = [size for size in sizes if size == run.devices] or sizes
        seconds = {}
        refusal = None
        for size in sizes:
            slot = self.machine.slot(range(size))
            try:
                self.micro_batches.choose(run.hp, slot)
            except ValueError as error:
                refusal = error
                continue
            seconds[size // self.unit] = run.seconds(self.runtime, slot)
        if refusal and not seconds:
            raise refusal
        return Job(run.name, seconds)

    def start(self, attempt: Path) -> None:
        """Start the supervisor of an attempt in its own session, unless the run is held.

        The supervisor inherits the run's lock, which is therefore held from the first moment.
        """
        run_folder = attempt.parent.parent
        lock = hold_lock(run_folder / "lock", NO_HOLDER)  # only the supervisor may get a stop
        if lock is None:
            return
        descriptor = lock.fileno()
        arguments = ["-m", "slm.sweep.supervisor", str(attempt.resolve()), str(descriptor)]
        supervisor = start_session(arguments, attempt / "log", [descriptor])
        hand_over_lock(lock, supervisor.pid)
        self._supervisors[run_folder] = supervisor

    def alive(self, attempts: Iterable[Path]) -> set[Path]:
        """Return the attempts whose run a process holds."""
        return {attempt for attempt in attempts if self._is_held(attempt.parent.parent)}

    def _is_held(self, run_folder: Path) -> bool:
        supervisor = self._supervisors.get(run_folder)
        if supervisor is not None and supervisor.poll() is None:
            return True
        return run_holder(run_folder) is not None

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and stop, or to stop at once."""
        stop_run(attempt.parent.parent, at_once)

    def reap(self, attempt: Path) -> ExitDocument:
        """Write and return exit.json for an attempt that ended without writing it."""
        return record_exit(
            attempt, 1, "interrupted", "exited without writing exit.json (killed, or disk full)"
        )
