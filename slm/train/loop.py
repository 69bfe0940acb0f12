"""The training loop: gradients, update, log, checkpoint, CORE, stop, step by step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.data.loader import Pair
from slm.train.attempt import AttemptEnded
from slm.train.core_callback import CoreCallback
from slm.train.optimizer import lr_multiplier
from slm.train.progress import Progress
from slm.train.resume import Checkpointer
from slm.train.session import Session

TRAIN_EVENTS = 1000
"""Maximum `train` events of a run, about: its steps are logged evenly spaced."""
TAIL_SHARE = 0.1
"""Share of the steps, the last ones, whose mean loss is train_loss."""


@dataclass(frozen=True)
class StepResult:
    """Numbers that the ranks agreed on at a step, on their way to the host."""

    step: int
    """Steps done, this one included."""
    numbers: Tensor
    """Loss, ranks with a stop request, whether a checkpoint is due; gradient norm and update size
    where the step is logged."""
    ready: torch.cuda.Event | None
    """Recorded when the numbers have arrived; None if they are on the host already."""


@dataclass
class TrainingLoop:
    """Trains a session from the step that its progress has reached to the last one."""

    session: Session
    progress: Progress
    checkpointer: Checkpointer
    core: CoreCallback

    def __post_init__(self) -> None:
        self._token_share = 1 / self.session.hp.batch_tokens
        # In float16 the gradients of the mean loss would underflow: the sum's are computed, and
        # scaled in float32.
        is_float16 = self.session.model.dtype == torch.float16
        self._loss_scale = 1.0 if is_float16 else self._token_share
        self._gradient_scale = self._token_share if is_float16 else 1.0
        self._step_start = time.monotonic()

    def run(self) -> None:
        """Train every step that is left."""
        session = self.session
        progress = self.progress
        checkpointer = self.checkpointer
        steps = session.hp.steps
        first_step = progress.step
        pending: StepResult | None = None
        # 1) measure CORE of the checkpoint, if the last attempt was stopped before it could
        if self.core.is_due():
            self.core.measure(checkpointer.last_good)
        self._step_start = time.monotonic()
        while progress.step < steps:
            session.attempt.exit_if_orphaned()
            # 2) compute gradients and update the parameters
            result = self._step(progress.step)
            progress.step += 1
            # 3) log the step. Step metrics are copied to the host while the next step runs, so the
            #    GPU never idles: the step before is logged then.
            arrived = pending if session.is_deferred else result
            pending = result if session.is_deferred else None
            stop, save = self._record(arrived) if arrived else (False, False)
            # 4) continue, unless the ranks agreed to stop or to write a checkpoint, or CORE is due
            core_due = self.core.is_due()
            if progress.step == steps or not (stop or save or core_due):
                continue
            # 5) a checkpoint contains this step too: log it first
            if pending:
                stop |= self._record(pending)[0]
                pending = None
            checkpointer.save()
            if stop:
                session.attempt.interrupt(f"stopped on request at step {progress.step} of {steps}")
            if core_due:
                self.core.measure(checkpointer.last_good)
            self._step_start = time.monotonic()
        if pending:
            self._record(pending)
        # 6) CORE takes long: do not lose the last steps if the attempt ends within it
        if self.core.request and progress.step > first_step:
            checkpointer.save()

    def _step(self, step: int) -> StepResult:
        """Compute gradients of the mean loss over the step's rows, and update from them."""
        session = self.session
        optimizer = session.optimizer
        size = session.settings["micro_batch"]
        hp = session.hp
        indices = session.data.order.step(step, hp.batch_rows)
        rows = session.attempt.ranks.share(indices)
        optimizer.zero_grad()
        status = optimizer.status
        for start in range(0, len(rows), size):
            ids, targets = self._to_device(session.data.train.pair(rows[start : start + size]))
            loss = session.loss(ids, targets)
            loss.backward(torch.full_like(loss, self._loss_scale))
            status[0] += loss.detach() * self._token_share
        status[1].fill_(session.attempt.stop_requested)
        status[2].fill_(self.checkpointer.is_due())
        done = step + 1
        is_logged = done % max(1, hp.steps // TRAIN_EVENTS) == 0 or done == hp.steps
        measures = optimizer.step(step, self._gradient_scale, is_logged)
        numbers = status.clone() if measures is None else torch.cat([status, measures])
        if session.device.type != "cuda":
            return StepResult(done, numbers, None)
        on_host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return StepResult(done, on_host, ready)

    def _to_device(self, pair: Pair) -> Pair:
        """Copy inputs and targets to the model's device, without waiting for its computation."""
        device = self.session.device
        ids, targets = pair
        if device.type == "cuda":
            ids = ids.contiguous().pin_memory()
            targets = targets.contiguous().pin_memory()
        return ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def _record(self, result: StepResult) -> tuple[bool, bool]:
        """Count and log a step; return whether the ranks stop, and whether a checkpoint is due.

        Raises AttemptEnded for a loss that is not finite.
        """
        if result.ready:
            result.ready.synchronize()
        now = time.monotonic()
        loss, stops, checkpoints, *measures = result.numbers.tolist()
        seconds = now - self._step_start
        self._step_start = now
        self.progress.train_seconds += seconds
        hp = self.session.hp
        if result.step > hp.steps - tail_steps(hp.steps):
            self.progress.tail_loss += loss
        is_finite = math.isfinite(loss)
        if measures or not is_finite:
            gradient_norm, update_size = measures or (None, None)
            self.session.attempt.event(
                "train",
                **self.session.totals(result.step),
                loss=loss,
                lr=lr_multiplier(hp, result.step - 1),
                gradient_norm=gradient_norm,
                update_size=update_size,
                tokens_per_second=hp.batch_tokens / seconds,
                train_seconds=self.progress.train_seconds,
                memory_bytes=self.session.peak_memory(),
            )
        if not is_finite:
            raise AttemptEnded("diverged", f"loss is {loss} at step {result.step}")
        return stops > 0, checkpoints > 0


def tail_steps(steps: int) -> int:
    """Return how many of a run's last steps train_loss averages."""
    return max(1, round(TAIL_SHARE * steps))
