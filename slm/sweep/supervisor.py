"""Supervisor of one attempt: `python -m slm.sweep.supervisor ATTEMPT_FOLDER [LOCK]`.

It runs in a session of its own and holds the run's `lock` (LOCK is the number of an inherited open
file; without it the supervisor takes the lock itself). It starts torchrun, forwards SIGTERM as a
request to checkpoint and stop, kills everything on SIGINT or when the trainer hangs, leaves no
process behind, and writes `exit.json`. Training continues if the process that started it dies.
Under Slurm one supervisor runs on every node; only the first node's holds the lock and writes.
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
from typing import Any, TextIO

import psutil

from slm import events
from slm.files import hold_lock, inherit_lock, lock_holder
from slm.hardware import devices
from slm.run import CANCELLED, AttemptDocument, is_cancelled, is_done, read_attempt, record_exit
from slm.sweep.interrupt import InterruptibleSleep
from slm.sweep.out_of_memory import OUT_OF_MEMORY
from slm.sweep.rendezvous import gloo_environment, rendezvous_args

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 1.0
"""Pause between two checks of the trainer's events and the machine's memory."""
LOG_TAIL = 20_000
"""Bytes of the log that are searched for an error."""
MIN_HANG_SECONDS = 120.0
"""Shortest time without an event of training steps that counts as a hang."""
HANG_STEPS = 10
"""Median pauses between two events of steps without an event that count as a hang, if longer."""
PHASE_SECONDS = {
    "start": 1800.0,
    "compilation": 3600.0,
    "checkpoint": 3600.0,
    "evaluation": 600.0,
    "core": 600.0,
}
"""Time without an event that counts as a hang in phases longer than a step.

The start ends with the second logged step; evaluations log events on the way.
"""
PARTING_SECONDS = 10.0
"""Time for the first node to record the end before Slurm kills everything."""
LOW_MEMORY = 0.05
"""Share of free memory below which a SIGKILL is attributed to the kernel's out-of-memory killer."""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Settings that make glibc keep freed memory in the trainer.

Returned pages are mapped anew at every step, which takes as long as the step itself.
"""
KILLED = re.compile(r"failed \(exitcode: -9\)")
"""Line of torchrun about the first failed worker; it kills the others itself, by the same signal.
"""
CONSEQUENCES = ("ChildFailedError", "reset by peer", "closed by peer")
"""Parts of errors that another rank's failure causes."""


def supervise(folder: Path, lock: int | None) -> int:
    """Run one attempt to its end, write exit.json, and return 0 if the run is finished.

    `lock` is the file descriptor of the run's lock, None to take it.
    """
    # 1) hold the run, and handle signals before anything is started
    run_folder = folder.parent.parent
    attempt = read_attempt(folder)
    node = os.environ.get("SLURM_NODEID", "0") if attempt["nodes"] > 1 else "0"
    is_first = node == "0"
    held = _hold(run_folder, lock) if is_first else None
    _adopt_orphans()
    requests = _StopRequests()
    requests.stop |= is_cancelled(run_folder)  # cancelled before a process held the run

    # 2) train
    with (folder / ("log" if is_first else f"log-{node}")).open("ab") as log:
        torchrun = subprocess.Popen(
            _command(folder, attempt),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=_environment(attempt),
        )
    watch = _Watch(folder)
    code = _wait(torchrun, requests, watch)
    while processes := _kill_descendants():  # a killed process may have had a child meanwhile
        psutil.wait_procs(processes)

    # 3) record the end
    if held is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PARTING_SECONDS if code else 0)
        return 1 if code else 0
    if is_done(run_folder):
        record_exit(folder, code, None, None)
        return 0
    if attempt["launcher"] != "slurm" or not requests.terminated:  # Slurm knows why it ends a job
        record_exit(folder, code, *_cause(folder, code, requests, watch))
    return 1


def _hold(run_folder: Path, lock: int | None) -> TextIO:
    """Return the run's lock, with this process's number in it; exit if another process holds it."""
    if lock is not None:
        return inherit_lock(lock)
    held = hold_lock(run_folder / "lock")
    if held is None:
        sys.exit(f"{run_folder.name} is held by process {lock_holder(run_folder / 'lock')}")
    return held


