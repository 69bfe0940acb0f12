"""What a trainer asks of a bundle beside val_bpb: it changes no weight, and what goes wrong costs a warning, no run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.evaluate import evaluator as later
from slm.evaluate.bpb import TOKENS as EVALUATION_TOKENS
from slm.evaluate.bundle import CORE
from slm.evaluate.core import TOKENS, Asked, OutOfMemory, judge_of, of_first
from slm.evaluate.prompts import Known
from slm.files import read_json
from slm.model.gpt import GPT
from slm.model.weights import FINAL, Weights
from slm.plan import Plan


@dataclass(frozen=True)
class CoreCallback:
    """CORE, or the mean of another bundle, of a model in training, on one of its ranks."""

    wanted: dict[str, Any] | None
    """What attempt.json says of it: bundle, every, max_per_task and without; None where nothing is asked."""
    tokens: int
    """Tokens of a forward pass by attempt.json, in a val_bpb."""
    run_folder: Path
    """Where the evaluations go."""
    plan: Plan
    """The run's."""
    model: GPT
    """In training."""
    tokenizer: Known
    """Of the data."""
    rank: int
    """This process."""
    ranks: int
    """Processes that train together."""
    event: Callable[..., None]
    """Writes an event, on the first rank."""
    go_on: Callable[[float], None]
    """Told what share is done; raises Interrupted to end it."""

    def due(self, step: int) -> bool:
        """Whether it is asked after a step before the last."""
        every = self.wanted["every"] if self.wanted else None
        return bool(every and step and step % every == 0 and step < self.plan.hyperparameters.steps)

    def measure(self, step: int, file: Path | None) -> float | None:
        """Of the weights as they are here and in a file, recorded; CORE on all examples, else None. On every rank.

        Raises Interrupted.
        """
        try:
            path = self._measured(step, file)
            return self._record(step, read_json(path)) if self.rank == 0 else None
        except (ValueError, OSError, OutOfMemory) as error:
            self._warn(step, " ".join(str(error).split()))
            return None

    def _measured(self, step: int, file: Path | None) -> Path:
        """The file of the evaluation, which finds what `slm eval` finds of the same weights."""
        device = self.model.wte.device

        def known() -> Asked:
            assert self.wanted
            if file is None or not (
                file.name == FINAL or file.name.startswith(f"step-{step:09d}.")
            ):
                raise ValueError("there is no checkpoint of it")
            return later.asked_of(self.run_folder.parent, self.wanted)

        return later.core_of(
            Weights(
                file or Path(),
                self.run_folder,
                self.plan,
                step,
                dict(self.model.named_parameters()),
            ),
            of_first(known, self.rank, self.ranks, device),
            device,
            lambda: (self.tokenizer, judge_of(self.model)),
            TOKENS.get(device.type, TOKENS["cuda"]) * self.tokens // EVALUATION_TOKENS,
            lambda done, of: self.go_on(done / max(of, 1)),
            lambda done, of: self.go_on(0.0),
            self.rank,
            self.ranks,
        )

    def _record(self, step: int, found: dict[str, Any]) -> float | None:
        """Write the event; the value, where it is CORE of all examples."""
        given = self.plan.hyperparameters
        self.event(
            "core",
            step=step,
            tokens=step * given.batch_tokens,
            flops=step * given.batch_tokens * given.flops_per_token,
            metric=found["name"],
            mode=found["mode"],
            core=found["centred"],
            core_error=found["centred_error"],
            bits_per_byte=found["bits_per_byte"],
            seconds=found["seconds"],
        )
        if errors := [own["error"] for own in found["tasks"].values() if "error" in own]:
            self._warn(step, "; ".join(errors))
        return found["core"] if (found["name"], found["mode"]) == (CORE, "full") else None

    def _warn(self, step: int, why: str) -> None:
        assert self.wanted
        way = f"`slm eval {self.plan.run_id} --core --bundle {self.wanted['bundle']}` measures it"
        message = (
            f"no CORE at step {step}: {why}; the run goes on, and {way} once that is put right"
        )
        self.event("warning", step=step, message=message)
