"""Attempts with any number of ranks and any settings, made as the launcher makes them, and their
training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from slm import events
from slm.data import PreparedDataset
from slm.files import read_json, write_json
from slm.hardware.slot import Slot
from slm.plan import Plan, code_fingerprint
from slm.recipe import Hyperparameters
from slm.run import make_attempt as add_attempt
from slm.sweep.micro_batch import MicroBatches
from tests import forked

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def plan_of(hp: Hyperparameters, prepared: PreparedDataset, seed: int = 0) -> Plan:
    """Return the plan of a run."""
    return Plan("test", f"steps={hp.steps}", seed, hp, prepared.identity(hp), code_fingerprint())


def make_attempt(home: Path, plan: Plan, prepared: PreparedDataset, **changes: Any) -> Path:
    """Make a run's first attempt, for one CPU rank but for the changes to attempt.json; return its
    folder.
    """
    slot = Slot("cpu", 1, 1)
    rows = MicroBatches().choose(plan.hyperparameters, slot)
    folder = add_attempt(plan, home, prepared.folder, slot, rows, checkpoint_seconds=1e9)
    write_json(folder / "attempt.json", read_json(folder / "attempt.json") | changes)
    write_json(folder.parent.parent / "plan.json", plan.document())
    return folder


def torchrun(folder: Path, *options: str) -> list[str]:
    """Return the command that trains an attempt."""
    logs = f"--log-dir={folder / 'torchrun'}"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        logs,
        "--module",
        "slm.train",
        str(folder),
    ]


def train_until(folder: Path, ranks: int, event: str) -> None:
    """Train an attempt until it writes an event of a kind, then stop every rank and wait for the
    end.
    """
    forked.train_until(folder, ranks, lambda: log(folder, event))


def log(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind that an attempt wrote."""
    return [
        event for event in events.Reader(folder / "events.jsonl").new() if event["event"] == kind
    ]
