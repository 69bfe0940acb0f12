"""CORE during training. Never touches the weights; a failure is a warning and the run continues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.data.tokenizer import Tokenizer
from slm.evaluate.bundle import CORE
from slm.evaluate.core import OutOfMemory, Scorer, default_batch_tokens
from slm.evaluate.evaluator import evaluate_core_with
from slm.evaluate.request import TOKENS, CoreRequest
from slm.files import read_json
from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.model.gpt import GPT
from slm.model.ranks import Ranks
from slm.model.weights import FINAL, Weights
from slm.plan import Plan


@dataclass(frozen=True)
class CoreCallback:
    """Measures CORE, or the mean of another bundle, of a model in training."""

    request: CoreRequest | None
    """Request of attempt.json; None if nothing is measured."""
    evaluation_tokens: int
    """Tokens of a forward pass of val_bpb, from attempt.json; those of CORE scale with them."""
    run_folder: Path
    plan: Plan
    model: GPT
    tokenizer: Tokenizer
    ranks: Ranks
    event: Callable[..., None]
    """Writes an event on rank 0."""
    progress: Callable[[float], None]
    """Called with the share done; raises Interrupted to end the evaluation."""

    def due(self, step: int) -> bool:
        """Whether CORE is measured after this step, which is not the last one."""
        every = self.request.every if self.request else None
        return bool(every and step and step % every == 0 and step < self.plan.hyperparameters.steps)

    def measure(self, step: int, file: Path | None) -> float | None:
        """Evaluate the weights in memory, which `file` holds, and log the result, on every rank.

        Returns CORE on all examples on rank 0, else None. Raises Interrupted.
        """
        try:
            path = self._evaluate(step, file)
            return self._log(step, read_json(path)) if self.ranks.is_first else None
        except (ValueError, OSError, OutOfMemory) as error:
            self._warn(step, " ".join(str(error).split()))
            return None

    def _evaluate(self, step: int, file: Path | None) -> Path:
        """Return the evaluation file, the one that `slm eval` finds for the same weights."""
        assert self.request
        device = self.model.wte.device
        batch_tokens = default_batch_tokens(device) * self.evaluation_tokens // EVALUATION_TOKENS

        def require_checkpoint() -> None:
            if not file or not (file.name == FINAL or file.name.startswith(f"step-{step:09d}.")):
                raise ValueError("it has no checkpoint")

        def report(unit: str, done: int, total: int) -> None:
            self.progress(done / max(total, 1) if unit == TOKENS else 0.0)

        self.ranks.broadcast_from_rank0(require_checkpoint, device)
        tensors = dict(self.model.named_parameters())
        return evaluate_core_with(
            lambda: Scorer(self.model, self.tokenizer, self.ranks, batch_tokens, report),
            Weights(file or Path(), self.run_folder, self.plan, step, tensors),
            self.run_folder.parent,
            self.request,
            device,
            self.ranks,
        )

    def _log(self, step: int, document: dict[str, Any]) -> float | None:
        """Write the event; return the value if it is CORE on all examples."""
        hp = self.plan.hyperparameters
        self.event(
            "core",
            step=step,
            tokens=step * hp.batch_tokens,
            flops=step * hp.batch_tokens * hp.flops_per_token,
            metric=document["name"],
            mode=document["mode"],
            core=document["centred"],
            core_error=document["centred_error"],
            bits_per_byte=document["bits_per_byte"],
            seconds=document["seconds"],
        )
        errors = [task["error"] for task in document["tasks"].values() if "error" in task]
        if errors:
            self._warn(step, "; ".join(errors))
        is_core = document["name"] == CORE and document["mode"] == "full"
        return document["core"] if is_core else None

    def _warn(self, step: int, reason: str) -> None:
        assert self.request
        command = self.request.eval_command(self.plan.run_id)
        message = (
            f"no CORE at step {step}: {reason}; the run continues, "
            f"and `{command}` measures it once that is fixed"
        )
        self.event("warning", step=step, message=message)
