"""Plans -> attempts: folders, devices and one supervisor each."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slm import devices, events
from slm.launch import locks
from slm.plan import Plan

CHECKPOINT_SECONDS = 20.0
"""Shortest time between two checkpoints."""


@dataclass(frozen=True)
class Slot:
    """What one run trains on; not identity."""

    device: str
    """"cpu" or "cuda"."""
    ranks: int
    """Processes, at most: one a GPU, or one a core."""
    threads: int
    """Threads a process."""


def slot(gpus: int | None = None, cores: int | None = None) -> Slot:
    """All GPUs found (or so many), else the CPU: a rank a core up to eight, the rest as threads.

    Raises ValueError for more GPUs or cores than there are.
    """
    found = devices.gpu_count()
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
    run_folder = home / plan.run_id
    attempts = run_folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in attempts.iterdir()), default=0)
    folder = attempts / f"{number:03d}"
    folder.mkdir()
    ranks = min(where.ranks, plan.hyperparameters.batch_rows)
    document = asdict(where) | {
        "attempt": number,
        "created": time.time(),
        "device_name": devices.name(where.device),
        "ranks": ranks,
        "micro_batch": _micro_batch(plan, where, ranks),
        "checkpoint_seconds": checkpoint_seconds,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slm", "torch", "numpy")},
        **provenance(),
        "data_folder": str(data_folder.resolve()),
        "launcher": "local",
    }
    events.write_json(folder / "attempt.json", document)
    environment = {**os.environ, "OMP_NUM_THREADS": str(where.threads)}
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


def _micro_batch(plan: Plan, where: Slot, ranks: int) -> int:
    """Rows of one forward pass of one rank: about 16,384 tokens, which fits everywhere."""
    rows = -(-plan.hyperparameters.batch_rows // ranks)
    return min(rows, max(1, 2**14 // plan.hyperparameters.sequence_length))


def provenance() -> dict[str, Any]:
    """Commit and uncommitted changes of the code that runs, null outside a checkout."""
    package = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout if result.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit.strip() if commit else None, "diff": (commit and git("diff", "HEAD")) or None}
    except FileNotFoundError:
        return {"commit": None, "diff": None}


def holder(run_folder: Path) -> int | None:
    """Process that holds a run: its supervisor, or a trainer that outlived it; None when nobody does."""
    return locks.holder(run_folder / "lock") or locks.holder(run_folder / "train.lock")


def last_attempt(run_folder: Path) -> Path | None:
    """Folder of a run's newest attempt."""
    return max((run_folder / "attempts").glob("[0-9]*"), default=None)


def exit_of(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended, None while it has not said."""
    path = attempt / "exit.json"
    return json.loads(path.read_text()) if path.exists() else None


def reap(attempt: Path) -> dict[str, Any]:
    """Record the end of an attempt whose supervisor was killed before it could."""
    document = {
        "attempt": int(attempt.name),
        "time": time.time(),
        "code": 1,
        "signal": None,
        "reason": "interrupted",
        "message": "supervisor and trainer were killed",
    }
    events.write_json(attempt / "exit.json", document)
    return document
