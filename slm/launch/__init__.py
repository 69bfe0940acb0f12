"""Plans -> attempts: folders, devices and one supervisor each."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm import devices, events, locks
from slm.estimate import largest_micro_batch
from slm.plan import Plan
from slm.recipe import Hyperparameters

CHECKPOINT_SECONDS = 20.0
"""Shortest time between two checkpoints."""
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}
"""What keeps freed memory with a trainer (glibc): given back, its pages are fetched anew at every step, which takes as
long as the step itself."""
CPU_TOKENS = 2**13
"""Tokens of a forward pass on a CPU, about: more gain nothing, and take memory."""


@dataclass(frozen=True)
class Slot:
    """What one run trains on; not identity."""

    device: str
    """"cpu", "cuda" or "mps"."""
    ranks: int
    """Processes, at most: one a GPU, or one a core."""
    threads: int
    """Threads a process."""


def slot(gpus: int | None = None, cores: int | None = None) -> Slot:
    """All GPUs found (or so many), else the CPU: a rank a core up to eight, the rest as threads.

    Raises ValueError for more GPUs or cores than there are.
    """
    found = devices.gpu_count()
    if gpus is not None and cores is not None:
        raise ValueError(f"--gpus {gpus} and --cores {cores}: choose one")
    if gpus == 1 and not found and devices.apple_gpu():
        return Slot("mps", 1, 1)
    if gpus is not None and gpus > found:
        raise ValueError(f"--gpus {gpus}: {found} found here")
    if cores is None and (found if gpus is None else gpus):
        return Slot("cuda", gpus or found, 1)
    here = devices.cores()
    if cores is not None and not 1 <= cores <= here:
        raise ValueError(f"--cores {cores}: {here} found here")
    cores = cores or here
    ranks = min(cores, 8)
    return Slot("cpu", ranks, cores // ranks)


def start(
    plan: Plan, home: Path, data_folder: Path, where: Slot, checkpoint_seconds: float
) -> tuple[Path, subprocess.Popen[bytes]]:
    """Make the next attempt of a run and start its supervisor in a session of its own; attempt folder and process."""
    folder = _make_attempt(plan, home, data_folder, where, checkpoint_seconds)
    # The safe path keeps modules of the user's folder from standing in for those of the trainer.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str((home / "compiled").resolve())}
    environment = {**ALLOCATOR, **os.environ, **compiled, "OMP_NUM_THREADS": str(where.threads), "PYTHONSAFEPATH": "1"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slm.launch.supervisor", str(folder.resolve())],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
    return folder, process


def _make_attempt(plan: Plan, home: Path, data_folder: Path, where: Slot, checkpoint_seconds: float) -> Path:
    """The next attempt's folder with its attempt.json, made under another name and renamed."""
    attempts = home / plan.run_id / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    last = last_attempt(home / plan.run_id)
    number = 1 + (int(last.name) if last else 0)
    ranks = min(where.ranks, plan.hyperparameters.batch_rows)
    document = asdict(where) | {
        "attempt": number,
        "created": time.time(),
        "device_name": devices.name(where.device),
        "ranks": ranks,
        "micro_batch": micro_batch(plan.hyperparameters, where),
        "checkpoint_seconds": checkpoint_seconds,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slm", "torch", "numpy")},
        **provenance(),
        "data_folder": str(data_folder.resolve()),
        "launcher": "local",
    }
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=attempts))
    events.write_json(unfinished / "attempt.json", document)
    return unfinished.rename(attempts / f"{number:03d}")


def micro_batch(given: Hyperparameters, where: Slot) -> int:
    """Rows of one forward pass of one rank. Raises ValueError when its memory does not hold one."""
    ranks, few = min(where.ranks, given.batch_rows), max(1, CPU_TOKENS // given.sequence_length)
    if where.device == "cpu":
        return min(few, largest_micro_batch(given, devices.memory() // ranks, "cpu", ranks))
    memory = devices.gpu_memory() if where.device == "cuda" else devices.memory()
    return largest_micro_batch(given, memory, where.device, ranks) if memory else few


def provenance() -> dict[str, Any]:
    """Commit and uncommitted changes of the code that runs, null where it is not a checkout's own."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout if result.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", "recipe.py") is None:
            return {"commit": None, "diff": None}
        commit = git("rev-parse", "HEAD")
        return {"commit": commit.strip() if commit else None, "diff": (commit and git("diff", "HEAD")) or None}
    except FileNotFoundError:
        return {"commit": None, "diff": None}


def holder(run_folder: Path) -> int | None:
    """Process that holds a run: its supervisor, or a trainer that outlived it; None when nobody does."""
    supervisor = locks.holder(run_folder / "lock")
    return locks.holder(run_folder / "train.lock") if supervisor is None else supervisor


def last_attempt(run_folder: Path) -> Path | None:
    """Folder of a run's newest attempt."""
    return max((run_folder / "attempts").glob("[0-9]*"), key=lambda path: int(path.name), default=None)


def exit_of(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended, None while it has not said."""
    path = attempt / "exit.json"
    return events.read_json(path) if path.exists() else None


def record_exit(attempt: Path, code: int, reason: str | None, message: str | None) -> dict[str, Any]:
    """Write how an attempt ended; a negative code is the signal that killed torchrun, reason None a finished run."""
    document = {
        "attempt": int(attempt.name),
        "time": time.time(),
        "code": max(code, 0),
        "signal": -code if code < 0 else None,
        "reason": reason,
        "message": message,
    }
    events.write_json(attempt / "exit.json", document)
    return document


def reap(attempt: Path) -> dict[str, Any]:
    """Record the end of an attempt whose supervisor did not: killed before it could, or without space to write to."""
    return record_exit(attempt, 1, "interrupted", "supervisor and trainer ended without a word: killed, or a full disk")
