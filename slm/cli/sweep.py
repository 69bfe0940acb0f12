"""`slm sweep`: plan, record, and run or resume an experiment."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from slm.cli.options import (
    Data,
    Declaration,
    Json,
    RecipeName,
    TokenizerName,
    confirm,
    depths_of,
    labels_of,
    numbers_of,
    print_json,
    recipe_of,
    refuse,
    table,
)
from slm.evaluate.request import CoreRequest
from slm.experiment import Experiment, load
from slm.files import read_json, start_session
from slm.hardware import devices
from slm.monitor.follow import View
from slm.monitor.progress import report_line
from slm.text import duration, plural
from store import home

if TYPE_CHECKING:
    from slm.hardware.runtime import Price
    from slm.sweep.local import Local
    from slm.sweep.orchestrator import Outcome, Sweep
    from slm.sweep.planning import Planner
    from slm.sweep.preview import Preview
    from slm.sweep.slurm import Cluster, Slurm

CONFIRM_SECONDS = 86400.0
"""Length of a sweep that asks before it starts."""
MIN_CHART_COLUMNS = 20
SHAPE = ("depths", "recipe", "flops", "ratios", "steps", "seeds")
"""Options that a declared experiment or a plan settles."""


@dataclass(frozen=True)
class Request:
    """Options that say what to run."""

    declaration: Declaration = None
    depths: Annotated[str | None, Option(help="Depths: 10-20, or 4,8,12.")] = None
    recipe: RecipeName = None
    flops: Annotated[str | None, Option(help="FLOPs budgets of an isoFLOP grid: 1e12,2e12.")] = None
    ratios: Annotated[str | None, Option(help="Tokens-per-parameter ratios: 4,8,16.")] = None
    steps: Annotated[int | None, Option(help="Optimiser steps of smoke runs.")] = None
    seeds: Annotated[
        int, Option(min=1, max=1000, help="Replicates of every run: seeds 0, 1, …")
    ] = 1
    data: Data = None
    tokenizer: TokenizerName = None
    plan: Annotated[
        list[Path] | None, Option(help="A plan.json: repeat its run. May be repeated.")
    ] = None
    name: Annotated[
        str | None, Option(help="Name of the experiment; else the recipe's or the run's.")
    ] = None

    def experiment(self, needs_gpu: bool = False) -> Experiment:
        """Return the experiment. `needs_gpu`: whether GPUs are named, for the default recipe."""
        experiment = self._experiment(needs_gpu)
        return replace(
            experiment,
            data=self.data or experiment.data,
            tokenizer=self.tokenizer or experiment.tokenizer,
        )

    def _experiment(self, needs_gpu: bool) -> Experiment:
        from slm.sweep.planning import repeat_plans

        if self.plan:
            why = (
                "--plan holds the whole run; only --data, --tokenizer, --name "
                "and where it runs go with it"
            )
            refuse(self, why, SHAPE)
            if self.declaration:
                raise ValueError(f"{self.declaration}: {why}")
            return repeat_plans(self.plan, self.name, self.data)
        if self.declaration:
            why = f"{self.declaration} declares the runs: leave it out, or change the file"
            refuse(self, why, (*SHAPE, "name"))
            return load(self.declaration)
        if self.depths is None:
            raise ValueError(
                "no --depths: write, for example, --depths 2-6, or name a file of experiments/"
            )
        recipe = recipe_of(self.recipe, needs_gpu)
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

    launcher: Annotated[
        str, Option(help="local: this machine; slurm: one cluster job per run.")
    ] = "local"
    gpus: Annotated[int | None, Option(min=1, help="GPUs to use; else all.")] = None
    gpus_per_run: Annotated[
        str, Option(help="GPUs of a run: auto (soonest end), all, or a number.")
    ] = "auto"
    cores: Annotated[int | None, Option(min=1, help="CPU cores to use; else all.")] = None
    cores_per_run: Annotated[
        str, Option(help="Cores of a run: auto (soonest end), all, or a number.")
    ] = "auto"
    gpu: Annotated[str, Option(help="GPU to plan for where there is none: H100, A100, …")] = "H100"
    price: Annotated[
        str | None, Option(help="24/h for the machine, or 3/gpu/h: adds costs to the plan.")
    ] = None

    def make_launcher(self, cluster: ClusterOptions, dry_run: bool) -> Local | Slurm:
        """Return the launcher. A dry run may plan for GPUs that this machine does not have."""
        from slm.hardware.runtime import RuntimeModel
        from slm.sweep.local import Local, planned_machine, this_machine
        from slm.sweep.micro_batch import MicroBatches
        from slm.sweep.slurm import Slurm

        runtime = RuntimeModel(home())
        micro_batches = MicroBatches.from_store(home())
        if self.launcher == "slurm":
            why = (
                "an option of this machine; "
                "a cluster takes --nodes, --gpus-per-node and --cores-per-node"
            )
            refuse(self, why, ("gpus", "gpus_per_run", "cores", "cores_per_run"))
            job = cluster.resources(self.gpu)
            return Slurm(job, runtime, micro_batches, report_line, cluster.jobs)
        if self.launcher != "local":
            raise ValueError(f"--launcher {self.launcher}: choose local or slurm")
        refuse(cluster, "an option of clusters; add --launcher slurm")
        has_gpus = devices.gpu_count() or devices.apple_gpu()
        if dry_run and self.gpus and self.cores is None and not has_gpus:
            machine = planned_machine(self.gpus, self.gpu)
        else:
            machine = this_machine(self.gpus, self.cores)
        if machine.device == "cpu":
            refuse(self, "runs take cores here; use --cores-per-run", ["gpus_per_run"])
            sizes = machine.run_sizes(self.cores_per_run)
        else:
            refuse(self, "runs take GPUs here; use --gpus-per-run", ["cores_per_run"])
            sizes = machine.run_sizes(self.gpus_per_run)
        return Local(machine, sizes, runtime, micro_batches)


@dataclass(frozen=True)
class ClusterOptions:
    """Options of jobs on a cluster."""

    nodes: Annotated[int, Option(help="Machines of one run.")] = 1
    gpus_per_node: Annotated[int, Option(help="GPUs of one run on each node; 0 for cores.")] = 0
    cores_per_node: Annotated[
        int | None, Option(help="Cores of one run on each node; else 4 per GPU, or 1.")
    ] = None
    partition: Annotated[str | None, Option(help="As for sbatch.")] = None
    account: Annotated[str | None, Option(help="As for sbatch.")] = None
    qos: Annotated[str | None, Option(help="As for sbatch.")] = None
    time: Annotated[str | None, Option(help="Time limit of a job, which is then requeued.")] = None
    jobs: Annotated[int | None, Option(min=1, help="Maximum number of jobs in the queue.")] = None
    sbatch: Annotated[
        str, Option(help='More options of sbatch: "--mem=64G --constraint=a100".')
    ] = ""

    def resources(self, gpu: str) -> Cluster:
        """Return the resources of a job, on GPUs of this name if it has any."""
        from slm.sweep.local import planned_gpu_memory
        from slm.sweep.slurm import Cluster

        try:
            options = tuple(shlex.split(self.sbatch))
        except ValueError as error:
            raise ValueError(f"--sbatch {self.sbatch}: {error}") from None
        shared = {**vars(self)}
        del shared["jobs"], shared["sbatch"]
        return Cluster(
            **shared,
            device_name=gpu if self.gpus_per_node else devices.name("cpu"),
            memory=planned_gpu_memory(gpu) if self.gpus_per_node else None,
            options=options,
        )


@dataclass(frozen=True)
class CoreOptions:
    """Options of CORE."""

    core: Annotated[bool, Option("--core", help="Measure CORE at the end of every run.")] = False
    bundle: Annotated[
        str | None,
        Option(help="Name or id of a bundle; else pocket-core for pocket.", metavar="NAME"),
    ] = None
    core_every: Annotated[
        int | None, Option(min=1, help="Steps between two measurements during a run.")
    ] = None
    core_max_per_task: Annotated[
        int | None, Option(min=1, help="Maximum examples per task; else all.")
    ] = None
    core_without: Annotated[
        str | None, Option(help="Tasks to leave out: a,b.", metavar="TASKS")
    ] = None

    def request(self) -> CoreRequest | None:
        """Return the request; None without --core."""
        if not self.core:
            refuse(self, "needs --core")
            return None
        return CoreRequest(
            self.bundle,
            self.core_max_per_task,
            without=labels_of(self.core_without),
            every=self.core_every,
        )


@dataclass(frozen=True)
class Mode:
    """Options that say how a sweep runs."""

    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and stop.")] = False
    yes: Annotated[bool, Option("--yes", help="Start without asking, however long it takes.")] = (
        False
    )
    detach: Annotated[
        bool, Option("--detach", help="Run in the background; `slm status` shows it.")
    ] = False
    wandb: Annotated[
        bool, Option("--wandb", help="Log the runs to Weights & Biases too, or offline.")
    ] = False
    as_json: Json = False


GROUPS = {
    "What to run": Request,
    "Where it runs": Placement,
    "Slurm": ClusterOptions,
    "CORE": CoreOptions,
    "How it runs": Mode,
}
"""Groups of options in `slm sweep --help`."""


def sweep(
    request: Request, placement: Placement, cluster: ClusterOptions, core: CoreOptions, mode: Mode
) -> None:
    """Train a family of models as recorded runs. Repeating the command trains only what is not
    finished.
    """
    from slm.hardware.runtime import parse_price
    from slm.sweep.planning import Planner
    from slm.sweep.preview import preview

    experiment = request.experiment(needs_gpu=bool(placement.gpus or cluster.gpus_per_node))
    core_request = core.request()
    if core_request:
        core_request.check_installed(home(), [family.name for family in experiment.recipes])
    planner = Planner(experiment, home())
    price = parse_price(placement.price) if placement.price else None
    launcher = placement.make_launcher(cluster, mode.dry_run)
    if mode.dry_run:
        plan = preview(experiment, planner.runs(), launcher, price, home())
        if mode.as_json:
            print_json(plan.document())
        else:
            print(_describe(plan, core_request))
    else:
        _train(planner, launcher, price, core_request, mode)


def _describe(plan: Preview, core_request: CoreRequest | None) -> str:
    columns = max(MIN_CHART_COLUMNS, shutil.get_terminal_size((100, 24)).columns)
    lines = [table(plan.table()), *plan.lines(columns)]
    if core_request and plan.forecast.runs:
        lines.append(core_request.describe())
    return "\n".join(lines)


def _train(
    planner: Planner,
    launcher: Local | Slurm,
    price: Price | None,
    core_request: CoreRequest | None,
    mode: Mode,
) -> None:
    """Prepare, plan, record and train; exit code 1 unless every run is finished."""
    from slm.monitor.display import Display
    from slm.monitor.wandb_logger import WandbLogger
    from slm.sweep.orchestrator import Sweep, train
    from slm.sweep.planning import plans_of, record
    from slm.sweep.preview import preview

    # 1) refuse what cannot run, before data are prepared
    _check_mode(mode, launcher)

    # 2) prepare the data, show the plan and ask
    experiment = planner.experiment
    runs = planner.prepare(report_line)
    plans = plans_of(runs)
    plan = preview(experiment, runs, launcher, price, home())
    core = {}
    if core_request:
        for each in plans:
            core[each.run_id] = core_request.for_run(each, home(), partial(planner.dataset, each))
    report_line(_describe(plan, core_request))
    seconds = plan.forecast.seconds
    confirm(f"about {duration(seconds)}: start?", mode.yes or seconds <= CONFIRM_SECONDS)

    # 3) train: as jobs of a cluster, in the background, or here
    record(experiment, plans, home())
    work = Sweep(plans, home(), planner.dataset, core)
    if mode.detach:
        _detach(work, launcher)
        return
    done = {row.name for row in plan.rows if not row.waiting}
    with Display(plans, done) as display:
        logger: AbstractContextManager[View] = nullcontext(display)
        if mode.wandb:
            logger = WandbLogger(display, experiment.name, home())
        with logger as view:
            outcome = train(work, launcher, view)
    _print_outcome(experiment, outcome, mode.as_json)
    _report_missing_core(outcome, work)
    if outcome.not_finished:
        raise Exit(1)


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


def _detach(work: Sweep, launcher: Local | Slurm) -> None:
    """Leave the runs to a cluster, or run this command again in the background."""
    from slm.monitor.display import Display
    from slm.sweep.orchestrator import submit
    from slm.sweep.slurm import Slurm

    if not isinstance(launcher, Slurm):
        arguments = [option for option in sys.argv[1:] if option not in ("--detach", "--yes")]
        log = work.home / "sweep.log"
        process = start_session(["-m", "slm", *arguments, "--yes"], log).pid
        report_line(
            f"running in the background as process {process}, with output in {log}; "
            "`slm status --watch` shows it"
        )
    elif waiting := submit(work, launcher, Display(work.plans, set())):
        raise RuntimeError(
            f"{plural(len(waiting), 'run')} not submitted ({', '.join(waiting)}): "
            "repeat the command to submit them"
        )
    else:
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
    if as_json:
        runs = []
        for run_id in (*outcome.already_done, *outcome.trained):
            done = read_json(home() / run_id / "done.json")
            keys = ("run_id", "val_bpb", "tokens", "flops", "train_seconds")
            runs.append({key: done[key] for key in keys})
        document = {"experiment": experiment.name, "home": home(), **vars(outcome)}
        print_json(document | {"runs": runs})
        return
    number = len(outcome.already_done)
    if outcome.trained:
        print(f"trained {plural(len(outcome.trained), 'run')}, {number} were already done")
    elif not outcome.not_finished:
        print(f"nothing to train: all {plural(number, 'run')} were already done")
    for run_id, why in outcome.not_finished.items():
        print(f"{run_id} not finished: {why}")
