"""Slots: wall time of a pocket sweep: torchrun in a loop, one slot of all cores, one slot per core.

DEPTHS=2-6 sweeps other depths: those of the demo take minutes each time. SLM_BENCH_SMALL=1 sweeps
depth 1, by the loop and `auto` alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from slm.cli.options import depths_of
from slm.data import PreparedDataset, prepare
from slm.hardware import devices
from slm.recipe import pocket
from slm.sweep.supervisor import ALLOCATOR
from tests.attempts import ENVIRONMENT, make_attempt, plan_of, torchrun
from tests.bench.orchestration import swept_depths
from tests.bench.trainer import SMALL

HEADERS = ("method", "wall s", "speed-up")


def rows() -> Iterator[tuple[str, float, float]]:
    """Yield methods, their seconds, and the seconds of the loop over these."""
    depths = swept_depths()
    cores = devices.cores()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare("python", pocket(2), Path(folder))
        methods: dict[str, Callable[[Path], None]] = {
            f"torchrun in a loop, {cores} ranks": lambda home: _loop(home, depths, prepared, cores),
        }
        if not SMALL:
            methods |= {
                f"slm sweep, one slot of {cores}": lambda home: _sweep(home, depths, "all"),
                f"slm sweep, {cores} slots": lambda home: _sweep(home, depths, "1"),
            }
        methods["slm sweep, auto"] = lambda home: _sweep(home, depths, "auto")
        loop = None
        for number, (name, method) in enumerate(methods.items()):
            home = Path(folder) / str(number)
            home.mkdir()
            (home / "data").symlink_to(prepared.folder.parent)
            began = time.monotonic()
            method(home)
            seconds = time.monotonic() - began
            loop = loop or seconds
            yield f"{name}, d{depths}", seconds, loop / seconds


def _loop(home: Path, depths: str, prepared: PreparedDataset, cores: int) -> None:
    """Train one run after another as a shell script would, in the environment of the launcher."""
    for depth in depths_of(depths):
        plan = plan_of(pocket(depth), prepared)
        attempt = make_attempt(home, plan, prepared, ranks=cores, checkpoint_seconds=20)
        options = ("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={cores}")
        command = torchrun(attempt, *options)
        subprocess.run(command, env=ALLOCATOR | ENVIRONMENT, check=True, capture_output=True)


def _sweep(home: Path, depths: str, cores_per_run: str) -> None:
    command = [sys.executable, "-m", "slm", "sweep", "--recipe", "pocket", "--depths", depths]
    command += ["--cores-per-run", cores_per_run]
    environment = os.environ | {"SLM_HOME": str(home)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
