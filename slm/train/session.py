"""Session: plan, device, rows, model and optimiser of one rank, set up before the first step."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from slm.data.dataset import PreparedDataset
from slm.data.loader import Order, Rows
from slm.data.tokenizer import Tokenizer
from slm.evaluate.bpb import bytes_of
from slm.model.attention import kernel
from slm.model.gpt import GPT, compute_dtype
from slm.model.ranks import local_device
from slm.plan import Plan, code_fingerprint
from slm.recipe import Hyperparameters
from slm.run import AttemptDocument, read_attempt
from slm.train.attempt import Attempt, AttemptEnded
from slm.train.optimizer import Optimizer

COMPILED_FLOPS = {"cpu": 1e14, "cuda": 1e16}
"""FLOPs of a run from which compiling pays: it takes half a minute, and saves a CPU at most a fifth
of the time."""


@dataclass(frozen=True)
class RunData:
    """Rows that a run reads, and the tokeniser that made them."""

    tokenizer: Tokenizer
    token_bytes: Tensor
    """Bytes of each token (V,), on the model's device."""
    train: Rows
    validation: Rows
    order: Order


@dataclass(frozen=True)
class Session:
    """State of one rank of an attempt that does not change while it trains."""

    attempt: Attempt
    settings: AttemptDocument
    plan: Plan
    device: torch.device
    data: RunData
    model: GPT
    loss: Callable[[Tensor, Tensor], Tensor]
    """The model's summed loss, compiled or not."""
    optimizer: Optimizer
    attention: str
    """Kernel of the attention."""
    is_compiled: bool
    is_deferred: bool
    """Whether the results of a step are read while the next one runs."""

    @property
    def hp(self) -> Hyperparameters:
        """The plan's hyperparameters."""
        return self.plan.hyperparameters

    def totals(self, step: int) -> dict[str, int]:
        """Return a step with its tokens and FLOPs since step 0, as events name them."""
        tokens = step * self.hp.batch_tokens
        return {"step": step, "tokens": tokens, "flops": tokens * self.hp.flops_per_token}

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's parameters by name, detached."""
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}

    def peak_memory(self) -> int:
        """Return the peak bytes so far: of the allocator on a GPU, of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def setup(attempt: Attempt, deferred: bool = False) -> Session:
    """Set up a rank: read the plan, join the other ranks, load rows, build model and optimiser.

    Raises AttemptEnded for a plan, a device or data that cannot be used.
    """
    # 1) read what to train
    plan, settings = _read_plan(attempt)
    # 2) join the other ranks before any check that can fail: when a rank ends early, torchrun kills
    #    the others
    if attempt.ranks.world_size > 1:
        on_gpus = settings["device"] == "cuda" and torch.cuda.is_available()
        dist.init_process_group("nccl" if on_gpus else "gloo")
    # 3) refuse a run that this machine or this code cannot train
    rows = plan.hyperparameters.batch_rows
    if attempt.ranks.world_size > rows:
        raise AttemptEnded(
            "error",
            f"{attempt.ranks.world_size} ranks for a batch of {rows} rows: start {rows} at most",
        )
    device = _select_device(settings)
    if code_fingerprint() != plan.code:
        raise AttemptEnded(
            "data",
            "the trainer's sources changed after this run was planned: sweep again to plan it anew",
        )
    # 4) map the rows
    data = _load_data(plan, settings, device, verify_content=attempt.ranks.is_first)
    # 5) build the model from the seed; a checkpoint may replace its parameters later
    model = GPT(plan.hyperparameters)
    model.initialise(plan.seed)
    model.to(device)
    model.set_compute_dtype(compute_dtype(device))
    optimizer = Optimizer(model, attempt.ranks)
    loss = model.loss
    is_compiled = compiles(plan, device)
    if is_compiled:
        loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
    return Session(
        attempt=attempt,
        settings=settings,
        plan=plan,
        device=device,
        data=data,
        model=model,
        loss=loss,
        optimizer=optimizer,
        attention=kernel(device, model.dtype),
        is_compiled=is_compiled,
        is_deferred=deferred or device.type == "cuda",
    )


def _read_plan(attempt: Attempt) -> tuple[Plan, AttemptDocument]:
    try:
        settings = read_attempt(attempt.folder)
        return Plan.read(attempt.run_folder / "plan.json"), settings
    except (OSError, ValueError) as error:
        raise AttemptEnded("data", f"the plan cannot be read: {error}") from error


def _select_device(settings: AttemptDocument) -> torch.device:
    name = settings["device"]
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(name):
        choices = " or ".join(filter(available.get, available))
        raise AttemptEnded("error", f"device {name!r} is not available: choose {choices}")
    if name == "cpu":
        torch.set_num_threads(settings["threads"])
    return local_device(name)


def _load_data(
    plan: Plan, settings: AttemptDocument, device: torch.device, verify_content: bool
) -> RunData:
    """Map the plan's rows. Raises AttemptEnded for any other rows."""
    hp = plan.hyperparameters
    folder = Path(settings["data_folder"])
    try:
        prepared = PreparedDataset.read(folder)
        prepared.verify()
        if verify_content:
            prepared.verify_content(hp)
        token_bytes = bytes_of(prepared.tokenizer, hp.vocab_size, device)
    except (OSError, ValueError) as error:
        raise AttemptEnded("data", f"the plan's data are gone or changed: {error}") from error
    if replace(plan, data=prepared.identity(hp, plan.data.rows)).run_id != plan.run_id:
        raise AttemptEnded("data", f"{folder} holds other rows than the plan was made for")
    blocks = [block.rows for block in prepared.blocks("train", plan.data.rows)]
    return RunData(
        tokenizer=prepared.tokenizer,
        token_bytes=token_bytes,
        train=Rows.open(prepared, "train"),
        validation=Rows.open(prepared, "validation"),
        order=Order(blocks, plan.seed),
    )


def compiles(plan: Plan, device: torch.device) -> bool:
    """Whether a run is compiled: it is long enough to gain by it, and there is a compiler."""
    if plan.hyperparameters.flops < COMPILED_FLOPS.get(device.type, math.inf):
        return False
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return device.type == "cuda" or any(map(shutil.which, compilers))
