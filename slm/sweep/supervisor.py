"""One supervisor per attempt: `python -m slm.sweep.supervisor ATTEMPT_FOLDER [LOCK]`, in a session of its own.

It holds the run's `lock` (an open file of this number, or it takes it), starts torchrun, passes SIGTERM on as a request
to checkpoint and end, ends everything at once on SIGINT or when the trainer falls silent, leaves no process behind, and
writes `exit.json`. The one who started it may die: training goes on. Under Slurm there is one on every node; the first
node's alone holds the lock and writes.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from slm import events
from slm.files import hold_lock, inherit_lock, lock_holder
from slm.hardware import devices
from slm.run import CANCELLED, is_cancelled, is_done, read_attempt, record_exit
from slm.sweep import rendezvous as nodes
from slm.sweep.interrupt import InterruptibleSleep

PR_SET_CHILD_SUBREAPER = 36
LOOK_SECONDS = 1.0
"""Pause between two looks at the trainer's events and the machine's memory."""
LOG_TAIL = 20_000
"""Bytes of the log that are searched for an error."""
SILENT_SECONDS = 120.0
"""Shortest silence of a trainer in its steps that is taken for a hang."""
SILENT_STEPS = 10
"""Median pauses between two events of steps that a silence must last, too."""
WORKING_SECONDS = {"start": 1800.0, "compilation": 3600.0, "checkpoint": 3600.0}
WORKING_SECONDS |= {"evaluation": 600.0, "core": 600.0}
"""Silence after which what takes longer than a step is taken for a hang: a start ends with the second logged step;
evaluations speak now and then."""
PARTING_SECONDS = 10.0
"""Time for the first node to say how an attempt ended before another's failure has Slurm end all."""
SHORT_OF_MEMORY = 0.05
"""Share of the machine's memory that was left when a kill is taken for one by the kernel, for want of memory."""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""What keeps freed memory with a trainer (glibc): given back, its pages are fetched anew at every step, which takes as
long as the step itself."""
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|(can't|[Cc]annot) allocate memory|MemoryError|bad_alloc|_ALLOC_FAILED"
)
"""What torch, Python, C++, the C library and cuBLAS say when a memory is full."""
KILLED = re.compile(r"failed \(exitcode: -9\)")
"""What torchrun says of the first worker that failed; it kills the others itself, with the same signal."""


def supervise(folder: Path, lock: int | None) -> int:
    """Run one attempt to its end and record how it ended; its exit code. An open file given as lock is the run's."""
    run_folder, attempt = folder.parent.parent, read_attempt(folder)
    first = int(os.environ.get("SLURM_NODEID", "0")) == 0 or attempt["nodes"] == 1
    held = _hold(run_folder, lock) if first else None
    _adopt_orphans()
    asked = _Asked()
    asked.stop |= is_cancelled(run_folder)  # said while nobody held the run yet
    with (folder / ("log" if first else f"log-{os.environ['SLURM_NODEID']}")).open("ab") as log:
        child = subprocess.Popen(
            _command(folder, attempt),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | _environment(attempt),
        )
    watch = _Watch(folder)
    code = _wait(child, asked, watch)
    while left := _kill_descendants():  # one that is killed may have had a child meanwhile
        psutil.wait_procs(left)
    finished = is_done(run_folder)
    if held is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PARTING_SECONDS if code else 0)
        return 1 if code else 0
    if finished or not (
        asked.terminated and attempt["launcher"] == "slurm"
    ):  # why Slurm ends a job, Slurm knows
        reason, message = (None, None) if finished else _why(folder, code, asked, watch)
        record_exit(folder, code, reason, message)
    return 0 if finished else 1


def _hold(run_folder: Path, lock: int | None) -> Any:
    """The run's lock, with this process's number in it."""
    if lock is not None:
        return inherit_lock(lock)
    held = hold_lock(run_folder / "lock")
    if held is None:
        sys.exit(f"{run_folder.name} is held by process {lock_holder(run_folder / 'lock')}")
    return held


class _Asked:
    """What signals ask for: TERM to checkpoint and end, INT to end at once. They and a child's end wake a wait.

    USR2 asks for the same as TERM. Slurm sends a signal to every process of a job: this one stays blocked, in all that
    descend from here as well, and pending, which is seen here alone.
    """

    def __init__(self) -> None:
        self.stop = self.at_once = self.terminated = False
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        self._waking = InterruptibleSleep()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop |= number in (signal.SIGTERM, signal.SIGINT)
        self.at_once |= number == signal.SIGINT
        self.terminated |= number == signal.SIGTERM

    def wait(self, seconds: float) -> None:
        """Until a signal comes, or so long."""
        self._waking.wait(seconds)
        self.stop |= signal.SIGUSR2 in signal.sigpending()


