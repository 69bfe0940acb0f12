"""One supervisor per attempt: `python -m slm.launch.supervisor ATTEMPT_FOLDER`, in a session of its own.

It holds the run's `lock`, starts torchrun, passes SIGTERM on, reaps whatever torchrun leaves behind, and writes
`exit.json`. The one who started it may die: training goes on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from slm import events, launch, locks

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1
LOG_TAIL = 4000
"""Bytes of the log that are searched for an error."""


def supervise(folder: Path) -> int:
    """Run one attempt to its end and record how it ended; its exit code."""
    run_folder = folder.parent.parent
    lock = locks.hold(run_folder / "lock")
    if lock is None:
        sys.exit(f"{run_folder.name} is held by process {locks.holder(run_folder / 'lock')}")
    _adopt_orphans()
    attempt = events.read_json(folder / "attempt.json")
    stop_asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.set())
    with (folder / "log").open("ab") as log:
        child = subprocess.Popen(_command(folder, attempt), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    code = _wait(child, stop_asked)
    _kill_descendants()
    finished = (run_folder / "done.json").exists()
    reason, message = (None, None) if finished else _why(folder, code, stop_asked.is_set())
    launch.record_exit(folder, code, reason, message)
    return 0 if finished else 1


def _wait(child: subprocess.Popen[bytes], stop_asked: threading.Event) -> int:
    """Exit code of torchrun. A stop goes to its workers, which checkpoint in their own time."""
    told = False
    while True:
        try:
            return child.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if stop_asked.is_set() and not told:
                told = True
                workers = _family(child.pid)[1:]
                if not workers:
                    child.terminate()
                for process in workers:
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()


def _command(folder: Path, attempt: dict[str, Any]) -> list[str]:
    """torchrun on a port that the system picks, one process a rank."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={attempt['ranks']}",
        f"--log-dir={folder / 'torchrun'}",
        "--module",
        "slm.train",
        str(folder),
    ]


def _why(folder: Path, code: int, stop_asked: bool) -> tuple[str, str]:
    """Reason and message of an attempt that did not finish: its own word, else the end of its log."""
    try:
        failed = [event for event in events.Reader(folder / "events.jsonl").new() if event["event"] == "failed"]
    except ValueError as error:
        return "error", f"events.jsonl is damaged: {error}"
    if failed:
        return failed[-1]["reason"], failed[-1]["message"]
    if stop_asked:
        return "interrupted", "stopped before the first step, as asked"
    if code < 0:
        return "error", f"torchrun was killed by {signal.Signals(-code).name}"
    tail = (folder / "log").read_bytes()[-LOG_TAIL:].decode(errors="replace")
    message = _last_error(tail)
    return "oom" if "OutOfMemoryError" in message else "error", message


def _last_error(log: str) -> str:
    """The line that names the error in the end of a log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    others = ("ChildFailedError", "reset by peer", "closed by peer")  # what the first error did to the rest
    named = [line for line in lines if "Error" in line and not any(words in line for words in others)]
    return (named or lines or ["no output"])[-1]


def _adopt_orphans() -> None:
    """Become the parent of the workers of a torchrun that was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> None:
    """Leave no worker behind."""
    left = _family(os.getpid())[1:]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it; nothing when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
