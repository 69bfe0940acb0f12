"""Every long target of the Makefile starts and ends, at its smallest size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run

ROOT = Path(__file__).parent.parent
SMALL = {"SLM_BENCH_SMALL": "1", "REPETITIONS": "1", "DESIGNS": "1"}


def make(target: str, *variables: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a target with this Python's environment, without installing anything."""
    bin_folder = Path(sys.executable).parent
    command = ["make", "-C", str(ROOT), "-o", "install", target, f"BIN={bin_folder}", *variables]
    return subprocess.run(
        command,
        env=os.environ | SMALL | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.parametrize("target", ["calibrate", "bench", "wheel-check"])
def test_a_target_runs(target: str) -> None:
    result = make(target)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.strip()


def test_reproduce_prints_published_fits(reference: Path) -> None:
    result = make("reproduce", SLM_REFERENCE=str(reference))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "|" in result.stdout


def test_soak_collects_its_tests() -> None:
    result = run(pytest.main, ["-m", "soak", "--collect-only", "-q", str(ROOT / "tests")])
    assert result.returncode == 0, result.stdout[-2000:]
    assert "test_soak.py" in result.stdout
