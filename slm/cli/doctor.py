"""`slm doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.data import CORE_URL
from slm.cli.options import Data, Json, RecipeName, depths_of, numbers_of, print_json, recipe_of

if TYPE_CHECKING:
    from slm.experiment import Experiment


def doctor(
    declaration: Annotated[
        Path | None, typer.Argument(help="A declared experiment (experiments/*.py).")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Depths of a plan: 10-20, or 4,8,12.")] = None,
    recipe: RecipeName = None,
    flops: Annotated[str | None, typer.Option(help="FLOPs budgets of a plan: 1e12,2e12.")] = None,
    ratios: Annotated[
        str | None, typer.Option(help="Tokens-per-parameter ratios of a plan: 4,8,16.")
    ] = None,
    data: Data = None,
    core: Annotated[
        bool, typer.Option("--core", help="Check that the plan can be evaluated with CORE, too.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Check that the CORE bundle can be downloaded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine and home, and a plan if named; exit code 1 if there is a problem."""
    from dataclasses import asdict

    from slm import doctor
    from store import home

    experiment = _experiment(declaration, depths, recipe, (flops, ratios), data)
    if core and experiment is None:
        raise ValueError("--core needs a plan: name --depths, or a file of experiments/")
    checks = doctor.machine_checks(home(), CORE_URL if online else None)
    if experiment:
        checks += doctor.plan_checks(experiment, home(), core)
    checks.append(("torch", doctor.torch_loads))
    findings = []
    for finding in doctor.examine(checks):
        findings.append(finding)
        if not as_json:
            print(f"{finding.state:8}{finding.check:14}{finding.message}", flush=True)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        documents = [asdict(finding) for finding in findings]
        print_json({"problems": counts["problem"], "checks": documents})
    else:
        print(f"\n{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok")
    if counts["problem"]:
        raise typer.Exit(1)


def _experiment(
    declaration: Path | None,
    depths: str | None,
    recipe: str | None,
    horizons: tuple[str | None, str | None],
    data: str | None,
) -> Experiment | None:
    """Return the experiment that is named, if any. Raises ValueError for options that conflict."""
    from dataclasses import replace

    from slm.experiment import Experiment, load

    if declaration is not None:
        if depths or recipe or any(horizons):
            raise ValueError(f"{declaration} declares the runs: only --data and --core go with it")
        experiment = load(declaration)
    elif depths is None:
        if recipe or any(horizons) or data:
            raise ValueError(
                "a plan needs --depths: write `slm doctor --depths 2-6`, "
                "or name a file of experiments/"
            )
        return None
    else:
        family = recipe_of(recipe)
        flops, ratios = horizons
        experiment = Experiment(
            family.name,
            (family,),
            depths_of(depths),
            flops=numbers_of("--flops", flops),
            ratios=numbers_of("--ratios", ratios),
        )
    return replace(experiment, data=data) if data else experiment
