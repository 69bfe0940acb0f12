"""`slm sweep`: plan, record, and run or resume an experiment."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import (
    Data,
    Json,
    RecipeName,
    TokenizerName,
    depths_of,
    numbers_of,
    print_json,
    recipe_of,
    table,
)
from slm.files import read_json
from slm.monitor.progress import report_line
from slm.text import duration, plural

if TYPE_CHECKING:
    from slm.evaluate.request import CoreRequest
    from slm.experiment import Experiment
    from slm.hardware.runtime import Price, RuntimeModel
    from slm.monitor.display import Display
    from slm.monitor.follow import View
    from slm.sweep.local import Local
    from slm.sweep.orchestrator import Outcome, Sweep
    from slm.sweep.planning import Planner
    from slm.sweep.preview import Preview
    from slm.sweep.slurm import Slurm

CONFIRM_SECONDS = 86400.0
"""Length of a sweep that asks before it starts."""
MIN_CHART_COLUMNS = 20
SHAPE = ("depths", "recipe", "flops", "ratios", "steps", "seeds")
"""Options that a declared experiment or a plan settles."""
MACHINE = ("gpus", "gpus_per_run", "cores", "cores_per_run")
CLUSTER = (
    "nodes",
    "gpus_per_node",
    "cores_per_node",
    "partition",
    "account",
    "qos",
    "time",
    "jobs",
    "sbatch",
)
GROUPS = {
    "What to run": ("declaration", *SHAPE, "data", "tokenizer", "plan", "name"),
    "Where it runs": ("launcher", *MACHINE, "gpu", "price"),
    "Slurm": CLUSTER,
    "CORE": ("core", "bundle", "core_every", "core_max_per_task", "core_without"),
    "How it runs": ("dry_run", "yes", "detach", "wandb", "as_json"),
}
"""Groups of options in `slm sweep --help`."""


@dataclass(frozen=True)
class Request:
    """Options that say what to run."""

    declaration: Path | None = None
    depths: str | None = None
    recipe: str | None = None
    flops: str | None = None
    ratios: str | None = None
    steps: int | None = None
    seeds: int = 1
    data: str | None = None
    tokenizer: str | None = None
    plan: list[Path] | None = None
    name: str | None = None

    def experiment(self, has_gpus: bool) -> Experiment:
        """Return the experiment. `has_gpus`: whether GPUs are named, for the default recipe."""
        experiment = self._experiment(has_gpus)
        if self.data:
            experiment = replace(experiment, data=self.data)
        if self.tokenizer:
            experiment = replace(experiment, tokenizer=self.tokenizer)
        return experiment

    def _experiment(self, has_gpus: bool) -> Experiment:
        from slm.experiment import Experiment, load
        from slm.sweep.planning import repeat_plans

        if self.plan:
            why = (
                "--plan holds the whole run; only --data, --tokenizer, --name "
                "and where it runs go with it"
            )
            _refuse(self, SHAPE, why)
            if self.declaration:
                raise ValueError(f"{self.declaration}: {why}")
            return repeat_plans(self.plan, self.name, self.data)
        if self.declaration is not None:
            why = (
                f"{self.declaration} declares the runs; only --data, --tokenizer "
                "and where they run go with it"
            )
            _refuse(self, (*SHAPE, "name"), why)
            return load(self.declaration)
        if self.depths is None:
            raise ValueError(
                "no --depths: write `slm sweep --depths 2-6`, or name a file of experiments/"
            )
        recipe = recipe_of(self.recipe, needs_gpu=has_gpus)
        return Experiment(
            name=self.name or recipe.name,
            recipes=(recipe,),
            depths=depths_of(self.depths),
            flops=numbers_of("--flops", self.flops),
            ratios=numbers_of("--ratios", self.ratios),
            steps=self.steps,
            seeds=tuple(range(self.seeds)),
        )


@dataclass(frozen=True)
class Placement:
    """Options that say where runs train."""

    launcher: str = "local"
    gpus: int | None = None
    gpus_per_run: str = "auto"
    cores: int | None = None
    cores_per_run: str = "auto"
    gpu: str = "H100"
    nodes: int = 1
    gpus_per_node: int = 0
    cores_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    jobs: int | None = None
    sbatch: str = ""

    def make_launcher(self, runtime: RuntimeModel, home: Path, dry_run: bool) -> Local | Slurm:
        """Return the launcher. A dry run may plan for GPUs that this machine does not have."""
        if self.launcher == "slurm":
            return self._slurm(runtime, home)
        if self.launcher == "local":
            return self._local(runtime, home, dry_run)
        raise ValueError(f"--launcher {self.launcher}: choose local or slurm")

    def _local(self, runtime: RuntimeModel, home: Path, dry_run: bool) -> Local:
        from slm.hardware import devices
        from slm.sweep.local import Local, planned_machine, this_machine
        from slm.sweep.micro_batch import MicroBatches

        _refuse(self, CLUSTER, "an option of clusters; add --launcher slurm")
        has_gpus = devices.gpu_count() or devices.apple_gpu()
        if dry_run and self.gpus and self.cores is None and not has_gpus:
            machine = planned_machine(self.gpus, self.gpu)
        else:
            machine = this_machine(self.gpus, self.cores)
        if machine.device == "cpu":
            _refuse(self, ("gpus_per_run",), "runs take cores here; use --cores-per-run")
            sizes = machine.run_sizes(self.cores_per_run)
        else:
            _refuse(self, ("cores_per_run",), "runs take GPUs here; use --gpus-per-run")
            sizes = machine.run_sizes(self.gpus_per_run)
        return Local(machine, sizes, runtime, MicroBatches.from_store(home))

    def _slurm(self, runtime: RuntimeModel, home: Path) -> Slurm:
        from slm.hardware import devices
        from slm.sweep.local import planned_gpu_memory
        from slm.sweep.micro_batch import MicroBatches
        from slm.sweep.slurm import Cluster, Slurm

        _refuse(
            self,
            MACHINE,
            "an option of this machine; "
            "a cluster takes --nodes, --gpus-per-node and --cores-per-node",
        )
        try:
            options = tuple(shlex.split(self.sbatch))
        except ValueError as error:
            raise ValueError(f"--sbatch {self.sbatch}: {error}") from None
        cluster = Cluster(
            self.nodes,
            self.gpus_per_node,
            self.cores_per_node,
            self.gpu if self.gpus_per_node else devices.name("cpu"),
            planned_gpu_memory(self.gpu) if self.gpus_per_node else None,
            self.partition,
            self.account,
            self.qos,
            self.time,
            options,
        )
        return Slurm(cluster, runtime, MicroBatches.from_store(home), report_line, self.jobs)


def _refuse(options: Request | Placement, names: Sequence[str], why: str) -> None:
    """Raise ValueError for the first of these options that differs from its default."""
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name in names and value != option.default:
            raise ValueError(f"--{option.name.replace('_', '-')} {value}: {why}")


@dataclass(frozen=True)
class Mode:
    """Options that say how a sweep runs."""

    yes: bool
    detach: bool
    wandb: bool
    as_json: bool


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
        int, typer.Option(min=1, max=1000, help="Replicates of every run: seeds 0, 1, …")
    ] = Request.seeds,
    data: Data = None,
    tokenizer: TokenizerName = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan.json: repeat its run. May be repeated.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the experiment; else the recipe's or the run's.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="local: this machine; slurm: one cluster job per run.")
    ] = Placement.launcher,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs to use; else all.")] = None,
    gpus_per_run: Annotated[
        str, typer.Option(help="GPUs of a run: auto (soonest end), all, or a number.")
    ] = Placement.gpus_per_run,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores to use; else all.")] = None,
    cores_per_run: Annotated[
        str, typer.Option(help="Cores of a run: auto (soonest end), all, or a number.")
    ] = Placement.cores_per_run,
    gpu: Annotated[
        str, typer.Option(help="GPU to plan for where there is none: H100, A100, …")
    ] = Placement.gpu,
    nodes: Annotated[int, typer.Option(help="Machines of one run.")] = Placement.nodes,
    gpus_per_node: Annotated[
        int, typer.Option(help="GPUs of one run on each node; 0 for cores.")
    ] = Placement.gpus_per_node,
    cores_per_node: Annotated[
        int | None, typer.Option(help="Cores of one run on each node; else 4 per GPU, or 1.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="As for sbatch.")] = None,
    account: Annotated[str | None, typer.Option(help="As for sbatch.")] = None,
    qos: Annotated[str | None, typer.Option(help="As for sbatch.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit of a job, which is then requeued.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of jobs in the queue.")
    ] = None,
    sbatch: Annotated[
        str, typer.Option(help='More options of sbatch: "--mem=64G --constraint=a100".')
    ] = Placement.sbatch,
    price: Annotated[
        str | None, typer.Option(help="24/h for the machine, or 3/gpu/h: adds costs to the plan.")
    ] = None,
    core: Annotated[
        bool, typer.Option("--core", help="Measure CORE at the end of every run.")
    ] = False,
    bundle: Annotated[
        str | None,
        typer.Option(help="Name or id of a bundle; else pocket-core for pocket.", metavar="NAME"),
    ] = None,
    core_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two measurements during a run.")
    ] = None,
    core_max_per_task: Annotated[
        int | None, typer.Option(min=1, help="Maximum examples per task; else all.")
    ] = None,
    core_without: Annotated[
        str | None, typer.Option(help="Tasks to leave out: a,b.", metavar="TASKS")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start without asking, however long it takes.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Run in the background; `slm status` shows it.")
    ] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Log the runs to Weights & Biases too, or offline.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Train a family of models as recorded runs. Repeating the command trains only what is not
    finished.
    """
    from slm.cli.evaluate import core_request
    from slm.hardware.runtime import RuntimeModel, parse_price
    from slm.sweep.planning import Planner
    from store import home

    request = Request(
        declaration, depths, recipe, flops, ratios, steps, seeds, data, tokenizer, plan, name
    )
    cluster = (nodes, gpus_per_node, cores_per_node, partition, account, qos, time, jobs, sbatch)
    placement = Placement(launcher, gpus, gpus_per_run, cores, cores_per_run, gpu, *cluster)
    experiment = request.experiment(has_gpus=bool(gpus or gpus_per_node))
    core_options = core_request(core, bundle, core_every, core_max_per_task, core_without)
    if core_options:
        core_options.check_installed(home(), [family.name for family in experiment.recipes])
    planner = Planner(experiment, home())
    cost = parse_price(price) if price else None
    target = placement.make_launcher(RuntimeModel(home()), home(), dry_run)
    if dry_run:
        _print_plan(planner, target, cost, core_options, as_json)
    else:
        _train(planner, target, cost, core_options, Mode(yes, detach, wandb, as_json))


