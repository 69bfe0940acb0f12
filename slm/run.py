"""A run folder: its attempts, its state, and what users may do with it.

    HOME/<run_id>/plan.json                  the run; its folder's name is the hash of its content
    HOME/<run_id>/attempts/NNN/attempt.json  devices, micro-batch, host, versions
                               events.jsonl  written by the trainer
                               log           standard output and error of torchrun
                               exit.json     written by the supervisor
    HOME/<run_id>/checkpoints/               of an unfinished run
    HOME/<run_id>/done.json                  the result, and the only meaning of finished
    HOME/<run_id>/cancelled, retry.json      requests of `slm stop RUN` and `slm retry`
    HOME/<run_id>/lock, train.lock           held by the supervisor and by rank 0

State is derived from these files and the processes that hold the locks; nothing stores it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from slm.files import lock_holder, read_json, write_json
from slm.hardware.slot import MicroBatch, Slot

if TYPE_CHECKING:  # a supervisor loads this file
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
"""States of a run.

`interrupted` will resume, `diverged` is a result, `cancelled` waits for `slm retry`.
"""
CANCELLED = ("cancelled", "stopped by `slm stop`; `slm retry` lets a sweep train it again")
"""Reason and message of a run that `slm stop RUN` cancelled."""
IMPORTED_ID = re.compile("x[0-9a-f]{1,11}")
"""run_id of a run that was imported, or its first digits."""


class AttemptDocument(TypedDict):
    """attempt.json: the devices, settings and code of one attempt."""

    attempt: int
    created: float
    """Unix seconds."""
    device: str
    device_name: str
    ranks: int
    threads: int
    ids: NotRequired[list[str]]
    nodes: NotRequired[int]
    memory: NotRequired[int | None]
    micro_batch: int
    evaluation_tokens: int
    checkpoint_seconds: float
    estimated_seconds: NotRequired[float | None]
    """Run time of the whole run that was expected."""
    core: NotRequired[dict[str, Any] | None]
    """CORE request: bundle (an id), every (steps), max_per_task and without (tasks)."""
    host: str
    platform: str
    python: str
    versions: dict[str, str]
    commit: str | None
    diff: str | None
    data_folder: str
    compiled_folder: str
    launcher: str


class ExitDocument(TypedDict):
    """exit.json: how an attempt ended."""

    attempt: int
    time: float
    """Unix seconds."""
    code: int
    """Exit code of torchrun; 0 if a signal killed it."""
    signal: int | None
    reason: str | None
    """events.REASONS; None for a finished run."""
    message: str | None


class DoneDocument(TypedDict):
    """done.json: the result of a finished run."""

    run_id: str
    attempt: int
    time: float
    """Unix seconds."""
    step: int
    tokens: int
    flops: float
    train_seconds: float
    wall_seconds: float
    val_bpb: float
    val_loss: float
    train_loss: float
    core: float | None
    tokens_per_second: float
    flops_per_second: float
    peak_memory_bytes: int
    parameters_total: int
    weights: str
    weights_sha256: str


@dataclass(frozen=True)
class RunState:
    """State of a run, and why it is not finished."""

    status: str
    reason: str | None = None
    """Reason of the newest attempt's end, one of events.REASONS."""
    message: str | None = None


# Finding runs


def list_runs(home: Path, experiment: str | None = None) -> list[Path]:
    """Return the run folders of a home, or of one experiment in its order.

    Raises ValueError if there is no such home or experiment.
    """
    if not home.is_dir():
        raise ValueError(f"{home}: no such folder; `slm sweep` makes it, SLM_HOME names another")
    if experiment is None:
        return _run_folders(home)
    declared = {path.stem: path for path in sorted(home.glob("experiments/*.json"))}
    if experiment not in declared:
        names = ", ".join(declared) or "none"
        raise ValueError(f"no experiment {experiment!r}; there are {names}")
    folders = [home / run_id for run_id in read_json(declared[experiment])["runs"]]
    return [folder for folder in folders if (folder / "plan.json").exists()]


def _run_folders(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.glob("*/plan.json"))


def find_run(home: Path, run: str) -> Path:
    """Return the folder of the run whose run_id starts with `run`.

    Raises ValueError unless exactly one does.
    """
    matches = [path.parent for path in home.glob(f"{run}*/plan.json")] if run.isalnum() else []
    if not matches and IMPORTED_ID.fullmatch(run):
        raise ValueError(
            f"run {run!r} is imported, without weights and log: "
            "`slm query` reads its row of `results`"
        )
    if len(matches) != 1:
        number = len(matches) or "none"
        raise ValueError(f"run {run!r}: {number} in {home}; `slm status` lists them")
    return matches[0]


