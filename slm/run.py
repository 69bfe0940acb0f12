"""Plans -> attempts: their folders, where they run, how they are and how they ended.

`local.py` and `slurm.py` start them, `supervisor.py` sees each to its end.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.files import lock_holder, read_json, write_json
from slm.hardware.slot import Slot

if TYPE_CHECKING:  # every supervisor loads this file
    from slm.hardware.slot import MicroBatch
    from slm.plan import Plan

CHECKPOINT_SECONDS = 20.0
"""Shortest time between two checkpoints."""
STATES = (
    "planned",
    "queued",
    "running",
    "finished",
    "failed",
    "interrupted",
    "diverged",
    "cancelled",
)
"""What a run can be. `interrupted` will go on; `diverged` is a result; `cancelled` waits for `slm retry`."""


CANCELLED = ("cancelled", "stopped as asked; `slm retry` lets a sweep train it again")
"""Reason and message of a run of which `slm stop` was said."""


@dataclass(frozen=True)
class RunState:
    """How a run is."""

    status: str
    """One of STATES."""
    reason: str | None = None
    """Why its newest attempt ended without finishing: one of events.REASONS."""
    message: str | None = None
    """The reason in words."""


def make_attempt(
    plan: Plan,
    home: Path,
    data_folder: Path,
    where: Slot,
    rows: MicroBatch,
    launcher: str = "local",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    estimated_seconds: float | None = None,
    core: dict[str, Any] | None = None,
) -> Path:
    """The next attempt's folder with its attempt.json, made under another name and renamed.

    `core` is what the trainer measures beside val_bpb: bundle (an id), every (steps), max_per_task and without (tasks).
    """
    from importlib.metadata import version

    document = asdict(where) | {
        "created": time.time(),
        "ranks": where.ranks_of(plan.hyperparameters),
        "micro_batch": rows.training,
        "evaluation_tokens": rows.evaluation_tokens,
        "checkpoint_seconds": checkpoint_seconds,
        "estimated_seconds": estimated_seconds,
        "core": core,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("slm", "torch", "numpy")},
        **code_provenance(),
        "data_folder": str(data_folder.resolve()),
        "compiled_folder": str((home / "compiled").resolve()),
        "launcher": launcher,
    }
    return add_attempt(home / plan.run_id, document)


def add_attempt(run_folder: Path, document: dict[str, Any]) -> Path:
    """A new attempt of a run with this attempt.json, under the next number."""
    attempts = run_folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    last = last_attempt(run_folder)
    number = 1 + (int(last.name) if last else 0)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=attempts))
    try:
        write_json(unfinished / "attempt.json", {"attempt": number, **document})
        return unfinished.rename(attempts / f"{number:03d}")
    except OSError:
        shutil.rmtree(unfinished)
        raise


def code_provenance() -> dict[str, Any]:
    """Commit and uncommitted changes of the code that runs, null where it is not a checkout's own."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout if result.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", "recipe.py") is None:
            return {"commit": None, "diff": None}
        commit = git("rev-parse", "HEAD")
        return {
            "commit": commit.strip() if commit else None,
            "diff": (commit and git("diff", "HEAD")) or None,
        }
    except FileNotFoundError:
        return {"commit": None, "diff": None}


def run_holder(run_folder: Path) -> int | None:
    """Process that holds a run: its supervisor, or a trainer that outlived it; None when nobody does."""
    supervisor = lock_holder(run_folder / "lock")
    return lock_holder(run_folder / "train.lock") if supervisor is None else supervisor


def list_attempts(run_folder: Path) -> list[Path]:
    """Folders of a run's attempts, oldest first."""
    return sorted((run_folder / "attempts").glob("[0-9]*"), key=lambda path: int(path.name))


def last_attempt(run_folder: Path) -> Path | None:
    """Folder of a run's newest attempt."""
    return next(reversed(list_attempts(run_folder)), None)


