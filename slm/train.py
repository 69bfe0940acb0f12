"""The core trainer: `torchrun -m slm.train ATTEMPT_FOLDER`. A plan in, events out; no other configuration.

Reads `../../plan.json` and `attempt.json` (devices, ranks, threads, micro-batch, data folder), goes on from the newest
checkpoint of the run, appends `events.jsonl`, and ends with `model.safetensors` and `done.json` in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from slm import events, locks
from slm.data.loader import Order, Rows, share
from slm.data.prepare import Prepared
from slm.evaluate.bpb import validation_loss
from slm.model import GPT
from slm.optim import Optimizer, lr_multiplier
from slm.plan import Plan, code_fingerprint

TRAIN_EVENTS = 1000
"""A run logs at most about this many steps, evenly spaced."""
TAIL_SHARE = 0.1
"""train_loss is the mean over this share of the steps, the last ones."""
STATUS = 3
"""Numbers that travel with the gradients: loss, stop asked, checkpoint due."""
EVALUATION_TOKENS = 2**14
"""Tokens of one forward pass of an evaluation, at most (at least one row)."""


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


class Trainer:
    """One rank of one attempt."""

    def __init__(self, attempt_folder: Path) -> None:
        self.run_folder = attempt_folder.parent.parent
        self.attempt = events.read_json(attempt_folder / "attempt.json")
        self.plan = Plan.read(self.run_folder / "plan.json")
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = self._device()
        self.writer = events.Writer(attempt_folder / "events.jsonl") if self.rank == 0 else None
        self.progress = Progress()
        self.stop_asked = False
        self.parent = os.getppid()
        self.last_checkpoint = self.clock = time.monotonic()
        self.checkpoint_cost = 0.0

    def _device(self) -> torch.device:
        if self.attempt["device"] == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(local)
            return torch.device("cuda", local)
        torch.set_num_threads(self.attempt["threads"])
        return torch.device(self.attempt["device"])

    def event(self, event: str, **fields: Any) -> None:
        """Write an event, on rank 0."""
        if self.writer:
            self.writer.write(event, **fields)

    def run(self) -> None:
        """Train to the plan's last step, evaluate, and write what is final."""
        signal.signal(signal.SIGTERM, self._ask_stop)
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if code_fingerprint() != self.plan.code:
            raise Stopped("data", "the trainer's sources changed after this run was planned: sweep again to plan anew")
        self._load_data()
        self._load_model()
        given = self.plan.hyperparameters
        while self.progress.step < given.steps:
            self._train_step()
        val_bpb, val_loss = self._evaluate()
        if not math.isfinite(val_bpb):
            raise Stopped("diverged", f"val_bpb is {val_bpb} after step {self.progress.step}")
        if self.rank == 0:
            self._finish(val_bpb, val_loss)

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _load_data(self) -> None:
        """Map the rows; refuse any that are not the plan's."""
        given, folder = self.plan.hyperparameters, Path(self.attempt["data_folder"])
        try:
            prepared = Prepared(folder, events.read_json(folder / "manifest.json"))
            prepared.verify()
            if self.rank == 0:
                prepared.verify_content(given)
            sizes = prepared.tokenizer.token_bytes
        except (OSError, ValueError) as error:
            raise Stopped("data", f"the plan's data are gone or changed: {error}") from error
        if prepared.identity(given) != self.plan.data:
            raise Stopped("data", f"{folder} holds other rows than the plan was made for")
        self.rows, self.validation = (
            Rows(folder / f"{name}.bin", prepared.manifest[name]["row_tokens"], prepared.manifest[name]["dtype"])
            for name in ("train", "validation")
        )
        self.order = Order(len(self.rows), prepared.manifest["train"]["block_rows"], self.plan.seed)
        self.token_bytes = torch.tensor(sizes + [0] * (given.vocab_size - len(sizes)), device=self.device)

    def _load_model(self) -> None:
        """Fresh from the seed, or as the newest checkpoint left it."""
        self.model = GPT(self.plan.hyperparameters)
        self.model.initialise(self.plan.seed)
        self.model.to(self.device)
        if self.device.type == "cuda":
            self.model.set_compute_dtype(torch.bfloat16)
        self.buffers = gradient_buffers(self.model)
        self.optimizer = Optimizer(self.model)
        checkpoints = sorted((self.run_folder / "checkpoints").glob("step-*.safetensors"))
        if checkpoints:
            self._resume(checkpoints[-1])
        self.event(
            "started",
            step=self.progress.step,
            resumed_from=self.progress.step or None,
            device=self.attempt["device"],
            ranks=self.ranks,
            threads=torch.get_num_threads(),
            micro_batch=self.attempt["micro_batch"],
        )

    def _train_step(self) -> None:
        """One optimiser step, its event, and a checkpoint when one is due."""
        if os.getppid() != self.parent:
            sys.exit("torchrun is gone")
        given, step = self.plan.hyperparameters, self.progress.step
        began = time.perf_counter()
        loss, stop, checkpoint = self._gradients(step)
        if not math.isfinite(loss):
            self._log_step(step + 1, loss, 0.0)
            raise Stopped("diverged", f"loss is {loss} at step {step + 1}")
        self.optimizer.step(step)
        seconds = time.perf_counter() - began
        self.progress.step = step + 1
        self.progress.train_seconds += seconds
        if step >= given.steps - self._tail_steps():
            self.progress.tail_loss += loss
        if (step + 1) % max(1, given.steps // TRAIN_EVENTS) == 0 or step + 1 == given.steps:
            self._log_step(step + 1, loss, seconds)
        if (stop or checkpoint) and step + 1 < given.steps:
            self._checkpoint()
        if stop and step + 1 < given.steps:
            if self.ranks > 1:
                dist.barrier()
            raise Stopped("interrupted", f"stopped at step {step + 1} of {given.steps}, as asked")

    def _tail_steps(self) -> int:
        return max(1, round(TAIL_SHARE * self.plan.hyperparameters.steps))

    def _log_step(self, step: int, loss: float, seconds: float) -> None:
        given = self.plan.hyperparameters
        self.event(
            "train",
            step=step,
            tokens=step * given.batch_tokens,
            flops=step * given.batch_tokens * given.flops_per_token,
            loss=loss,
            lr=lr_multiplier(given, step - 1),
            tokens_per_second=given.batch_tokens / seconds if seconds else None,
            train_seconds=self.progress.train_seconds,
        )

    def _gradients(self, step: int) -> tuple[float, bool, bool]:
        """Gradients of the mean loss over the step's rows on every rank; that loss; whether any rank was asked to stop;
        whether rank 0 wants a checkpoint."""
        given = self.plan.hyperparameters
        mine = share(self.order.step(step, given.batch_rows), self.rank, self.ranks)
        for buffer in self.buffers:
            buffer.zero_()
        status = self.buffers[0][:STATUS]
        for start in range(0, len(mine), self.attempt["micro_batch"]):
            pair = self.rows.pair(mine[start : start + self.attempt["micro_batch"]])
            ids, targets = (tensor.to(self.device, non_blocking=True) for tensor in pair)
            loss = self.model.loss(ids, targets).sum() / given.batch_tokens
            loss.backward()
            status[0] += loss.detach()
        status[1] = self.stop_asked
        status[2] = self.rank == 0 and self._checkpoint_due()
        if self.ranks > 1:
            for buffer in self.buffers:
                dist.all_reduce(buffer)
        total, stop, checkpoint = status.tolist()
        return total, stop > 0, checkpoint > 0

    def _checkpoint_due(self) -> bool:
        """Checkpoints come no oftener than asked, each step if 0, and cost a twentieth of the time at most."""
        pause = self.attempt["checkpoint_seconds"]
        return time.monotonic() - self.last_checkpoint >= (max(pause, 20 * self.checkpoint_cost) if pause else 0)

    def _checkpoint(self) -> None:
        """Write a checkpoint under a temporary name, rename it, and drop the one before; on rank 0."""
        if self.rank:
            return
        began = self._count_wall_seconds()
        folder = self.run_folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self.progress.step:09d}.safetensors"
        weights = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        metadata = {name: repr(value) for name, value in vars(self.progress).items()} | {"run_id": self.plan.run_id}
        _save(weights | self.optimizer.state(), path, metadata)
        for old in folder.glob("step-*.safetensors"):
            if old != path:
                old.unlink()
        self.checkpoint_cost = time.monotonic() - began
        self.last_checkpoint = time.monotonic()
        self.event(
            "checkpoint",
            step=self.progress.step,
            file=path.name,
            bytes=path.stat().st_size,
            seconds=self.checkpoint_cost,
        )

    def _resume(self, path: Path) -> None:
        """Model, optimiser and progress from a checkpoint of this run."""
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["run_id"] != self.plan.run_id:
            raise Stopped("data", f"{path} belongs to run {metadata['run_id']}")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        self.optimizer.load(tensors)
        values = {name: json.loads(metadata[name]) for name in vars(self.progress)}
        self.progress = Progress(**values)

    def _evaluate(self) -> tuple[float, float]:
        """val_bpb and loss over the plan's validation rows, recorded."""
        given, began = self.plan.hyperparameters, time.perf_counter()
        batch_rows = max(1, EVALUATION_TOKENS // given.sequence_length)
        val_bpb, val_loss = validation_loss(
            self.model, self.validation, self.token_bytes, batch_rows, self.rank, self.ranks
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

    def _finish(self, val_bpb: float, val_loss: float) -> None:
        """Final weights, done.json, the finished event; then the checkpoints go."""
        self._count_wall_seconds()
        given, progress = self.plan.hyperparameters, self.progress
        weights = self.run_folder / "model.safetensors"
        parameters = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        _save(parameters, weights, {"run_id": self.plan.run_id})
        spent = {
            "tokens": given.tokens,
            "flops": given.flops,
            "train_seconds": progress.train_seconds,
            "wall_seconds": progress.wall_seconds,
        }
        done = {
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
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }
        events.write_json(self.run_folder / "done.json", done)
        self.event("finished", step=progress.step, **spent, val_bpb=val_bpb)
        for checkpoint in (self.run_folder / "checkpoints").glob("*"):
            checkpoint.unlink()

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


def gradient_buffers(model: GPT) -> list[torch.Tensor]:
    """One flat buffer a dtype, float32 first and led by STATUS numbers, into which every `.grad` is a view: ranks
    exchange a step's gradients in one call each."""
    buffers = []
    for dtype in sorted(
        {parameter.dtype for parameter in model.parameters()}, key=lambda dtype: dtype != torch.float32
    ):
        parameters = [parameter for parameter in model.parameters() if parameter.dtype == dtype]
        place = STATUS if dtype == torch.float32 else 0
        size = place + sum(parameter.numel() for parameter in parameters)
        buffer = torch.zeros(size, dtype=dtype, device=model.wte.device)
        for parameter in parameters:
            parameter.grad = buffer[place : place + parameter.numel()].view_as(parameter)
            place += parameter.numel()
        buffers.append(buffer)
    return buffers


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Run one attempt; 0 when the run is finished, else 1 with a `failed` event that says why."""
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "0":
        lock = locks.hold(folder.parent.parent / "train.lock")
        if lock is None:
            sys.exit(f"{folder.parent.parent.name} is being trained by another attempt")
    trainer = Trainer(folder)
    try:
        trainer.run()
    except Stopped as stopped:
        trainer.event("failed", reason=stopped.reason, message=str(stopped))
        return 1
    except torch.OutOfMemoryError as error:
        if trainer.writer is None:
            raise
        trainer.event("failed", reason="oom", message=str(error).splitlines()[0])
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
