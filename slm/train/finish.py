"""Results of a finished run: final weights and done.json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm import events
from slm.files import write_json
from slm.model import checkpoints
from slm.model.weights import FINAL
from slm.run import DoneDocument, remove_checkpoints
from slm.train.attempt import AttemptEnded
from slm.train.loop import tail_steps
from slm.train.progress import Progress
from slm.train.session import Session


def save_weights(session: Session) -> str:
    """Write the final weights; return the file's SHA-256. Raises AttemptEnded if it cannot."""
    path = session.attempt.run_folder / FINAL
    with _required(path):
        return checkpoints.save(path, session.parameters(), {"run_id": session.plan.run_id})


def done_document(
    session: Session, progress: Progress, val_bpb: float, val_loss: float, digest: str
) -> DoneDocument:
    """Return done.json, but for CORE, which is measured on the final weights."""
    hp = session.hp
    return {
        "run_id": session.plan.run_id,
        "attempt": session.settings["attempt"],
        "time": time.time(),
        "step": progress.step,
        "tokens": hp.tokens,
        "flops": hp.flops,
        "train_seconds": progress.train_seconds,
        "wall_seconds": progress.wall_seconds,
        "val_bpb": val_bpb,
        "val_loss": val_loss,
        "train_loss": progress.tail_loss / tail_steps(hp.steps),
        "core": None,
        "tokens_per_second": hp.tokens / progress.train_seconds,
        "flops_per_second": hp.flops / progress.train_seconds,
        "peak_memory_bytes": session.peak_memory(),
        "parameters_total": hp.parameters.total,
        "weights": FINAL,
        "weights_sha256": digest,
    }


def finish(session: Session, done: DoneDocument) -> None:
    """Write done.json, remove the checkpoints, whose space the last event may need, and write it.

    Raises AttemptEnded if done.json cannot be written.
    """
    run_folder = session.attempt.run_folder
    path = run_folder / "done.json"
    with _required(path):
        write_json(path, done | {"time": time.time()})
    remove_checkpoints(run_folder)
    fields = {name: value for name, value in done.items() if name in events.FIELDS["finished"]}
    session.attempt.event("finished", **fields)


@contextmanager
def _required(path: Path) -> Iterator[None]:
    """Write a file without which the run is not finished."""
    try:
        yield
    except OSError as error:
        raise AttemptEnded(
            "error",
            f"{path} could not be written ({error.strerror}): free some space and sweep again to "
            "resume from the last checkpoint",
        ) from error