def read_exit(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended, None while it has not said."""
    path = attempt / "exit.json"
    return read_json(path) if path.exists() else None


def record_exit(
    attempt: Path, code: int, reason: str | None, message: str | None
) -> dict[str, Any]:
    """Write how an attempt ended; a negative code is the signal that killed torchrun, reason None a finished run."""
    document = {
        "attempt": int(attempt.name),
        "time": time.time(),
        "code": max(code, 0),
        "signal": -code if code < 0 else None,
        "reason": reason,
        "message": message,
    }
    write_json(attempt / "exit.json", document)
    return document


def is_done(run_folder: Path) -> bool:
    """Whether a run is finished: done.json alone says so."""
    return (run_folder / "done.json").exists()


def is_cancelled(run_folder: Path) -> bool:
    """Whether `slm stop` was said of a run, and `slm retry` not since."""
    return (run_folder / "cancelled").exists()


def cancel_run(run_folder: Path) -> None:
    """Let no sweep train a run until `retry`. Whoever holds it is asked to checkpoint and end."""
    (run_folder / "cancelled").touch()
    stop_run(run_folder)


def retry_run(run_folder: Path) -> None:
    """Forgive a run its ends so far: a sweep trains it again."""
    (run_folder / "cancelled").unlink(missing_ok=True)
    last = last_attempt(run_folder)
    write_json(run_folder / "retry.json", {"attempt": int(last.name) if last else 0})


def retry_requested(run_folder: Path) -> bool:
    """Whether `slm retry` was said of a run since its newest attempt began."""
    path, last = run_folder / "retry.json", last_attempt(run_folder)
    return path.exists() and int(read_json(path)["attempt"]) >= (int(last.name) if last else 0)


def run_state(run_folder: Path, job: str | None = None) -> RunState:
    """How a run is, by its files, its locks, and what a cluster says of its job: "queued", "running" or None."""
    if is_done(run_folder):
        return RunState("finished")
    attempt = last_attempt(run_folder)
    ended = read_exit(attempt) if attempt else None
    if attempt and not ended and (job == "running" or run_holder(run_folder)):
        return RunState("running")
    if job:
        return RunState("queued")
    if is_cancelled(run_folder):
        return RunState("cancelled", *CANCELLED)
    if attempt is None:
        return RunState("planned")
    if ended is None or retry_requested(run_folder):
        return RunState("interrupted")
    status = (
        ended["reason"] if ended["reason"] in ("interrupted", "diverged", "cancelled") else "failed"
    )
    return RunState(status, ended["reason"], ended["message"])


def stop_run(run_folder: Path, at_once: bool = False) -> None:
    """Ask whoever holds a run on this machine to checkpoint and end, or to end at once; nothing where nobody does."""
    process = run_holder(run_folder)
    if process is not None and is_on_this_machine(run_folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGINT if at_once else signal.SIGTERM)


def is_on_this_machine(run_folder: Path) -> bool:
    """Whether a run's newest attempt is of this machine, where the number in its lock means its process."""
    attempt = last_attempt(run_folder)
    document = read_attempt(attempt) if attempt else {}
    return (document.get("launcher"), document.get("host")) == ("local", socket.gethostname())


def checkpoint_step(run_folder: Path) -> int:
    """Steps done at a run's newest checkpoint, by its name; 0 without one."""
    names = [path.name for path in (run_folder / "checkpoints").glob("step-*.safetensors")]
    return max((int(name[5:14]) for name in names), default=0)


def read_attempt(attempt: Path) -> dict[str, Any]:
    """What attempt.json says."""
    document: dict[str, Any] = read_json(attempt / "attempt.json")
    return document


def attempt_slot(attempt: Path) -> Slot:
    """The slot of an attempt."""
    document = read_attempt(attempt)
    known = {name: document[name] for name in Slot.__dataclass_fields__ if name in document}
    return Slot(**known | {"ids": tuple(known.get("ids", ()))})
