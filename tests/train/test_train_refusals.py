"""Runs that the trainer refuses: one `failed` event, and one line in exit.json."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slm import events
from slm.data import PreparedDataset
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import read_exit
from tests import forked
from tests.attempts import ENVIRONMENT, make_attempt, plan_of, train_until


def plan(prepared: PreparedDataset) -> Plan:
    """Return a plan of one step of two rows."""
    return plan_of(replace(pocket(1, steps=1), batch_tokens=256), prepared)


def refused(folder: Path) -> tuple[str, str]:
    """Return reason and message of an attempt that ends, under a forked supervisor, before the
    first step.
    """
    with forked.Supervised(folder) as supervisor:
        assert supervisor.wait() == 1
    return failure(folder)


def failure(folder: Path) -> tuple[str, str]:
    """Return reason and message of an attempt, which its only event and exit.json hold."""
    ended = read_exit(folder)
    assert ended is not None
    assert only_failure(folder) == (ended["reason"], ended["message"])
    return ended["reason"], ended["message"]


def only_failure(folder: Path) -> tuple[str, str]:
    """Return reason and message of the only event of an attempt."""
    [event] = events.Reader(folder / "events.jsonl").new()
    assert event["event"] == "failed"
    assert "\n" not in event["message"]
    return event["reason"], event["message"]


@pytest.mark.soak
def test_an_unknown_device_is_refused_with_the_available_ones(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    """Both ranks refuse it, and torchrun ends."""
    folder = make_attempt(tmp_path, plan(prepared), prepared, ranks=2, device="tpu")
    command = [sys.executable, "-m", "slm.sweep.supervisor", str(folder)]
    result = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert (result.returncode, result.stderr) == (1, "")
    reason, message = failure(folder)
    assert reason == "error"
    assert "tpu" in message
    assert "cpu" in message


def test_more_ranks_than_rows_are_refused_with_both_numbers(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    folder = make_attempt(tmp_path, plan(prepared), prepared, ranks=3)
    assert forked.train(folder, ranks=3).returncode == 1
    reason, message = only_failure(folder)
    assert reason == "error"
    assert "3 ranks" in message
    assert "2 rows" in message


def test_missing_data_are_named(tmp_path: Path, prepared: PreparedDataset) -> None:
    missing = tmp_path / "moved"
    reason, message = refused(
        make_attempt(tmp_path, plan(prepared), prepared, ranks=2, data_folder=str(missing))
    )
    assert reason == "data"
    assert str(missing) in message


def test_a_checkpoint_of_another_plan_is_refused_and_kept(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    long = replace(pocket(1, steps=10**4), batch_tokens=128)
    attempt, other = (
        make_attempt(tmp_path, plan_of(long, prepared, seed), prepared, checkpoint_seconds=0)
        for seed in (0, 1)
    )
    foreign = stopped_at_a_checkpoint(other)
    checkpoints = Path(shutil.copytree(foreign, attempt.parent.parent / "checkpoints"))
    reason, message = refused(attempt)
    assert reason == "data"
    assert other.parent.parent.name in message
    assert contents(checkpoints) == contents(foreign) != {}


def stopped_at_a_checkpoint(folder: Path) -> Path:
    """Stop an attempt after its first checkpoint; return the folder of its checkpoints."""
    train_until(folder, 1, "checkpoint")
    return folder.parent.parent / "checkpoints"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, prepared: PreparedDataset) -> None:
    folder = make_attempt(tmp_path, plan(prepared), prepared)
    (folder.parent.parent / "plan.json").write_text("{}")
    reason, message = refused(folder)
    assert reason == "data"
    assert "plan.json" in message
