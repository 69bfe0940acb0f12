"""CORE during training. Never touches the weights; a failure is a warning and the run continues."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.evaluate.bundle import CORE
from slm.evaluate.core import Interrupted, OutOfMemory, Scorer, default_batch_tokens
from slm.evaluate.evaluator import evaluate_core
from slm.evaluate.request import TOKENS, CoreRequest
from slm.files import read_json
from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.model.weights import FINAL, Weights
from slm.train.progress import Progress, WallClock
from slm.train.session import Session


@dataclass
class CoreCallback:
    """Measures CORE, or the mean of another bundle, of a model in training, on one rank.

    Reports now and then, stops on request, and stays outside of wall time.
    """

    session: Session
    progress: Progress
    clock: WallClock

    def __post_init__(self) -> None:
        self._attempt = self.session.attempt
        document = self.session.settings["core"]
        self.request = CoreRequest(**document) if document else None
        """Request of attempt.json; None if nothing is measured."""

    def is_due(self) -> bool:
        """Whether CORE is measured after the present step, which is not the last one."""
        step = self.progress.step
        if not (self.request and self.request.every):
            return False
        return 0 < step < self.session.hp.steps and step % self.request.every == 0

    def measure(self, file: Path | None) -> float | None:
        """Evaluate the weights in memory, which `file` holds, and log the result, on every rank.

        Returns CORE on all examples on rank 0, else None. Ends the attempt if a stop was requested.
        """
        self.clock.count()
        self._attempt.reset_heartbeat()
        step = self.progress.step
        try:
            path = self._evaluate(step, file)
            return self._log(step, read_json(path)) if self._attempt.ranks.is_first else None
        except (ValueError, OSError, OutOfMemory) as error:
            self._warn(step, " ".join(str(error).split()))
            return None
        except Interrupted:
            self._attempt.interrupt(f"stopped on request in the evaluation of CORE at step {step}")
        finally:
            self.clock.restart()

    def _evaluate(self, step: int, file: Path | None) -> Path:
        """Return the evaluation file, the one that `slm eval` finds for the same weights."""
        assert self.request
        session = self.session
        ranks = self._attempt.ranks
        run_folder = self._attempt.run_folder
        tokens = session.settings["evaluation_tokens"]
        batch_tokens = default_batch_tokens(session.device) * tokens // EVALUATION_TOKENS

        def require_checkpoint() -> None:
            if not file or not (file.name == FINAL or file.name.startswith(f"step-{step:09d}.")):
                raise ValueError("it has no checkpoint")

        def load() -> Scorer:
            tokenizer = session.data.tokenizer
            return Scorer(session.model, tokenizer, ranks, batch_tokens, self._report)

        ranks.broadcast_from_rank0(require_checkpoint, session.device)
        tensors = session.parameters()
        weights = Weights(file or Path(), run_folder, session.plan, step, tensors)
        home = run_folder.parent
        return evaluate_core(weights, home, self.request, session.device, ranks, load=load)

    def _report(self, unit: str, done: int, total: int) -> None:
        """Report the share done. Raises Interrupted if a stop was requested."""
        self._attempt.exit_if_orphaned()
        if self._attempt.stop_requested:
            raise Interrupted
        share = done / max(total, 1) if unit == TOKENS else 0.0
        with suppress(OSError):  # it would end this rank alone, and leave the others waiting
            self._attempt.heartbeat(self.progress.step, "core", min(1.0, share))

    def _log(self, step: int, document: dict[str, Any]) -> float | None:
        """Write the event; return the value if it is CORE on all examples."""
        self._attempt.event(
            "core",
            **self.session.totals(step),
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
        command = self.request.eval_command(self.session.plan.run_id)
        message = (
            f"no CORE at step {step}: {reason}; the run continues, "
            f"and `{command}` measures it once that is fixed"
        )
        self._attempt.event("warning", step=step, message=message)
