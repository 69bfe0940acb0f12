"""`slm sweep`: plan, record, and run or resume an experiment."""

from __future__ import annotations

import shlex
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import report_line
from slm.cli.options import (
    Data,
    Json,
    RecipeName,
    TokenizerName,
    depths_of,
    numbers_of,
    print_json,
    recipe_of,
    records,
    report_problems,
)
from slm.files import read_json

if TYPE_CHECKING:
    from slm.evaluate.request import Wanted
    from slm.experiment import Experiment
    from slm.hardware.runtime import Price, RuntimeModel
    from slm.monitor.display import Display
    from slm.monitor.follow import View
    from slm.plan import Plan
    from slm.sweep.local import Local
    from slm.sweep.micro_batch import MicroBatches
    from slm.sweep.orchestrator import Outcome
    from slm.sweep.planning import Corpora
    from slm.sweep.slurm import Slurm


Cores = dict[str, dict[str, Any]]
"""What is measured beside val_bpb, by run_id, as attempt.json has it."""
PATIENCE = 2.0
"""Seconds that an ingest waits for another writer: the sweep has more to do, and comes again."""


def sweep(
    declaration: Annotated[
        Path | None, typer.Argument(help="A declared experiment (experiments/*.py).")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Depths: 10-20, or 4,8,12.")] = None,
    recipe: RecipeName = None,
    flops: Annotated[
        str | None, typer.Option(help="FLOPs budgets of an isoFLOP grid: 1e12,2e12.")
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="Tokens-per-parameter ratios: 4,8,16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of smoke runs.")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Repeats of every run, seeds 0, 1, …")
    ] = 1,
    data: Data = None,
    tokenizer: TokenizerName = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan.json: repeat its run. May be given again.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the experiment; else the recipe's or the run's.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to use; else all.")] = None,
    gpus_per_run: Annotated[
        str, typer.Option(help="GPUs of a run: auto (soonest end), all, or a number.")
    ] = "auto",
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores to use; else all.")] = None,
    cores_per_run: Annotated[
        str, typer.Option(help="Cores of a run: auto (soonest end), all, or a number.")
    ] = "auto",
    gpu: Annotated[
        str, typer.Option(help="GPU to plan for where there is none: H100, A100, …")
    ] = "H100",
    launcher: Annotated[
        str, typer.Option(help="local: this machine; slurm: a job of a cluster for each run.")
    ] = "local",
    nodes: Annotated[int, typer.Option(help="Slurm: machines of one run.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="Slurm: GPUs of one run on each node; 0 for cores.")
    ] = 0,
    cores_per_node: Annotated[
        int | None, typer.Option(help="Slurm: cores on each; else 4 a GPU, or one.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: as sbatch takes it.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: as sbatch takes it.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: as sbatch takes it.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Slurm: limit of a job, which then goes back to the queue.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Slurm: in the queue at once, at most.")
    ] = None,
    sbatch: Annotated[
        str, typer.Option(help='Slurm: more options, "--mem=64G --constraint=a100".')
    ] = "",
    price: Annotated[
        str | None, typer.Option(help="24/h for the machine, or 3/gpu/h: the plan has costs.")
    ] = None,
    core: Annotated[
        bool, typer.Option("--core", help="Measure CORE at the end of every run, too.")
    ] = False,
    bundle: Annotated[
        str | None,
        typer.Option(
            help="CORE: name or id of a bundle; else pocket-core for pocket.", metavar="NAME"
        ),
    ] = None,
    core_every: Annotated[
        int | None, typer.Option(min=1, help="CORE: after every so many steps, too.")
    ] = None,
    core_max_per_task: Annotated[
        int | None, typer.Option(min=1, help="CORE: examples of each task; else all.")
    ] = None,
    core_without: Annotated[
        str | None, typer.Option(help="CORE: all tasks but these: a,b.", metavar="TASKS")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start without asking, however long it takes.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go on in the background; `slm status` shows it.")
    ] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Mirror the runs on Weights & Biases, offline too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a family as recorded runs. Typed again, it trains nothing twice and finishes what is unfinished."""
    from slm.evaluate.request import wanted
    from slm.experiment import Experiment, load
    from slm.hardware.runtime import RuntimeModel, parse_price
    from slm.sweep import preview as planning
    from slm.sweep.planning import Corpora, repetition
    from store import home

    if plan:
        shaped: dict[str, Any] = {
            "--depths": depths,
            "--recipe": recipe,
            "--flops": flops,
            "--ratios": ratios,
        }
        shaped |= {"--steps": steps, "--seeds": _given(seeds, 1), "experiment file": declaration}
        others = "only --data, --tokenizer, --name, --dry-run, --json and where it runs go with it"
        _refuse(shaped, f"--plan holds the whole run, {others}")
        experiment = repetition(plan, name, data)
    elif declaration is not None:
        if depths or recipe or flops or ratios or steps or seeds != 1 or name:
            raise ValueError(
                f"{declaration} declares the runs: only --data, --tokenizer, --dry-run and where they run go with it"
            )
        experiment = load(declaration)
    else:
        if depths is None:
            raise ValueError(
                "no --depths: write `slm sweep --depths 2-6`, or name a file of experiments/"
            )
        family = recipe_of(recipe, gpu_asked=bool(gpus or gpus_per_node))
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
        experiment = replace(experiment, data=data)
    if tokenizer:
        experiment = replace(experiment, tokenizer=tokenizer)
    measured = wanted(core, bundle, core_every, core_max_per_task, core_without)
    if measured:
        measured.check(home(), [family.name for family in experiment.recipes])
    corpora, estimates = Corpora(experiment, home()), RuntimeModel(home())
    asked_price = parse_price(price) if price else None
    own = {"--gpus": gpus, "--cores": cores}
    own |= {
        "--gpus-per-run": _given(gpus_per_run, "auto"),
        "--cores-per-run": _given(cores_per_run, "auto"),
    }
    named = {"partition": partition, "account": account, "qos": qos, "time": time}
    clusters = {f"--{option}": value for option, value in named.items()} | {
        "--nodes": _given(nodes, 1)
    }
    clusters |= {"--gpus-per-node": gpus_per_node or None, "--cores-per-node": cores_per_node}
    clusters |= {"--jobs": jobs, "--sbatch": sbatch or None}
    if launcher == "slurm":
        _refuse(
            own, "is of this machine: a cluster takes --nodes, --gpus-per-node and --cores-per-node"
        )
        where: Local | Slurm = _slurm(
            (nodes, gpus_per_node, cores_per_node), gpu, named, sbatch, jobs, estimates
        )
    elif launcher == "local":
        _refuse(clusters, "is of a cluster: say --launcher slurm, too")
        where = _local(
            gpus, cores, (gpus_per_run, cores_per_run), gpu if dry_run else None, estimates
        )
    else:
        raise ValueError(f"--launcher {launcher}: choose local or slurm")
    if dry_run:
        planned = planning.planned(experiment, corpora, where, asked_price, home())
        if as_json:
            print_json(planning.document(planned))
            return
        planning.show(planned, print)
        if measured and planned.forecast.shares:
            print(measured.in_words())
    else:
        _run(experiment, corpora, where, asked_price, measured, yes, detach, wandb, as_json)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that were given. Raises ValueError naming the first."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} {value}: {why}")


def _given(value: Any, default: Any) -> Any:
    """A value, None where it is the default."""
    return None if value == default else value


def _local(
    gpus: int | None,
    cores: int | None,
    per_run: tuple[str, str],
    gpu: str | None,
    estimates: RuntimeModel,
) -> Local:
    """This machine's devices; GPUs of a name where a plan alone is asked and there are none."""
    from slm.hardware import devices
    from slm.sweep import local
    from store import home

    if gpu and gpus and cores is None and not devices.gpu_count() and not devices.apple_gpu():
        machine = local.imagined(gpus, gpu)
    else:
        machine = local.machine(gpus, cores)
    asked, other = reversed(per_run) if machine.device == "cpu" else per_run
    option, has = (
        ("--gpus-per-run", "cores") if machine.device == "cpu" else ("--cores-per-run", "GPUs")
    )
    _refuse({option: _given(other, "auto")}, f"runs take {has} here: say --{has.lower()}-per-run")
    return local.Local(machine, local.sizes(asked, machine), estimates, _memory(home()))


def _slurm(
    shape: tuple[int, int, int | None],
    gpu: str,
    asked: dict[str, Any],
    options: str,
    jobs: int | None,
    estimates: RuntimeModel,
) -> Slurm:
    """Nodes of a cluster, GPUs and cores on each."""
    from slm.hardware import devices
    from slm.sweep import local
    from slm.sweep.slurm import Cluster, Slurm
    from store import home

    memory = local.imagined(1, gpu).memory if shape[1] else None
    name = gpu if shape[1] else devices.name("cpu")
    try:
        words = tuple(shlex.split(options))
    except ValueError as error:
        raise ValueError(f"--sbatch {options}: {error}") from None
    cluster = Cluster(*shape, device_name=name, memory=memory, **asked, options=words)
    return Slurm(cluster, estimates, _memory(home()), report_line, jobs)


def _run(
    experiment: Experiment,
    corpora: Corpora,
    launcher: Local | Slurm,
    price: Price | None,
    measured: Wanted | None,
    yes: bool,
    detach: bool,
    wandb: bool,
    as_json: bool,
) -> None:
    """Prepare, plan, record and train; exit code 1 unless every run is done."""
    from slm.monitor.display import Display
    from slm.monitor.wandb_logger import check_installed
    from slm.sweep import planning as sweep
    from slm.sweep import preview as plan
    from slm.sweep.slurm import Slurm
    from store import home

    if detach and as_json:
        raise ValueError("--detach --json: choose one; `slm status --json` says how the runs are")
    if detach and wandb and isinstance(launcher, Slurm):
        raise ValueError(
            "--detach --wandb: choose one; nobody here hears what jobs on a cluster write"
        )
    if wandb:
        check_installed()
    if isinstance(launcher, Slurm):
        launcher.check()
    plans = sweep.make_plans(experiment, lambda asked: corpora.prepare(asked, report_line))
    cores = {
        own.run_id: measured.of(own, home(), partial(corpora.prepared, own))
        for own in plans
        if measured
    }
    planned = plan.planned(experiment, corpora, launcher, price, home())
    plan.show(planned, report_line)
    if measured and planned.forecast.shares:
        report_line(measured.in_words())
    plan.ask(planned.forecast, yes)
    sweep.record(experiment, plans, home())
    if detach and isinstance(launcher, Slurm):
        _submit(plans, corpora, launcher, cores)
        return
    if detach:
        _detach(home())
        return
    done = {row.name for row in planned.rows if not row.waiting}
    with Display(plans, done) as display, _mirrored(display, experiment, wandb) as view:
        outcome = _conduct(plans, corpora, launcher, view, cores)
    _print_outcome(experiment, outcome, home(), as_json)
    _report_without_core(outcome, cores, home())
    if outcome.not_finished:
        raise typer.Exit(1)


def _mirrored(
    display: Display, experiment: Experiment, wandb: bool
) -> AbstractContextManager[View]:
    """What the conductor tells: the display, and through a mirror Weights & Biases."""
    from slm.monitor.wandb_logger import WandbLogger
    from store import home

    return WandbLogger(display, experiment.name, home()) if wandb else nullcontext(display)


def _conduct(
    plans: list[Plan], corpora: Corpora, launcher: Local | Slurm, view: View, cores: Cores
) -> Outcome:
    """Train, when nobody else sweeps this home; until then show what they do."""
    from slm.monitor import follow
    from slm.sweep import orchestrator as conduct
    from store import home

    while True:
        with conduct.sweep_lock(home()) as ours:
            if ours:
                ingest = partial(_ingest, home())
                return conduct.Orchestrator(
                    plans, corpora.of, home(), launcher, view, ingest, cores=cores
                ).run()
        mine = "shown until it ends, then this sweep goes on"
        view.note(f"{home()} is being swept by process {conduct.conductor(home())}: {mine}")
        others = follow.unfinished(home())
        follow.watch(others, home(), view, until=lambda: conduct.conductor(home()) is None)


def _submit(plans: list[Plan], corpora: Corpora, launcher: Slurm, cores: Cores) -> None:
    """Leave every run that is left to the cluster."""
    from slm.monitor.display import Display
    from slm.sweep import orchestrator as conduct
    from store import home

    with conduct.sweep_lock(home()) as ours:
        if not ours:
            raise RuntimeError(
                f"{home()} is being swept by process {conduct.conductor(home())}: wait for it, or stop it"
            )
        display = Display(plans, set())
        left = conduct.Orchestrator(
            plans, corpora.of, home(), launcher, display, lambda: None, cores=cores
        ).submit()
    if left:
        raise RuntimeError(
            f"{len(left)} runs are not submitted ({', '.join(left)}): the same command submits them"
        )
    report_line("submitted: `slm status` shows them, and the same command takes up what failed")


def _detach(home: Path) -> None:
    """The same command again, in a session of its own."""
    command = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = home / "sweep.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "slm",
                *command,
                *([] if "--yes" in command else ["--yes"]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    report_line(
        f"goes on as process {process.pid}, which writes {log}; `slm status --watch` shows it"
    )


def _memory(home: Path) -> MicroBatches:
    """What was found too much for devices before."""
    import store
    from slm.sweep.micro_batch import MicroBatches

    try:
        return MicroBatches(records(store.sql("select * from micro_batches", home=home)))
    except (
        store.StoreError
    ):  # there is no database yet, or the next ingest says what is wrong with it
        return MicroBatches()


def _ingest(home: Path) -> None:
    """Bring the database up to date; training goes on when that fails, and the files hold everything."""
    import store

    try:
        problems = store.ingest(home, patience=PATIENCE).problems
    except (store.StoreError, OSError) as error:
        problems = [str(error)]
    report_problems(problems)


def _report_without_core(outcome: Outcome, cores: Cores, home: Path) -> None:
    """Say which finished runs have no value: those that finished before it was asked, or could not be measured."""
    from slm.evaluate.request import without_value

    finished = [
        home / run_id for run_id in (*outcome.already_done, *outcome.trained) if run_id in cores
    ]
    if left := without_value(finished, cores):
        asked = cores[left[0]]
        way = f"slm eval RUN --core --bundle {asked['bundle']}"
        way += f" --max-per-task {asked['max_per_task']}" if asked["max_per_task"] else ""
        way += f" --without {','.join(asked['without'])}" if asked["without"] else ""
        report_line(f"without the value asked: {', '.join(left)}; `{way}` measures it")


def _print_outcome(experiment: Experiment, outcome: Outcome, home: Path, as_json: bool) -> None:

    finished = [*outcome.already_done, *outcome.trained]
    runs = [read_json(home / run_id / "done.json") for run_id in finished]
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
