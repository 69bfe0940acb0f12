"""CORE of the weights in training: reported now and then, stopped on request, outside wall time."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from slm.evaluate.core import Interrupted
from slm.evaluate.request import CoreRequest
from slm.train.core_callback import CoreCallback
from slm.train.progress import Progress, WallClock
from slm.train.session import Session


class CoreMeasurement:
    """CORE requests of an attempt, on one rank."""

    def __init__(self, session: Session, progress: Progress, clock: WallClock) -> None:
        self._attempt = session.attempt
        self._progress = progress
        self._clock = clock
        document = session.settings["core"]
        self._callback = CoreCallback(
            request=CoreRequest.from_document(document) if document else None,
            evaluation_tokens=session.settings["evaluation_tokens"],
            run_folder=session.attempt.run_folder,
            plan=session.plan,
            model=session.model,
            tokenizer=session.data.tokenizer,
            ranks=session.attempt.ranks,
            event=session.attempt.event,
            progress=self._report,
        )

    @property
    def is_requested(self) -> bool:
        """Whether the attempt measures CORE at all."""
        return self._callback.request is not None

    def is_due(self) -> bool:
        """Whether CORE is due at the present step, before the last."""
        return self._callback.due(self._progress.step)

    def measure(self, file: Path | None) -> float | None:
        """Measure CORE of the present weights, which `file` holds too, outside of wall time."""
        self._clock.count()
        self._attempt.reset_heartbeat()
        step = self._progress.step
        try:
            return self._callback.measure(step, file)
        except Interrupted:
            self._attempt.interrupt(f"stopped on request in the evaluation of CORE at step {step}")
        finally:
            self._clock.restart()

    def _report(self, share: float) -> None:
        """Report the share done. Raises Interrupted if a stop was requested."""
        self._attempt.exit_if_orphaned()
        if self._attempt.stop_requested:
            raise Interrupted
        with suppress(OSError):  # it would end this rank alone, and leave the others waiting
            self._attempt.heartbeat(self._progress.step, "core", min(1.0, share))
