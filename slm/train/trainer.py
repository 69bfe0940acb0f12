"""The core trainer: `torchrun -m slm.train ATTEMPT_FOLDER`. A plan in, events out; no other configuration.

Reads `../../plan.json` and `attempt.json` (devices, ranks, threads, micro-batch, data folder), goes on from the newest
checkpoint of the run, appends `events.jsonl`, and ends with `model.safetensors` and `done.json` in the run's folder.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from slm import events
from slm.data.dataset import Prepared
from slm.data.loader import Order, Pair, Rows, share
from slm.evaluate.bpb import bytes_of, validation_loss
from slm.evaluate.core import Interrupted, out_of_memory
from slm.files import hold_lock, read_json, write_json
from slm.model import attention, checkpoints
from slm.model.gpt import GPT, compute_dtype
from slm.model.weights import FINAL
from slm.plan import Plan, code_fingerprint
from slm.train.core_callback import CoreCallback
from slm.train.optimizer import Optimizer, lr_multiplier

TRAIN_EVENTS = 1000
"""A run logs at most about this many steps, evenly spaced."""
TAIL_SHARE = 0.1
"""train_loss is the mean over this share of the steps, the last ones."""
TALK_SECONDS = 10.0
"""Pause between two words of an evaluation."""
COMPILED_FLOPS = {"cpu": 1e14, "cuda": 1e16}
"""FLOPs of a run from which compiling pays: it takes half a minute, and saves a CPU at most a fifth of the time."""


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps all of it."""

    step: int = 0
    """Steps done."""
    train_seconds: float = 0.0
    """Time spent in the steps that led here, over all attempts."""
    wall_seconds: float = 0.0
    """Time of the trainer at work on the way here, over all attempts."""
    tail_loss: float = 0.0
    """Sum of the losses of the steps that train_loss averages."""