def plans(home: Path) -> list[Plan]:
    """Return the plans of a home that this version can read, by run_id."""
    return read_plans(_run_folders(home))[0]


def read_plans(run_folders: Iterable[Path]) -> tuple[list[Plan], list[str]]:
    """Return the plans of run folders, and one error message for each that cannot be read."""
    from slm.plan import Plan

    readable = []
    problems = []
    for folder in run_folders:
        try:
            readable.append(Plan.read(folder / "plan.json"))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return readable, problems


def unfinished_plans(home: Path) -> list[Plan]:
    """Return the plans of a home's runs that are not finished."""
    return [plan for plan in plans(home) if not is_done(home / plan.run_id)]


def run_label(plan: Mapping[str, Any]) -> str:
    """Return the name of a run for people, from its plan's document: "pocket d4 seed 0".

    Raises KeyError or TypeError if the document is no plan.
    """
    label = f"{plan['recipe']} d{plan['hyperparameters']['depth']}"
    if plan["horizon"] != "compute-optimal":
        label += f" {plan['horizon']}"
    return f"{label} seed {plan['seed']}"


# Attempts


def make_attempt(
    plan: Plan,
    home: Path,
    data_folder: Path,
    slot: Slot,
    micro_batch: MicroBatch,
    *,
    launcher: str = "local",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    estimated_seconds: float | None = None,
    core: dict[str, Any] | None = None,
) -> Path:
    """Create the folder of a run's next attempt, with its attempt.json.

    `core` is the CORE request of the trainer (`AttemptDocument.core`); None for val_bpb alone.
    """
    from importlib.metadata import version

    document = asdict(slot) | {
        "created": time.time(),
        "ranks": slot.ranks_of(plan.hyperparameters),
        "micro_batch": micro_batch.training,
        "evaluation_tokens": micro_batch.evaluation_tokens,
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


def add_attempt(run_folder: Path, document: Mapping[str, Any]) -> Path:
    """Create the next attempt of a run with this attempt.json, numbered.

    The folder is renamed into place, so that no attempt lacks its attempt.json.
    """
    attempts = run_folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = _last_number(run_folder) + 1
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=attempts))
    try:
        write_json(temporary / "attempt.json", {**document, "attempt": number})
        return temporary.rename(attempts / f"{number:03d}")
    except OSError:
        shutil.rmtree(temporary)
        raise


def code_provenance() -> dict[str, str | None]:
    """Return commit and uncommitted changes of the running code; None where git tracks none."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout if result.returncode == 0 else None

    commit = None
    with suppress(FileNotFoundError):  # git is not installed
        if git("ls-files", "--error-unmatch", "recipe.py") is not None:
            commit = git("rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "diff": None}
    return {"commit": commit.strip(), "diff": git("diff", "HEAD") or None}


def list_attempts(run_folder: Path) -> list[Path]:
    """Return the folders of a run's attempts, oldest first."""
    return sorted((run_folder / "attempts").glob("[0-9]*"), key=lambda path: int(path.name))


def last_attempt(run_folder: Path) -> Path | None:
    """Return the folder of a run's newest attempt."""
    return next(reversed(list_attempts(run_folder)), None)


def _last_number(run_folder: Path) -> int:
    attempt = last_attempt(run_folder)
    return int(attempt.name) if attempt else 0


def read_attempt(attempt: Path) -> AttemptDocument:
    """Read attempt.json. Raises ValueError if it is not JSON."""
    document: AttemptDocument = read_json(attempt / "attempt.json")
    return document


def attempt_slot(attempt: Path) -> Slot:
    """Return the slot of an attempt."""
    document = read_attempt(attempt)
    fields = {name: value for name, value in document.items() if name in Slot.__dataclass_fields__}
    return Slot(**fields | {"ids": tuple(document.get("ids", ()))})  # type: ignore[arg-type]


def read_log(attempt: Path) -> list[str]:
    """Return the lines that torchrun and the trainers printed."""
    path = attempt / "log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def read_exit(attempt: Path) -> ExitDocument | None:
    """Return how an attempt ended; None without an exit.json."""
    path = attempt / "exit.json"
    return read_json(path) if path.exists() else None


