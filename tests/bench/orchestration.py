"""Orchestration: processor time of a pocket sweep, of the command, of the supervisors, and of what they start.

DEPTHS=2-6 sweeps other depths: those of the demo take minutes.
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

HEADERS = ("who", "processor seconds", "share %")
LOOK_SECONDS = 0.25
COMMAND = """
import atexit, os, resource, sys
def spent():
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    print(*(sum(resource.getrusage(kind)[:2]) for kind in kinds), file=open(os.environ["SPENT"], "w"))
atexit.register(spent)
from slm.cli import main
main()
"""
"""`slm` as it is typed; its last act is to write what it and its children spent."""


def rows() -> Iterator[tuple[str, float, float]]:
    """Who, processor seconds, and share of the sweep's."""
    depths = os.environ.get("DEPTHS", "2-4")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare("python", pocket(2), home)
        own, below, supervisors = _sweep(home, depths)
    spent = {
        "slm sweep": own,
        "supervisors": supervisors,
        "torchrun and trainers": below - supervisors,
    }
    for who, seconds in spent.items():
        yield f"{who}, d{depths}", seconds, 100 * seconds / sum(spent.values())


def _sweep(home: Path, depths: str) -> tuple[float, float, float]:
    """Processor seconds of a sweep: of the command, of all below it, and of the supervisors among these."""
    arguments = ("sweep", "--recipe", "pocket", "--depths", depths, "--cores-per-run", "1", "--yes")
    environment = os.environ | {"SLM_HOME": str(home), "SPENT": str(home / "spent")}
    supervisors: dict[int, float] = {}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], env=environment, stderr=subprocess.DEVNULL
    ) as slm:
        while slm.poll() is None:
            for child in psutil.Process(slm.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if "slm.sweep.supervisor" in child.cmdline():
                        supervisors[child.pid] = sum(child.cpu_times()[:2])
            time.sleep(LOOK_SECONDS)
    assert slm.returncode == 0
    own, below = map(float, (home / "spent").read_text().split())
    return own, below, sum(supervisors.values())
