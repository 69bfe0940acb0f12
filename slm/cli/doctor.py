"""`slm doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from typer import Exit, Option

from slm.cli.data import CORE_URL
from slm.cli.options import Data, Declaration, Json, RecipeName, print_result
from slm.cli.sweep import Request
from store import home


def doctor(
    declaration: Declaration = None,
    depths: Annotated[str | None, Option(help="Depths of a plan: 10-20, or 4,8,12.")] = None,
    recipe: RecipeName = None,
    flops: Annotated[str | None, Option(help="FLOPs budgets of a plan: 1e12,2e12.")] = None,
    ratios: Annotated[
        str | None, Option(help="Tokens-per-parameter ratios of a plan: 4,8,16.")
    ] = None,
    data: Data = None,
    core: Annotated[
        bool, Option("--core", help="Check that the plan can be evaluated with CORE, too.")
    ] = False,
    online: Annotated[
        bool, Option("--online", help="Check that the CORE bundle can be downloaded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine and home, and a plan if named; exit code 1 if there is a problem."""
    from slm import doctor

    checks = doctor.machine_checks(home(), CORE_URL if online else None)
    request = Request(declaration, depths, recipe, flops, ratios, data=data)
    if request != Request():
        checks += doctor.plan_checks(request.experiment(), home(), core)
    elif core:
        raise ValueError("--core needs a plan: name --depths, or a file of experiments/")
    checks.append(("torch", doctor.torch_loads))
    findings = []
    for finding in doctor.examine(checks):
        findings.append(finding)
        if not as_json:
            print(f"{finding.state:8}{finding.check:14}{finding.message}", flush=True)
    counts = Counter(finding.state for finding in findings)
    print_result(
        as_json,
        {"problems": counts["problem"], "checks": [finding._asdict() for finding in findings]},
        f"\n{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok",
    )
    if counts["problem"]:
        raise Exit(1)