def _print_plan(
    planner: Planner,
    launcher: Local | Slurm,
    price: Price | None,
    core_request: CoreRequest | None,
    as_json: bool,
) -> None:
    from slm.sweep.preview import preview
    from store import home

    plan = preview(planner.experiment, planner.runs(), launcher, price, home())
    if as_json:
        print_json(plan.document())
        return
    print("\n".join(_plan_lines(plan, core_request)))


def _plan_lines(plan: Preview, core_request: CoreRequest | None) -> list[str]:
    rows = plan.table()
    columns = max(MIN_CHART_COLUMNS, shutil.get_terminal_size((100, 24)).columns)
    lines = [table([list(row.values()) for row in rows], list(rows[0])), *plan.lines(columns)]
    if core_request and plan.forecast.runs:
        lines.append(core_request.describe())
    return lines


def _train(
    planner: Planner,
    launcher: Local | Slurm,
    price: Price | None,
    core_request: CoreRequest | None,
    mode: Mode,
) -> None:
    """Prepare, plan, record and train; exit code 1 unless every run is finished."""
    from slm.monitor.display import Display
    from slm.sweep.orchestrator import Sweep, train
    from slm.sweep.planning import plans_of, record
    from slm.sweep.preview import preview
    from slm.sweep.slurm import Slurm
    from store import home

    # 1) refuse what cannot run, before data are prepared
    _check_mode(mode, launcher)

    # 2) prepare the data, show the plan and ask
    runs = planner.prepare(report_line)
    plans = plans_of(runs)
    plan = preview(planner.experiment, runs, launcher, price, home())
    core = {}
    if core_request:
        for each in plans:
            core[each.run_id] = core_request.for_run(each, home(), partial(planner.dataset, each))
    for line in _plan_lines(plan, core_request):
        report_line(line)
    _confirm(plan.forecast.seconds, mode.yes)

    # 3) train: as jobs of a cluster, in the background, or here
    record(planner.experiment, plans, home())
    work = Sweep(plans, home(), planner.dataset, core)
    if mode.detach and isinstance(launcher, Slurm):
        _submit(work, launcher)
        return
    if mode.detach:
        _detach(home())
        return
    done = {row.name for row in plan.rows if not row.waiting}
    with Display(plans, done) as display, _logged(display, planner.experiment, mode) as view:
        outcome = train(work, launcher, view)
    _print_outcome(planner.experiment, outcome, mode.as_json)
    _report_missing_core(outcome, work)
    if outcome.not_finished:
        raise typer.Exit(1)


