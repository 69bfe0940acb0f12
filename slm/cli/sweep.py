"""`slm sweep`: plan, record, and run or resume an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import report_line
from slm.cli.options import (
    Data,
    Json,
    RecipeName,
    depths_of,
    numbers_of,
    print_json,
    print_table,
    quantity,
    recipe_of,
    report_problems,
)

if TYPE_CHECKING:
    from slm.experiment import Asked, Experiment
    from slm.plan import Plan
    from slm.sweep import Corpora, Outcome


def sweep(
    declaration: Annotated[Path | None, typer.Argument(help="A declared experiment (experiments/*.py).")] = None,
    depths: Annotated[str | None, typer.Option(help="Depths: 10-20, or 4,8,12.")] = None,
    recipe: RecipeName = None,
    flops: Annotated[str | None, typer.Option(help="FLOPs budgets of an isoFLOP grid: 1e12,2e12.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Tokens-per-parameter ratios: 4,8,16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of smoke runs.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Repeats of every run, seeds 0, 1, …")] = 1,
    data: Data = None,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan.json: repeat its run. May be given again.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the experiment; else the recipe's or the run's.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a run; else all.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores of a run; else all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a family as recorded runs. Typed again, it trains nothing twice and finishes what is unfinished."""
    from slm.experiment import Experiment, load
    from slm.sweep import Corpora, repetition
    from store import home

    if plan:
        shaped = {"--depths": depths, "--recipe": recipe, "--flops": flops, "--ratios": ratios, "--steps": steps}
        _refuse_beside_plan(shaped | {"--seeds": None if seeds == 1 else seeds, "experiment file": declaration})
        experiment = repetition(plan, name, data)
    elif declaration is not None:
        if depths or recipe or flops or ratios or steps or seeds != 1 or name:
            raise ValueError(f"{declaration} declares the runs: only --data, --gpus, --cores and --dry-run go with it")
        experiment = load(declaration)
    else:
        if depths is None:
            raise ValueError("no --depths: write `slm sweep --depths 2-6`, or name a file of experiments/")
        family = recipe_of(recipe, gpu_asked=gpus is not None)
        experiment = Experiment(
            name=name or family.name,
            recipes=(family,),
            depths=depths_of(depths),
            flops=numbers_of("--flops", flops),
            ratios=numbers_of("--ratios", ratios),
            steps=steps,
            seeds=tuple(range(seeds)),
        )
    if data:
        from dataclasses import replace

        experiment = replace(experiment, data=data)
    corpora = Corpora(experiment, home())
    if dry_run:
        _print_plan(experiment, corpora, as_json)
    else:
        _run(experiment, corpora, gpus, cores, as_json)


def _refuse_beside_plan(options: dict[str, Any]) -> None:
    """Refuse what says how a run is to be: its plan does."""
    for option, value in options.items():
        if value is not None:
            others = "only --data, --name, --gpus, --cores, --dry-run and --json go with it"
            raise ValueError(f"{option} {value}: --plan holds the whole run, {others}")


def _print_plan(experiment: Experiment, corpora: Corpora, as_json: bool) -> None:
    """The runs of an experiment, without touching anything."""
    rows = [_planned(asked, corpora) for asked in experiment.asked()]
    if as_json:
        print_json({"experiment": experiment.name, "data": experiment.data, "runs": rows})
        return
    print(f"experiment {experiment.name}: {len(rows)} runs, {sum(row['flops'] for row in rows):.3g} FLOPs in all")
    headers = ["run", "recipe", "d", "horizon", "seed", "N", "tokens", "batch", "steps", "FLOPs", "epochs", "state"]
    print_table([_plan_cells(row) for row in rows], headers)


