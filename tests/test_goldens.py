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
CASES = [case for group in goldens.groups() for case in group]
HOME = [case for case in CASES if not case.needs_reference]
REFERENCE = [case for case in CASES if case.needs_reference]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """Run every case of the golden home once."""
    return goldens.outcomes(HOME)


@pytest.fixture(scope="module")
def reference_outcomes() -> dict[str, dict[str, Any]]:
    """Run every case of the published figures once."""
    if not os.environ.get("SLM_REFERENCE"):
        pytest.skip("SLM_REFERENCE is unset: no folder of published figures to compare with")
    return goldens.outcomes(REFERENCE)


@pytest.fixture(scope="session")
def tolerance() -> float:
    """Require equal digits with the packages that made the goldens, else nearly equal ones."""
    return 0.0 if json.loads(goldens.VERSIONS.read_text()) == goldens.versions() else TOLERANCE


@pytest.mark.parametrize("case", HOME, ids=lambda case: case.name)
def test_a_command_prints_the_golden_values(
    case: Case, outcomes: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """Compare keys, numbers, codes and the exit code of one command with its golden."""
    assert goldens.compared(case, outcomes[case.name], tolerance) == []


@pytest.mark.soak
@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case.name)
def test_a_command_prints_the_golden_values_of_published_figures(
    case: Case, reference_outcomes: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """Compare one import or fit of published figures with its golden."""
    assert goldens.compared(case, reference_outcomes[case.name], tolerance) == []


def test_every_golden_belongs_to_a_case_and_no_name_is_used_twice() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert {path.stem for path in goldens.FOLDER.glob("*.json")} == set(names)
