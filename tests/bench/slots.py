"""Slots: one pocket sweep in a loop of torchrun, in one slot of all cores, and in a slot a core: wall times.

DEPTHS=2-6 sweeps other depths: those of the demo take minutes each time.
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

HEADERS = ("how", "wall s", "times as fast")


def rows() -> Iterator[tuple[str, float, float]]:
    """How, seconds, and the loop's seconds over these."""
    depths, cores = os.environ.get("DEPTHS", "2-4"), devices.cores()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare("python", pocket(2), Path(folder))
        ways: dict[str, Callable[[Path], None]] = {
            f"torchrun in a loop, {cores} ranks": lambda home: _loop(home, depths, prepared, cores),
            f"slm sweep, one slot of {cores}": lambda home: _sweep(home, depths, "all"),
            f"slm sweep, {cores} slots": lambda home: _sweep(home, depths, "1"),
            "slm sweep, auto": lambda home: _sweep(home, depths, "auto"),
        }
        first = None
        for number, (name, way) in enumerate(ways.items()):
            home = Path(folder) / str(number)
            home.mkdir()
            (home / "data").symlink_to(prepared.folder.parent)
            began = time.monotonic()
            way(home)
            took = time.monotonic() - began
            first = first or took
            yield f"{name}, d{depths}", took, first / took


def _loop(home: Path, depths: str, prepared: PreparedDataset, cores: int) -> None:
    """As a shell script does it, in the environment that the launcher gives its trainers."""
    for depth in depths_of(depths):
        attempt = make_attempt(
            home, plan_of(pocket(depth), prepared), prepared, ranks=cores, checkpoint_seconds=20
        )
        command = torchrun(
            attempt, "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={cores}"
        )
        subprocess.run(command, env=ALLOCATOR | ENVIRONMENT, check=True, capture_output=True)


def _sweep(home: Path, depths: str, cores_per_run: str) -> None:
    command = [sys.executable, "-m", "slm", "sweep", "--recipe", "pocket", "--depths", depths]
    command += ["--cores-per-run", cores_per_run]
    subprocess.run(
        command, env=os.environ | {"SLM_HOME": str(home)}, check=True, capture_output=True
    )