class _Watch:
    """Whether a trainer shows signs of life, and whether the machine ran short of memory."""

    def __init__(self, folder: Path) -> None:
        self._reader = events.Reader(folder / "events.jsonl")
        self._looked, self._silent = time.monotonic(), 0.0
        self._train_time: float | None = None
        self._pauses: list[float] = []
        self._kills = devices.memory_kills()
        self._least = 1.0
        self.allowed = WORKING_SECONDS["start"]
        """Seconds that the trainer may be silent now."""
        self.silence: float | None = None
        """Seconds without a sign of life that were taken for a hang."""

    def hung(self) -> bool:
        """Whether the trainer is taken for hung. To be asked every LOOK_SECONDS."""
        now = time.monotonic()
        self._silent += min(
            now - self._looked, 2 * LOOK_SECONDS
        )  # a stopped machine or job stops both
        self._looked = now
        for event in self._reader.new():
            self._silent = 0.0
            self._allow(event)
        memory = psutil.virtual_memory()
        self._least = min(self._least, memory.available / memory.total)
        if self._silent > self.allowed:
            self.silence = self._silent
        return self.silence is not None

    def _allow(self, event: dict[str, Any]) -> None:
        """How long the trainer may be silent after an event."""
        kind = event["event"]
        if kind == "train":
            if self._train_time is not None:
                self._pauses.append(event["time"] - self._train_time)
            self._train_time = event["time"]
        if kind == "working":
            self.allowed = WORKING_SECONDS[event["what"]]
        elif (
            kind not in ("eval", "core") and self._pauses
        ):  # after an evaluation the final weights are written
            self.allowed = max(
                SILENT_SECONDS, SILENT_STEPS * sorted(self._pauses)[len(self._pauses) // 2]
            )

    def short_of_memory(self) -> bool:
        """Whether a kill by the kernel is explained by the machine's memory."""
        return self._least < SHORT_OF_MEMORY or devices.memory_kills() > self._kills


def _environment(attempt: dict[str, Any]) -> dict[str, str]:
    """What the trainer finds. The safe path keeps modules of the user's folder from standing in for those of torch."""
    own = {"OMP_NUM_THREADS": str(attempt["threads"]), "PYTHONSAFEPATH": "1"}
    own |= {"TORCHINDUCTOR_CACHE_DIR": attempt["compiled_folder"]}
    if attempt["device"] == "cuda" and attempt["ids"]:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(attempt["ids"])
    if attempt["nodes"] > 1:
        own |= nodes.network()
    return {name: value for name, value in ALLOCATOR.items() if name not in os.environ} | own


def _command(folder: Path, attempt: dict[str, Any]) -> list[str]:
    """torchrun, one process a rank: on one node on a port that the system picks, on several as Slurm numbers them."""
    count = attempt["nodes"]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(nodes.meeting(count) if count > 1 else ("--standalone", "--local-addr=127.0.0.1")),
        f"--nproc-per-node={attempt['ranks'] // count}",
        f"--log-dir={folder / 'torchrun'}",
        "--module",
        "slm.train",
        str(folder),
    ]


def _wait(child: subprocess.Popen[bytes], asked: _Asked, watch: _Watch) -> int:
    """Exit code of torchrun. A request to stop goes to its workers, which checkpoint in their own time."""
    told = False
    while (code := child.poll()) is None:
        if asked.stop and not told:
            told = True
            _ask_to_stop(child)
        if asked.at_once or watch.hung():
            _kill_descendants()
        asked.wait(LOOK_SECONDS)
    return code


def _ask_to_stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the workers of torchrun, and not what they started, as a compiler; itself while it has none."""
    torchrun = psutil.Process(child.pid)
    for process in torchrun.children() or [torchrun]:
        with suppress(psutil.NoSuchProcess):
            process.terminate()


def _why(folder: Path, code: int, asked: _Asked, watch: _Watch) -> tuple[str, str]:
    """Reason and message of an attempt that did not finish: its own word, else the end of its log."""
    if is_cancelled(folder.parent.parent):
        return CANCELLED
    if watch.silence is not None:
        return "timeout", f"no event for {watch.silence:.0f} s: taken for a hang, and ended"
    failed = [
        event
        for event in events.Reader(folder / "events.jsonl").new()
        if event["event"] == "failed"
    ]
    if failed:
        return failed[-1]["reason"], failed[-1]["message"]
    if asked.stop:
        return (
            "interrupted",
            "ended at once, as asked"
            if asked.at_once
            else "stopped before the first step, as asked",
        )
    if code < 0:
        return "error", f"torchrun was killed by {signal.Signals(-code).name}"
    log = "\n".join(
        path.read_bytes()[-LOG_TAIL:].decode(errors="replace")
        for path in sorted(folder.glob("log*"))
    )
    if KILLED.search(log) and watch.short_of_memory():
        return "oom", "killed by the kernel while the machine was short of memory"
    message = last_error(log)
    if KILLED.search(log) and "Error" not in message:
        return "error", "a trainer was killed by SIGKILL"
    return "oom" if OUT_OF_MEMORY.search(message) else "error", message


def last_error(log: str) -> str:
    """The line that names the error in the end of a log; one about memory before all others."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    others = (
        "ChildFailedError",
        "reset by peer",
        "closed by peer",
    )  # what the first error did to the rest
    named = [
        line for line in lines if "Error" in line and not any(words in line for words in others)
    ]
    memory = [line for line in lines if OUT_OF_MEMORY.search(line)]
    return (memory or named or lines or ["no output"])[-1]


def _adopt_orphans() -> None:
    """Become the parent of the workers of a torchrun that was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> list[psutil.Process]:
    """Leave no worker behind; those that were left."""
    left = _family(os.getpid())[1:]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; nothing when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
