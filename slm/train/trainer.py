"""The trainer: `torchrun -m slm.train ATTEMPT_FOLDER`. It has no configuration but the plan.

Reads `../../plan.json` and `attempt.json` (devices, ranks, threads, micro-batch, data folder),
resumes from the newest checkpoint of the run, appends to `events.jsonl`, and writes
`model.safetensors` and `done.json` into the run's folder at the end.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from slm.evaluate.bpb import validation_loss
from slm.evaluate.core import out_of_memory
from slm.files import hold_lock
from slm.model.ranks import Ranks
from slm.model.weights import FINAL
from slm.train.attempt import Attempt, AttemptEnded
from slm.train.core_callback import CoreCallback
from slm.train.finish import done_document, finish, save_weights
from slm.train.loop import TrainingLoop
from slm.train.progress import Progress, WallClock
from slm.train.resume import Checkpointer
from slm.train.session import Session, setup


def train(attempt: Attempt, deferred: bool = False) -> None:
    """Train an attempt's run to its last step, evaluate it, and write the results.

    `deferred` reads the results of a step while the next one runs, as on a GPU. Raises AttemptEnded
    where the attempt ends before its run is finished.
    """
    progress = Progress()
    clock = WallClock(progress)
    # 1) read the plan, load the rows, build model and optimiser
    session = setup(attempt, deferred)
    # 2) resume from the newest good checkpoint
    checkpointer = Checkpointer(session, progress, clock)
    damaged = checkpointer.resume()
    core = CoreCallback(session, progress, clock)
    loop = TrainingLoop(session, progress, checkpointer, core)
    gc.freeze()  # everything loaded so far stays: garbage collections need not look at it
    _announce(session, progress.step, damaged)
    # 3) train
    loop.run()
    # 4) evaluate
    val_bpb, val_loss = _evaluate(session, progress.step)
    if not math.isfinite(val_bpb):
        raise AttemptEnded("diverged", f"val_bpb is {val_bpb} after step {progress.step}")
    # 5) write the final weights before CORE, which may be stopped; done.json says that all is done
    clock.count()
    done = None
    if attempt.ranks.is_first:
        digest = save_weights(session)
        done = done_document(session, progress, val_bpb, val_loss, digest)
    core_value = core.measure(attempt.run_folder / FINAL) if core.request else None
    if done:
        done["core"] = core_value
        finish(session, done)


def _announce(session: Session, step: int, damaged: list[str]) -> None:
    event = session.attempt.event
    event(
        "started",
        step=step,
        resumed_from=step or None,
        device=session.settings["device"],
        ranks=session.attempt.ranks.world_size,
        threads=torch.get_num_threads(),
        micro_batch=session.settings["micro_batch"],
        attention=session.attention,
        compiled=session.is_compiled,
    )
    for message in damaged:
        event("warning", step=step, message=message)
    if session.is_compiled:
        event("working", step=step, what="compilation", share=None)


def _evaluate(session: Session, step: int) -> tuple[float, float]:
    """Return val_bpb and the loss over the plan's validation rows, and write them as an event."""
    started = time.perf_counter()
    attempt = session.attempt
    rows = session.data.validation
    rank_rows = len(rows) / attempt.ranks.world_size

    def report(done: int) -> None:
        attempt.heartbeat(step, "evaluation", min(1.0, done / rank_rows))

    report(0)
    val_bpb, val_loss = validation_loss(
        session.model,
        rows,
        session.data.token_bytes,
        attempt.ranks,
        session.settings["evaluation_tokens"],
        report,
    )
    attempt.event(
        "eval",
        **session.totals(step),
        val_bpb=val_bpb,
        val_loss=val_loss,
        rows=len(rows),
        seconds=time.perf_counter() - started,
    )
    return val_bpb, val_loss


def main() -> int:
    """Train one attempt.

    Return 0 if the run is finished, else 1 after a `failed` event that gives the reason.
    """
    folder = Path(sys.argv[1])
    ranks = Ranks.from_environment()
    attempt = Attempt(folder, ranks)
    # the lock lasts as long as this process
    lock = hold_lock(attempt.run_folder / "train.lock") if ranks.is_first else None
    if ranks.is_first and lock is None:
        sys.exit(f"{attempt.run_folder.name} is being trained by another attempt")
    try:
        train(attempt)
    except AttemptEnded as ended:
        attempt.event("failed", reason=ended.reason, message=str(ended))
        return 1
    except OSError as error:
        sys.exit(f"OSError: {error}")  # events cannot be written either
    except (MemoryError, RuntimeError) as error:
        if not (ranks.is_first and out_of_memory(error)):
            raise
        attempt.event("failed", reason="oom", message=str(error).splitlines()[0])
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
