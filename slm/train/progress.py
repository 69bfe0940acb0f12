"""Progress of a run over all its attempts; a checkpoint stores all of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field


@dataclass
class Progress:
    """Steps done, time spent on them, and the loss of the last steps."""

    step: int = 0
    """Steps done."""
    train_seconds: float = 0.0
    """Time in the steps that led to these weights, over all attempts."""
    wall_seconds: float = 0.0
    """Time of the trainer on the way to these weights, over all attempts, without CORE."""
    tail_loss: float = 0.0
    """Sum of the losses of the steps that train_loss averages."""

    def metadata(self) -> dict[str, str]:
        """Return the fields as a checkpoint stores them."""
        return {name: repr(value) for name, value in asdict(self).items()}

    def restore(self, metadata: dict[str, str]) -> None:
        """Continue from the fields that a checkpoint stored."""
        for name in asdict(self):
            setattr(self, name, json.loads(metadata[name]))


@dataclass
class WallClock:
    """Adds the time that passes to `Progress.wall_seconds`, except while it is stopped."""

    progress: Progress
    _counted: float = field(default_factory=time.monotonic)

    def count(self) -> float:
        """Add the time since the last count; return the present time, monotonic seconds."""
        now = time.monotonic()
        self.progress.wall_seconds += now - self._counted
        self._counted = now
        return now

    def restart(self) -> None:
        """Leave out the time since the last count."""
        self._counted = time.monotonic()
