"""The command line prints the same numbers for a small home of trained runs as before."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests import goldens
from tests.goldens import Case

TOLERANCE = 1e-6
"""Relative difference allowed with other versions of the numerical packages."""
REASON = "SLM_REFERENCE is unset: no folder of published figures to compare with"


@pytest.fixture(scope="session")
def outcomes() -> dict[str, dict[str, Any]]:
    """Run every case once, in homes that are made for it."""
    return goldens.outcomes()


@pytest.fixture(scope="session")
def tolerance() -> float:
    """Require equal digits with the packages that made the goldens, else nearly equal ones."""
    return 0.0 if json.loads(goldens.VERSIONS.read_text()) == goldens.versions() else TOLERANCE


@pytest.mark.parametrize(
    "case", [case for group in goldens.groups() for case in group], ids=lambda case: case.name
)
def test_a_command_says_what_it_said_before(
    case: Case, outcomes: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """Compare keys, numbers, codes and the exit code of one command with its golden."""
    if case.needs_reference and not os.environ.get("SLM_REFERENCE"):
        pytest.skip(REASON)
    assert goldens.compared(case, outcomes[case.name], tolerance) == []


def test_every_golden_belongs_to_a_case_and_no_name_is_used_twice() -> None:
    """Leave no golden behind whose case is gone."""
    names = [case.name for group in goldens.groups() for case in group]
    assert len(names) == len(set(names))
    assert {path.stem for path in goldens.FOLDER.glob("*.json")} == set(names)