def record_exit(attempt: Path, code: int, reason: str | None, message: str | None) -> ExitDocument:
    """Write exit.json.

    A negative code is the signal that killed torchrun; reason None means a finished run.
    """
    document: ExitDocument = {
        "attempt": int(attempt.name),
        "time": time.time(),
        "code": max(code, 0),
        "signal": -code if code < 0 else None,
        "reason": reason,
        "message": message,
    }
    write_json(attempt / "exit.json", document)
    return document


def checkpoint_step(run_folder: Path) -> int:
    """Return the step of a run's newest checkpoint, read from its file name; 0 without one."""
    names = [path.name for path in (run_folder / "checkpoints").glob("step-*.safetensors")]
    return max((int(name[5:14]) for name in names), default=0)


# State


def is_done(run_folder: Path) -> bool:
    """Whether a run is finished: it has a done.json."""
    return (run_folder / "done.json").exists()


def is_cancelled(run_folder: Path) -> bool:
    """Whether a run was cancelled by `slm stop RUN` and not retried since."""
    return (run_folder / "cancelled").exists()


def retry_requested(run_folder: Path) -> bool:
    """Whether `slm retry` was called since the run's newest attempt began."""
    path = run_folder / "retry.json"
    return path.exists() and int(read_json(path)["attempt"]) >= _last_number(run_folder)


def run_holder(run_folder: Path) -> int | None:
    """Return the process that holds a run: its supervisor, or a trainer that outlived it."""
    return lock_holder(run_folder / "lock") or lock_holder(run_folder / "train.lock")


def is_on_this_machine(run_folder: Path) -> bool:
    """Whether the newest attempt runs here, so that its lock names a process of this machine."""
    attempt = last_attempt(run_folder)
    if attempt is None:
        return False
    document = read_attempt(attempt)
    return (document.get("launcher"), document.get("host")) == ("local", socket.gethostname())


def other_host(run_folder: Path) -> str | None:
    """Return the host that holds a run, if it is another machine without Slurm."""
    attempt = last_attempt(run_folder)
    if attempt is None or read_exit(attempt) or is_done(run_folder):
        return None
    document = read_attempt(attempt)
    is_elsewhere = document["launcher"] == "local" and document.get("host") != socket.gethostname()
    return document["host"] if is_elsewhere and run_holder(run_folder) else None


def run_state(run_folder: Path, job: str | None = None) -> RunState:
    """Derive the state of a run from its files and locks.

    `job` is the state of its Slurm job: "queued", "running", or None without one.
    """
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
    reason = ended["reason"]
    status = reason if reason in ("interrupted", "diverged", "cancelled") else "failed"
    return RunState(status, reason, ended["message"])


# Requests


def cancel_run(run_folder: Path) -> None:
    """Stop a run, and let no sweep train it until `retry_run`."""
    (run_folder / "cancelled").touch()
    stop_run(run_folder)


def stop_run(run_folder: Path, at_once: bool = False) -> None:
    """Tell the process that holds a run here to checkpoint and exit, or to exit at once."""
    process = run_holder(run_folder)
    if process is not None and is_on_this_machine(run_folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGINT if at_once else signal.SIGTERM)


def retry_run(run_folder: Path) -> None:
    """Clear a run's failures and its cancellation, so that the next sweep trains it again."""
    (run_folder / "cancelled").unlink(missing_ok=True)
    write_json(run_folder / "retry.json", {"attempt": _last_number(run_folder)})


def run_sizes(run_folder: Path) -> dict[str, int]:
    """Return the bytes of a run's weights, checkpoints and records (all its other files)."""
    sizes = {"weights": 0, "checkpoints": 0, "records": 0}
    parts = {"model.safetensors": "weights", "checkpoints": "checkpoints"}
    for path in run_folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(run_folder).parts[0]
            sizes[parts.get(top, "records")] += path.stat().st_size
    return sizes


def remove_run(run_folder: Path) -> None:
    """Remove a run folder. plan.json goes first: what an interrupted removal leaves is no run."""
    (run_folder / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(run_folder)


def remove_weights(run_folder: Path) -> None:
    """Remove the weights and checkpoints of a run."""
    (run_folder / "model.safetensors").unlink(missing_ok=True)
    remove_checkpoints(run_folder)


def remove_checkpoints(run_folder: Path) -> None:
    """Remove the checkpoints of a run."""
    for path in (run_folder / "checkpoints").glob("*"):
        path.unlink()
