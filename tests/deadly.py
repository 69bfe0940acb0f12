"""Documents that kill their reader, in a module that a new process imports quickly."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator


class Deadly:
    """Documents whose reader is killed."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield ""