def _detach(home: Path) -> None:
    """Run this command again in the background, without questions."""
    from slm.sweep.orchestrator import run_in_background

    arguments = [argument for argument in sys.argv[1:] if argument not in ("--detach", "--yes")]
    log = home / "sweep.log"
    process = run_in_background([*arguments, "--yes"], log)
    report_line(
        f"running in the background as process {process}, with output in {log}; "
        "`slm status --watch` shows it"
    )


def _check_mode(mode: Mode, launcher: Local | Slurm) -> None:
    """Raise ValueError for options that exclude each other, and for a cluster or package that is
    missing.
    """
    from slm.monitor.wandb_logger import check_installed
    from slm.sweep.slurm import Slurm

    if mode.detach and mode.as_json:
        raise ValueError("--detach --json: choose one; `slm status --json` shows the runs")
    if mode.detach and mode.wandb and isinstance(launcher, Slurm):
        raise ValueError("--detach --wandb: choose one; no process here follows detached jobs")
    if mode.wandb:
        check_installed()
    if isinstance(launcher, Slurm):
        launcher.check()


def _confirm(seconds: float, yes: bool) -> None:
    """Ask before a long sweep. Raises ValueError without a terminal, typer.Abort for a no."""
    if yes or seconds <= CONFIRM_SECONDS:
        return
    if not sys.stdin.isatty():
        raise ValueError(
            f"the plan takes about {duration(seconds)}: --yes starts it without asking"
        )
    typer.confirm(f"about {duration(seconds)}: start?", abort=True, err=True)


