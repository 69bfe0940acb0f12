"""The command line prints the same numbers for a small home of trained runs as before."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import goldens
from tests.goldens import Case

TOLERANCE = 1e-6
"""Relative difference allowed with other versions of the numerical packages."""
LONG = {"next-both", "next-exponent", "next-exponent-dear", "compare-file", "compare-file-markdown"}
LONG |= {f"fit-isoflop-{kind}" for kind in ("coupled", "paper", "power", "total")}
LONG |= {f"fit-{name}" for name in ("both", "file", "file-core", "file-paper", "imported", "mixed")}
LONG |= {f"fit-ladder-{kind}" for kind in ("loss", "matrices", "power", "total")}
LONG |= {"fit-crippled", "fit-miniseries", "compare-crippled-seeds", "compare-text"}
LONG |= {f"compare-{pair}-markdown" for pair in ("crippled-seeds", "ladder-crippled")}
LONG |= {f"next-{target}" for target in ("beta", "compute", "multiplier", "text")}
"""Cases that take seconds each and repeat what a shorter case shows; they run in `make soak`."""
CASES = [case for group in goldens.groups() for case in group]
SHORT = [case for case in CASES if case.name not in LONG and not case.needs_reference]
SOAK = [case for case in CASES if case not in SHORT]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """Run every short case once."""
    return goldens.outcomes(SHORT)


@pytest.fixture(scope="module")
def soak_outcomes() -> dict[str, dict[str, Any]]:
    """Run the other cases once: all of them, or those that need no published figures."""
    return goldens.outcomes(case for case in goldens.cases() if case in SOAK)


@pytest.fixture(scope="session")
def tolerance() -> float:
    """Require equal digits with the packages that made the goldens, else nearly equal ones."""
    return 0.0 if json.loads(goldens.VERSIONS.read_text()) == goldens.versions() else TOLERANCE


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_a_command_prints_the_golden_values(
    case: Case, outcomes: dict[str, dict[str, Any]], tolerance: float
) -> None:
    """Compare keys, numbers, codes and the exit code of one command with its golden."""
    assert goldens.compared(case, outcomes[case.name], tolerance) == []


@pytest.mark.soak
@pytest.mark.parametrize("case", SOAK, ids=lambda case: case.name)
def test_a_long_command_prints_the_golden_values(
    case: Case,
    soak_outcomes: dict[str, dict[str, Any]],
    tolerance: float,
    request: pytest.FixtureRequest,
) -> None:
    """Compare a long case, or a case of published figures, with its golden."""
    if case.needs_reference:
        request.getfixturevalue("reference")
    assert goldens.compared(case, soak_outcomes[case.name], tolerance) == []


def test_every_golden_belongs_to_a_case_and_no_name_is_used_twice() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert {path.stem for path in goldens.FOLDER.glob("*.json")} == set(names)
