"""What the command line says of a small home of trained runs is what it said before, number by number."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests import goldens
from tests.goldens import Case

ELSEWHERE = 1e-6
"""Share by which numbers may differ where other versions of the numerical packages, or another processor, made them."""
WHY_NOT = "SLM_REFERENCE is unset: no folder of published figures to compare with"


@pytest.fixture(scope="session")
def found() -> dict[str, dict[str, Any]]:
    """Run every case once, in homes that are made for it."""
    return goldens.outcomes()


@pytest.fixture(scope="session")
def tolerance() -> float:
    """Ask for equal digits where the goldens were made with the same packages, else for nearly equal numbers."""
    return 0.0 if json.loads(goldens.VERSIONS.read_text()) == goldens.versions() else ELSEWHERE


@pytest.mark.parametrize(
    "case", [case for group in goldens.groups() for case in group], ids=lambda case: case.name
)
def test_a_command_says_what_it_said_before(
    case: Case, found: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """Compare keys, numbers, codes and the exit code of one command with its golden."""
    if case.needs_reference and not os.environ.get("SLM_REFERENCE"):
        pytest.skip(WHY_NOT)
    assert goldens.compared(case, found[case.name], tolerance) == []


def test_every_golden_belongs_to_a_case_and_no_name_is_used_twice() -> None:
    """Leave no golden behind whose case is gone."""
    names = [case.name for group in goldens.groups() for case in group]
    assert len(names) == len(set(names))
    assert {path.stem for path in goldens.FOLDER.glob("*.json")} == set(names)