def _logged(display: Display, experiment: Experiment, mode: Mode) -> AbstractContextManager[View]:
    """Return the view of a sweep: the display, behind Weights & Biases if requested."""
    from slm.monitor.wandb_logger import WandbLogger
    from store import home

    return WandbLogger(display, experiment.name, home()) if mode.wandb else nullcontext(display)


def _submit(work: Sweep, launcher: Slurm) -> None:
    """Submit every run that waits, and leave the rest to the cluster."""
    from slm.monitor.display import Display
    from slm.sweep.orchestrator import submit

    waiting = submit(work, launcher, Display(work.plans, set()))
    if waiting:
        raise RuntimeError(
            f"{plural(len(waiting), 'run')} not submitted ({', '.join(waiting)}): "
            "repeat the command to submit them"
        )
    report_line("submitted: `slm status` shows them; repeat the command to retry what failed")


def _report_missing_core(outcome: Outcome, work: Sweep) -> None:
    """Name the finished runs without the requested CORE: finished earlier, or not measurable."""
    from slm.evaluate.records import runs_without_record

    finished = [*outcome.already_done, *outcome.trained]
    folders = [work.home / run_id for run_id in finished if run_id in work.core]
    if missing := runs_without_record(folders, work.core):
        command = work.core[missing[0]].eval_command("RUN")
        report_line(f"without the requested CORE: {', '.join(missing)}; `{command}` measures it")


def _print_outcome(experiment: Experiment, outcome: Outcome, as_json: bool) -> None:
    from store import home

    if as_json:
        keys = ("run_id", "val_bpb", "tokens", "flops", "train_seconds")
        finished = [*outcome.already_done, *outcome.trained]
        documents = [read_json(home() / run_id / "done.json") for run_id in finished]
        document: dict[str, Any] = {"experiment": experiment.name, "home": str(home())}
        document |= vars(outcome)
        document["runs"] = [{key: run[key] for key in keys} for run in documents]
        print_json(document)
        return
    done = len(outcome.already_done)
    if outcome.trained:
        print(f"trained {plural(len(outcome.trained), 'run')}, {done} were already done")
    elif not outcome.not_finished:
        print(f"nothing to train: all {plural(done, 'run')} were already done")
    for run_id, why in outcome.not_finished.items():
        print(f"{run_id} not finished: {why}")