class Stopped(Exception):
    """The attempt ends before its run does: `reason` is one of events.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        assert reason in events.REASONS
        self.reason = reason


@dataclass
class Told:
    """What the ranks told each other at a step, on its way to the host."""

    step: int
    """Steps done with it."""
    numbers: torch.Tensor
    """Loss, ranks that were asked to stop, whether a checkpoint is due, gradient norm and update size."""
    ready: torch.cuda.Event | None
    """When the numbers have arrived; None where they are already here."""


class Trainer:
    """One rank of one attempt."""

    def __init__(self, attempt_folder: Path) -> None:
        self.folder, self.run_folder = attempt_folder, attempt_folder.parent.parent
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.writer = events.Writer(attempt_folder / "events.jsonl") if self.rank == 0 else None
        self.progress = Progress()
        self.stop_asked = False
        self.parent = os.getppid()
        self.last_checkpoint = self.clock = self.step_clock = time.monotonic()
        self.checkpoint_cost = self.talked = 0.0
        self.told: Told | None = None
        self.lags = False
        """Whether what a step told is read while the next one runs."""

    def event(self, event: str, **fields: Any) -> None:
        """Write an event, on rank 0."""
        if self.writer:
            self.writer.write(event, **fields)

    def run(self) -> None:
        """Train to the plan's last step, evaluate, and write what is final."""
        signal.signal(signal.SIGTERM, self._ask_stop)
        self._read_plan()
        self._meet()
        self.device = self._device()
        self.lags |= self.device.type == "cuda"
        if code_fingerprint() != self.plan.code:
            raise Stopped(
                "data",
                "the trainer's sources changed after this run was planned: sweep again to plan anew",
            )
        self._load_data()
        self._load_model()
        self._train()
        val_bpb, val_loss = self._evaluate()
        if not math.isfinite(val_bpb):
            raise Stopped("diverged", f"val_bpb is {val_bpb} after step {self.progress.step}")
        done = self._final(val_bpb, val_loss) if self.rank == 0 else {}
        if self.beside.wanted:
            done["core"] = self._core(self.run_folder / FINAL)
        if self.rank == 0:
            self._finish(done)

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _read_plan(self) -> None:
        try:
            self.attempt = read_json(self.folder / "attempt.json")
            self.plan = Plan.read(self.run_folder / "plan.json")
        except (OSError, ValueError) as error:
            raise Stopped("data", f"the plan cannot be read: {error}") from error

    def _meet(self) -> None:
        """Join the other ranks before anything may be refused: a rank that ends early has the others killed."""
        if self.ranks > 1:
            on_gpus = self.attempt["device"] == "cuda" and torch.cuda.is_available()
            dist.init_process_group("nccl" if on_gpus else "gloo")
        if self.ranks > (rows := self.plan.hyperparameters.batch_rows):
            raise Stopped(
                "error", f"{self.ranks} ranks for a batch of {rows} rows: start {rows} at most"
            )

    def _device(self) -> torch.device:
        name = self.attempt["device"]
        here = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if not here.get(name):
            found = " or ".join(kind for kind, there in here.items() if there)
            raise Stopped("error", f"device {name!r} is not here: choose {found}")
        if name == "cpu":
            torch.set_num_threads(self.attempt["threads"])
        if name != "cuda":
            return torch.device(name)
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def _load_data(self) -> None:
        """Map the rows; refuse any that are not the plan's."""
        given, folder = self.plan.hyperparameters, Path(self.attempt["data_folder"])
        try:
            prepared = Prepared.read(folder)
            prepared.verify()
            if self.rank == 0:
                prepared.verify_content(given)
            self.tokenizer = prepared.tokenizer
            self.token_bytes = bytes_of(self.tokenizer, given.vocab_size, self.device)
        except (OSError, ValueError) as error:
            raise Stopped("data", f"the plan's data are gone or changed: {error}") from error
        if (
            replace(self.plan, data=prepared.identity(given, self.plan.data.rows)).run_id
            != self.plan.run_id
        ):
            raise Stopped("data", f"{folder} holds other rows than the plan was made for")
        self.rows, self.validation = Rows.of(prepared, "train"), Rows.of(prepared, "validation")
        blocks = prepared.blocks("train", self.plan.data.rows)
        self.order = Order([block.rows for block in blocks], self.plan.seed)

    def _load_model(self) -> None:
        """Fresh from the seed, or as the newest checkpoint left it."""
        self.model = GPT(self.plan.hyperparameters)
        self.model.initialise(self.plan.seed)
        self.model.to(self.device)
        self.model.set_compute_dtype(compute_dtype(self.device))
        self.optimizer = Optimizer(self.model, self.rank, self.ranks)
        # In float16 the gradients of the mean would vanish: those of the sum are taken, and scaled as float32.
        self.share = 1 / self.plan.hyperparameters.batch_tokens
        narrow = self.model.dtype == torch.float16
        self.loss_share, self.gradient_share = (1.0, self.share) if narrow else (self.share, 1.0)
        self.last_good, damaged = self._newest_checkpoint()
        if self.last_good:
            self._resume(self.last_good)
        kernel, compiled = (
            attention.kernel(self.device, self.model.dtype),
            compiles(self.plan, self.device),
        )
        self.loss = (
            torch.compile(self.model.loss, fullgraph=True, dynamic=False)
            if compiled
            else self.model.loss
        )
        self.beside = self._beside()
        gc.freeze()  # what is loaded stays: collections need not look at it
        self.event(
            "started",
            step=self.progress.step,
            resumed_from=self.progress.step or None,
            device=self.attempt["device"],
            ranks=self.ranks,
            threads=torch.get_num_threads(),
            micro_batch=self.attempt["micro_batch"],
            attention=kernel,
            compiled=compiled,
        )
        for message in damaged:
            self.event("warning", step=self.progress.step, message=message)
        if compiled:
            self.event("working", step=self.progress.step, what="compilation", share=None)

    def _train(self) -> None:
        """Every step that is left. What one told is read from a GPU while the next one runs, so that it never waits.

        The last one is kept in a checkpoint where CORE is asked, which takes long.
        """
        first = self.progress.step
        if self.beside.due(first):
            self._core(self.last_good)
        self.step_clock = time.monotonic()
        while self.progress.step < self.plan.hyperparameters.steps:
            if os.getppid() != self.parent:
                sys.exit("torchrun is gone")
            before, self.told = self.told, self._step(self.progress.step)
            self.progress.step += 1
            if not self.lags:
                before, self.told = self.told, None
            self._settle(before)
        if self.told:
            self._note(self.told)
        if self.beside.wanted and self.progress.step > first:
            self._checkpoint()

    def _step(self, step: int) -> Told:
        """Gradients of the mean loss over the step's rows, and one update from them."""
        given = self.plan.hyperparameters
        mine = share(self.order.step(step, given.batch_rows), self.rank, self.ranks)
        self.optimizer.zero_grad()
        status = self.optimizer.status
        for start in range(0, len(mine), self.attempt["micro_batch"]):
            ids, targets = self._on_device(
                self.rows.pair(mine[start : start + self.attempt["micro_batch"]])
            )
            loss = self.loss(ids, targets)
            loss.backward(torch.full_like(loss, self.loss_share))
            status[0] += loss.detach() * self.share
        status[1].fill_(self.stop_asked)
        status[2].fill_(self.rank == 0 and self._checkpoint_due())
        measures = self.optimizer.step(step, self.gradient_share, measured=self._logged(step + 1))
        numbers = status.clone() if measures is None else torch.cat([status, measures])
        if self.device.type != "cuda":
            return Told(step + 1, numbers, None)
        there, ready = (
            torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True),
            torch.cuda.Event(),
        )
        ready.record()
        return Told(step + 1, there, ready)

    def _on_device(self, pair: Pair) -> Pair:
        """Inputs and targets where the model is, without waiting for what it does."""
        if self.device.type == "cuda":
            pair = (pair[0].contiguous().pin_memory(), pair[1].contiguous().pin_memory())
        return pair[0].to(self.device, non_blocking=True), pair[1].to(
            self.device, non_blocking=True
        )

    def _logged(self, step: int) -> bool:
        steps = self.plan.hyperparameters.steps
        return step % max(1, steps // TRAIN_EVENTS) == 0 or step == steps

    def _settle(self, told: Told | None) -> None:
        """Take note of a step, and checkpoint, measure CORE or stop where the ranks agreed to."""
        steps = self.plan.hyperparameters.steps
        stop, checkpoint = self._note(told) if told else (False, False)
        due = self.beside.due(self.progress.step)
        if not (stop or checkpoint or due) or self.progress.step == steps:
            return
        if self.told:
            later, self.told = self.told, None
            stop |= self._note(later)[0]
        self._checkpoint()
        if stop:
            self._stop(f"stopped at step {self.progress.step} of {steps}, as asked")
        if due:
            self._core(self.last_good)
        self.step_clock = time.monotonic()

    def _stop(self, message: str) -> NoReturn:
        if self.ranks > 1:
            dist.barrier()
        raise Stopped("interrupted", message)

    def _note(self, told: Told) -> tuple[bool, bool]:
        """Count and log a step; whether any rank was asked to stop, and whether a checkpoint is due."""
        if told.ready:
            told.ready.synchronize()
        given, now = self.plan.hyperparameters, time.monotonic()
        loss, stop, checkpoint, *measures = told.numbers.tolist()
        seconds, self.step_clock = now - self.step_clock, now
        self.progress.train_seconds += seconds
        if told.step > given.steps - self._tail_steps():
            self.progress.tail_loss += loss
        if measures or not math.isfinite(loss):
            self._log_step(told.step, loss, seconds, measures)
        if not math.isfinite(loss):
            raise Stopped("diverged", f"loss is {loss} at step {told.step}")
        return stop > 0, checkpoint > 0

    def _tail_steps(self) -> int:
        return max(1, round(TAIL_SHARE * self.plan.hyperparameters.steps))

    def _log_step(self, step: int, loss: float, seconds: float, measures: list[float]) -> None:
        given = self.plan.hyperparameters
        gradient_norm, update_size = measures or (None, None)
        self.event(
            "train",
            step=step,
            tokens=step * given.batch_tokens,
            flops=step * given.batch_tokens * given.flops_per_token,
            loss=loss,
            lr=lr_multiplier(given, step - 1),
            gradient_norm=gradient_norm,
            update_size=update_size,
            tokens_per_second=given.batch_tokens / seconds,
            train_seconds=self.progress.train_seconds,
            memory_bytes=self._peak_memory(),
        )

    def _checkpoint_due(self) -> bool:
        """Checkpoints come no oftener than asked, each step if 0, and cost a twentieth of the time at most."""
        pause = self.attempt["checkpoint_seconds"]
        return time.monotonic() - self.last_checkpoint >= (
            max(pause, 20 * self.checkpoint_cost) if pause else 0
        )

    def _checkpoint(self) -> None:
        """Write a checkpoint, on rank 0; training goes on when it cannot be written."""
        began, step, state = self._count_wall_seconds(), self.progress.step, self.optimizer.state()
        if self.rank:
            return
        weights = {
            f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()
        }
        metadata = {name: repr(value) for name, value in vars(self.progress).items()} | {
            "run_id": self.plan.run_id
        }
        self.event("working", step=step, what="checkpoint", share=None)
        try:
            path = checkpoints.write(
                self.run_folder / "checkpoints", step, weights | state, metadata, self.last_good
            )
        except OSError as error:
            last = (
                f"the last good one is {self.last_good.name}"
                if self.last_good
                else "there is none yet"
            )
            why = f"checkpoint at step {step} could not be written ({error.strerror}): {last}; free some space"
            self.event("warning", step=step, message=why)
            return
        finally:
            self.last_checkpoint = time.monotonic()
            self.checkpoint_cost = self.last_checkpoint - began
        self.last_good = path
        self.event(
            "checkpoint",
            step=step,
            file=path.name,
            bytes=path.stat().st_size,
            seconds=self.checkpoint_cost,
        )

    def _newest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest good checkpoint and lines about damaged ones: rank 0 looks, every rank takes what it found."""
        found: list[Any] = [
            checkpoints.newest(self.run_folder / "checkpoints") if self.rank == 0 else None
        ]
        if self.ranks > 1:
            dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def _resume(self, path: Path) -> None:
        """Model, optimiser and progress from a checkpoint of this run."""
        tensors, metadata = checkpoints.read(path)
        if metadata["run_id"] != self.plan.run_id:
            raise Stopped("data", f"{path} belongs to run {metadata['run_id']}")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        self.progress = Progress(
            **{name: json.loads(metadata[name]) for name in vars(self.progress)}
        )
        self.optimizer.load(tensors)

    def _evaluate(self) -> tuple[float, float]:
        """val_bpb and loss over the plan's validation rows, recorded."""
        given, began = self.plan.hyperparameters, time.perf_counter()
        self._talk("evaluation", 0)
        tokens, mine = self.attempt["evaluation_tokens"], len(self.validation) / self.ranks
        val_bpb, val_loss = validation_loss(
            self.model,
            self.validation,
            self.token_bytes,
            self.rank,
            self.ranks,
            tokens,
            lambda read: self._talk("evaluation", min(1.0, read / mine)),
        )
        self.event(
            "eval",
            step=self.progress.step,
            tokens=given.tokens,
            flops=given.flops,
            val_bpb=val_bpb,
            val_loss=val_loss,
            rows=len(self.validation),
            seconds=time.perf_counter() - began,
        )
        return val_bpb, val_loss

    def _talk(self, what: str, share: float) -> None:
        """Say now and then that an evaluation goes on, and how far it is."""
        if time.monotonic() - self.talked > TALK_SECONDS:
            self.event("working", step=self.progress.step, what=what, share=share)
            self.talked = time.monotonic()

    def _beside(self) -> CoreCallback:
        return CoreCallback(
            self.attempt["core"],
            self.attempt["evaluation_tokens"],
            self.run_folder,
            self.plan,
            self.model,
            self.tokenizer,
            self.rank,
            self.ranks,
            self.event,
            self._core_goes_on,
        )

    def _core(self, file: Path | None) -> float | None:
        """CORE of the weights as they are here and in a file. Its time is not the training's."""
        self._count_wall_seconds()
        self.talked = 0.0
        try:
            return self.beside.measure(self.progress.step, file)
        except Interrupted:
            self._stop(f"stopped in the evaluation of CORE at step {self.progress.step}, as asked")
        finally:
            self.clock = time.monotonic()

    def _core_goes_on(self, share: float) -> None:
        """Say how far CORE is, unless a stop is asked or nobody is there to ask."""
        if os.getppid() != self.parent:
            sys.exit("torchrun is gone")
        if self.stop_asked:
            raise Interrupted
        with suppress(OSError):  # of one rank alone, which may not leave the others waiting
            self._talk("core", min(1.0, share))

    def _final(self, val_bpb: float, val_loss: float) -> dict[str, Any]:
        """Final weights, written; and what done.json says."""
        self._count_wall_seconds()
        given, progress = self.plan.hyperparameters, self.progress
        weights = self.run_folder / FINAL
        parameters = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        with _needed(weights):
            digest = checkpoints.save(weights, parameters, {"run_id": self.plan.run_id})
        spent = {
            "tokens": given.tokens,
            "flops": given.flops,
            "train_seconds": progress.train_seconds,
            "wall_seconds": progress.wall_seconds,
        }
        return {
            "run_id": self.plan.run_id,
            "attempt": self.attempt["attempt"],
            "time": time.time(),
            "step": progress.step,
            **spent,
            "val_bpb": val_bpb,
            "val_loss": val_loss,
            "train_loss": progress.tail_loss / self._tail_steps(),
            "core": None,
            "tokens_per_second": given.tokens / progress.train_seconds,
            "flops_per_second": given.flops / progress.train_seconds,
            "peak_memory_bytes": self._peak_memory(),
            "parameters_total": given.parameters.total,
            "weights": weights.name,
            "weights_sha256": digest,
        }

    def _finish(self, done: dict[str, Any]) -> None:
        """Write done.json; then the checkpoints go, and the finished event has their space."""
        with _needed(self.run_folder / "done.json"):
            write_json(self.run_folder / "done.json", done | {"time": time.time()})
        for checkpoint in (self.run_folder / "checkpoints").glob("*"):
            checkpoint.unlink()
        told = {name: done[name] for name in events.FIELDS["finished"]}
        self.event("finished", **told)

    def _count_wall_seconds(self) -> float:
        """Add the time since the last count; now."""
        now = time.monotonic()
        self.progress.wall_seconds += now - self.clock
        self.clock = now
        return now

    def _peak_memory(self) -> int:
        """Bytes: of the allocator on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiles(plan: Plan, device: torch.device) -> bool:
    """Whether a run is compiled: where it is long enough to gain by it, and there is a compiler."""
    if plan.hyperparameters.flops < COMPILED_FLOPS.get(device.type, math.inf):
        return False
    return device.type == "cuda" or any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))
    )


@contextmanager
def _needed(path: Path) -> Iterator[None]:
    """Write a file without which the run is not finished."""
    try:
        yield
    except OSError as error:
        why = f"{path} could not be written ({error.strerror}): free some space and sweep again"
        raise Stopped("error", f"{why}, to go on from the last checkpoint") from error


def main() -> int:
    """Run one attempt; 0 when the run is finished, else 1 with a `failed` event that says why."""
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "0":
        lock = hold_lock(folder.parent.parent / "train.lock")
        if lock is None:
            sys.exit(f"{folder.parent.parent.name} is being trained by another attempt")
    trainer = Trainer(folder)
    try:
        trainer.run()
    except Stopped as stopped:
        trainer.event("failed", reason=stopped.reason, message=str(stopped))
        return 1
    except OSError as error:
        sys.exit(f"OSError: {error}")  # events cannot be written either
    except (MemoryError, RuntimeError) as error:
        if trainer.writer is None or not out_of_memory(error):
            raise
        trainer.event("failed", reason="oom", message=str(error).splitlines()[0])
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