class _StopRequests:
    """Stop requests by signals: TERM and USR2 to checkpoint and stop, INT to stop at once.

    Slurm sends USR2 to every process of a job. It stays blocked here and in all descendants, and
    therefore pending, which this process alone looks at.
    """

    def __init__(self) -> None:
        self.stop = False
        self.at_once = False
        self.terminated = False
        """Whether SIGTERM has arrived."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        self._sleep = InterruptibleSleep()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop |= number in (signal.SIGTERM, signal.SIGINT)
        self.at_once |= number == signal.SIGINT
        self.terminated |= number == signal.SIGTERM

    def wait(self, seconds: float) -> None:
        """Sleep, or return as soon as a signal arrives or a child ends."""
        self._sleep.wait(seconds)
        self.stop |= signal.SIGUSR2 in signal.sigpending()


class _Watch:
    """Detect a hung trainer by its events, and a machine short of memory."""

    def __init__(self, folder: Path) -> None:
        self.allowed = PHASE_SECONDS["start"]
        """Seconds without an event that the present phase may take."""
        self.silence: float | None = None
        """Seconds without an event when the trainer was found hung; None while it is not."""
        self._reader = events.Reader(folder / "events.jsonl")
        self._checked = time.monotonic()
        self._silent = 0.0
        self._train_time: float | None = None
        self._pauses: list[float] = []
        self._kills = devices.memory_kills()
        self._free_share = 1.0

    def is_hung(self) -> bool:
        """Whether the trainer hangs. To be called every POLL_SECONDS."""
        now = time.monotonic()
        # A machine or job that was suspended stops the supervisor as well as the trainer.
        self._silent += min(now - self._checked, 2 * POLL_SECONDS)
        self._checked = now
        for event in self._reader.new():
            self._silent = 0.0
            self._update_phase(event)
        memory = psutil.virtual_memory()
        self._free_share = min(self._free_share, memory.available / memory.total)
        if self._silent > self.allowed:
            self.silence = self._silent
        return self.silence is not None

    def _update_phase(self, event: dict[str, Any]) -> None:
        """Set the seconds that may follow an event."""
        kind = event["event"]
        if kind == "train":
            if self._train_time is not None:
                self._pauses.append(event["time"] - self._train_time)
            self._train_time = event["time"]
        if kind == "working":
            self.allowed = PHASE_SECONDS[event["what"]]
        elif kind not in ("eval", "core") and self._pauses:  # the final weights follow evaluations
            median = sorted(self._pauses)[len(self._pauses) // 2]
            self.allowed = max(MIN_HANG_SECONDS, HANG_STEPS * median)

    def was_short_of_memory(self) -> bool:
        """Whether lack of memory explains a SIGKILL."""
        return self._free_share < LOW_MEMORY or devices.memory_kills() > self._kills


def _environment(attempt: AttemptDocument) -> dict[str, str]:
    """Return the trainer's environment.

    PYTHONSAFEPATH keeps the user's modules from shadowing those of torch.
    """
    environment = {
        **ALLOCATOR,
        **os.environ,
        "OMP_NUM_THREADS": str(attempt["threads"]),
        "PYTHONSAFEPATH": "1",
        "TORCHINDUCTOR_CACHE_DIR": attempt["compiled_folder"],
    }
    if attempt["device"] == "cuda" and attempt["ids"]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(attempt["ids"])
    if attempt["nodes"] > 1:
        environment |= gloo_environment()
    return environment


def _command(folder: Path, attempt: AttemptDocument) -> list[str]:
    """Return the command of torchrun: one process per rank.

    On a single node the system picks the port.
    """
    nodes = attempt["nodes"]
    standalone = ("--standalone", "--local-addr=127.0.0.1")
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *(rendezvous_args(nodes) if nodes > 1 else standalone),
        f"--nproc-per-node={attempt['ranks'] // nodes}",
        f"--log-dir={folder / 'torchrun'}",
        "--module",
        "slm.train",
        str(folder),
    ]


def _wait(torchrun: subprocess.Popen[bytes], requests: _StopRequests, watch: _Watch) -> int:
    """Return the exit code of torchrun.

    A stop request goes to its workers, which checkpoint in their own time.
    """
    forwarded = False
    while (code := torchrun.poll()) is None:
        if requests.at_once or watch.is_hung():
            _kill_descendants()
        elif requests.stop and not forwarded:
            forwarded = True
            _terminate_workers(torchrun.pid)
        requests.wait(POLL_SECONDS)
    return code


def _terminate_workers(torchrun: int) -> None:
    """Send SIGTERM to the workers of torchrun, not to their children such as a compiler; to
    torchrun before it has any.
    """
    process = psutil.Process(torchrun)
    for target in process.children() or [process]:
        with suppress(psutil.NoSuchProcess):
            target.terminate()


def _cause(folder: Path, code: int, requests: _StopRequests, watch: _Watch) -> tuple[str, str]:
    """Return reason and message of an attempt that did not finish: from its events, else from the
    end of its log.
    """
    if is_cancelled(folder.parent.parent):
        return CANCELLED
    if watch.silence is not None:
        return "timeout", f"no event for {watch.silence:.0f} s: killed as hung"
    for event in events.Reader(folder / "events.jsonl").new():
        if event["event"] == "failed":
            return event["reason"], event["message"]
    if requests.at_once:
        return "interrupted", "stopped at once on request"
    if requests.stop:
        return "interrupted", "stopped on request before the first step"
    if code < 0:
        return "error", f"torchrun was killed by {signal.Signals(-code).name}"
    tails = [path.read_bytes()[-LOG_TAIL:] for path in sorted(folder.glob("log*"))]
    log = "\n".join(tail.decode(errors="replace") for tail in tails)
    message = last_error(log)
    if KILLED.search(log):
        if watch.was_short_of_memory():
            return "oom", "killed by the kernel while the machine was short of memory"
        if "Error" not in message:
            return "error", "a trainer was killed by SIGKILL"
    return "oom" if OUT_OF_MEMORY.search(message) else "error", message


def last_error(log: str) -> str:
    """Return the line that names the error at the end of a log, one about memory first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    memory = [line for line in lines if OUT_OF_MEMORY.search(line)]
    causes = [line for line in lines if not any(text in line for text in CONSEQUENCES)]
    errors = [line for line in causes if "Error" in line]
    return (memory or errors or lines or ["no output"])[-1]


def _adopt_orphans() -> None:
    """Become the parent of the workers if torchrun is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> list[psutil.Process]:
    """Kill every descendant of this process, and return them."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return processes


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
