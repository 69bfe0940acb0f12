"""Orchestration: processor time of a pocket sweep, of the command, its supervisors, and trainers.

DEPTHS=2-6 sweeps other depths: those of the demo take minutes. SLM_BENCH_SMALL=1 sweeps depth 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from slm.data import prepare
from slm.recipe import pocket

HEADERS = ("process", "processor seconds", "share %")
POLL_SECONDS = 0.25
COMMAND = """
import atexit, os, resource
def write_times():
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    times = (sum(resource.getrusage(kind)[:2]) for kind in kinds)
    print(*times, file=open(os.environ["TIMES"], "w"))
atexit.register(write_times)
from slm.cli import main
main()
"""
"""`slm`, which writes its own processor time and that of its children when it exits."""


def swept_depths() -> str:
    """Return the depths to sweep, from the environment."""
    return os.environ.get("DEPTHS", "1" if os.environ.get("SLM_BENCH_SMALL") else "2-4")


def rows() -> Iterator[tuple[str, float, float]]:
    """Yield processes, their processor seconds, and their share of the sweep's."""
    depths = swept_depths()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare("python", pocket(2), home)
        command, children, supervisors = _sweep(home, depths)
    times = {
        "slm sweep": command,
        "supervisors": supervisors,
        "torchrun and trainers": children - supervisors,
    }
    for process, seconds in times.items():
        yield f"{process}, d{depths}", seconds, 100 * seconds / sum(times.values())


def _sweep(home: Path, depths: str) -> tuple[float, float, float]:
    """Return processor seconds of the command, of its descendants, and of the supervisors."""
    arguments = ("sweep", "--recipe", "pocket", "--depths", depths, "--cores-per-run", "1", "--yes")
    environment = os.environ | {"SLM_HOME": str(home), "TIMES": str(home / "times")}
    supervisors: dict[int, float] = {}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], env=environment, stderr=subprocess.DEVNULL
    ) as slm:
        while slm.poll() is None:
            for child in psutil.Process(slm.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if "slm.sweep.supervisor" in child.cmdline():
                        supervisors[child.pid] = sum(child.cpu_times()[:2])
            time.sleep(POLL_SECONDS)
    assert slm.returncode == 0
    command, children = map(float, (home / "times").read_text().split())
    return command, children, sum(supervisors.values())