def _planned(asked: Asked, corpora: Corpora) -> dict[str, Any]:
    from slm.sweep import is_done, plan_of
    from store import home

    given = asked.hyperparameters
    row: dict[str, Any] = {"run_id": None, "recipe": asked.recipe, "depth": given.depth, "horizon": asked.horizon}
    row |= {"seed": asked.seed, "parameters_scaling": given.parameters.scaling, "tokens": given.tokens}
    row |= {"batch_tokens": given.batch_tokens, "steps": given.steps, "flops": given.flops, "epochs": None}
    prepared = corpora.find(asked)
    plan = plan_of(asked, prepared) if prepared else asked.plan
    state = "to do" if prepared else "data not prepared"
    if plan is None:
        return row | {"state": state}
    done = is_done(home(), plan.run_id)
    return row | {"run_id": plan.run_id, "epochs": plan.data.epochs, "state": "done" if done else state}


def _plan_cells(row: dict[str, Any]) -> list[str | None]:
    epochs = None if row["epochs"] is None else f"{row['epochs']:.2f}"
    return [
        row["run_id"],
        row["recipe"],
        str(row["depth"]),
        row["horizon"],
        str(row["seed"]),
        quantity(row["parameters_scaling"]),
        quantity(row["tokens"]),
        f"{row['batch_tokens']:,}",
        f"{row['steps']:,}",
        f"{row['flops']:.3g}",
        epochs,
        row["state"],
    ]


def _run(experiment: Experiment, corpora: Corpora, gpus: int | None, cores: int | None, as_json: bool) -> None:
    """Prepare, plan, record and train; exit code 1 unless every run is done."""
    import store
    from slm import launch, sweep
    from slm.progress import Display

    where, home = launch.slot(gpus, cores), store.home()
    with sweep.conducting(home):
        plans = sweep.make_plans(experiment, lambda asked: corpora.prepare(asked, report_line))
        done = {plan.run_id for plan in plans if sweep.is_done(home, plan.run_id)}
        for plan in plans:
            if plan.run_id not in done:
                launch.micro_batch(plan.hyperparameters, where)  # refuses what memory does not hold
        sweep.record(experiment, plans, home)
        report_line(_opening(experiment, plans, done, where))
        with Display(plans, done) as display:
            outcome = sweep.run_all(plans, corpora, home, where, display, lambda: _ingest(home))
        _ingest(home)
    _print_outcome(experiment, outcome, home, as_json)
    if outcome.not_finished:
        raise typer.Exit(1)


def _opening(experiment: Experiment, plans: list[Plan], done: set[str], where: Any) -> str:
    left = sum(plan.hyperparameters.flops for plan in plans if plan.run_id not in done)
    recipes = ", ".join(experiment.families)
    runs = f"{len(plans)} runs, {len(done)} done already, {left:.3g} FLOPs to go"
    what = f"experiment {experiment.name} (recipe {recipes}, data {experiment.data})"
    return f"{what}: {runs}, on {where.ranks} x {where.device}"


def _ingest(home: Path) -> None:
    """Bring the database up to date; training goes on when that fails, and the files hold everything."""
    import store

    try:
        problems = store.ingest(home).problems
    except (store.StoreError, OSError) as error:
        problems = [str(error)]
    report_problems(problems)


def _print_outcome(experiment: Experiment, outcome: Outcome, home: Path, as_json: bool) -> None:
    from slm import events

    finished = [*outcome.already_done, *outcome.trained]
    runs = [events.read_json(home / run_id / "done.json") for run_id in finished]
    if as_json:
        keys = ("run_id", "val_bpb", "tokens", "flops", "train_seconds")
        document = {
            "experiment": experiment.name,
            "home": str(home),
            "already_done": outcome.already_done,
            "trained": outcome.trained,
            "not_finished": outcome.not_finished,
            "runs": [{key: run[key] for key in keys} for run in runs],
        }
        print_json(document)
        return
    if outcome.trained:
        print(f"trained {len(outcome.trained)} runs, {len(outcome.already_done)} were done already")
    elif not outcome.not_finished:
        print(f"nothing to train: all {len(outcome.already_done)} runs were done already")
    for run_id, why in outcome.not_finished.items():
        print(f"{run_id} not finished: {why}")
