"""`slm eval`: val_bpb or CORE of a checkpoint or of the final weights of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from slm.cli.options import Json, labels_of, print_json
from slm.evaluate.request import ROWS, TASKS, TOKENS, CoreRequest
from slm.files import read_json
from slm.hardware import devices
from slm.monitor.progress import ProgressBars, report_line
from slm.run import find_run
from store import home

if TYPE_CHECKING:
    from slm.model.weights import Device, Weights

RunOrFile = Annotated[str, Argument(help="A run_id or its first digits, or a file of weights.")]
COLUMNS = (
    "examples",
    "accuracy",
    "standard_error",
    "centred",
    "bits_per_byte",
    "cropped",
    "skipped",
    "ties",
)
"""Printed values of a task."""


def evaluate(
    run: RunOrFile,
    core: Annotated[bool, Option("--core", help="Measure CORE instead of val_bpb.")] = False,
    max_per_task: Annotated[
        int | None, Option(min=1, help="Maximum examples per task; default all.")
    ] = None,
    tasks: Annotated[
        str | None, Option(help="Only these tasks of the bundle: a,b.", metavar="TASKS")
    ] = None,
    without: Annotated[
        str | None, Option(help="All tasks except these: a,b.", metavar="TASKS")
    ] = None,
    bundle: Annotated[
        str | None, Option(help="core, pocket-core, or the id of a bundle.", metavar="NAME")
    ] = None,
    gpus: Annotated[int | None, Option(min=1, help="CORE: number of GPUs; default all.")] = None,
    ranks: Annotated[
        int | None, Option(min=1, help="CORE: processes on the CPU; default one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure val_bpb or CORE of a run's final weights, newest checkpoint, or a file of weights.

    A result on disk is not measured again.
    """
    from slm.model.weights import default_device

    core_options = (max_per_task, tasks, without, bundle, gpus, ranks)
    if not core and any(option is not None for option in core_options):
        options = "--max-per-task, --tasks, --without, --bundle, --gpus and --ranks"
        raise ValueError(f"{options} need --core")
    if tasks is not None and without is not None:
        raise ValueError("--tasks and --without: choose one")
    weights = weights_of(run, home())
    device = default_device()
    request = None
    processes = 1
    if core:
        only = labels_of(tasks) or None
        request = CoreRequest(bundle, max_per_task, only, labels_of(without))
        processes = _processes(device, gpus, ranks)
    path = _measure(weights, request, device, processes)
    document = read_json(path)
    if as_json:
        print_json(document)
        return
    plan = weights.plan
    hp = plan.hyperparameters
    print(f"run {plan.run_id}: {plan.recipe} d{hp.depth}, step {weights.step:,} of {hp.steps:,}")
    if core:
        _print_core(document)
    else:
        _print_val_bpb(document)
    print(f"  {path}")


def _processes(device: Device, gpus: int | None, ranks: int | None) -> int:
    """Return the number of processes: one per GPU, or `ranks` on the CPU.

    Raises ValueError for more than the machine has.
    """
    if device.type == "cuda":
        if ranks:
            raise ValueError("this machine has GPUs: use --gpus instead of --ranks")
        available = devices.gpu_count()
        processes = gpus or available
    else:
        if gpus:
            raise ValueError("this machine has no GPU: use --ranks instead of --gpus")
        available = devices.cores()
        processes = ranks or 1
    if processes > available:
        option = "--gpus" if gpus else "--ranks"
        raise ValueError(f"{option} {processes}: this machine has {available}")
    return processes


def _measure(weights: Weights, request: CoreRequest | None, device: Device, processes: int) -> Path:
    """Return the file with CORE as requested, else with val_bpb."""
    from slm.evaluate.distributed import evaluate_core_on_ranks
    from slm.evaluate.evaluator import evaluate_core, evaluate_val_bpb
    from slm.model.weights import find_dataset

    with ProgressBars() as bars:
        reports = {unit: bars.add(unit) for unit in (ROWS, TASKS, TOKENS)}

        def report(unit: str, done: int, total: int) -> None:
            reports[unit](done, total)

        if not request:
            return evaluate_val_bpb(weights, home(), device, report)
        request = request.for_run(weights.plan, home(), lambda: find_dataset(weights.plan, home()))
        if processes == 1:
            return evaluate_core(weights, home(), request, device, report=report)
        return evaluate_core_on_ranks(weights, home(), request, device, processes, report)


def _print_val_bpb(document: dict[str, Any]) -> None:
    print(
        f"  val_bpb {document['val_bpb']:.4f}, val_loss {document['val_loss']:.4f} nats per token"
    )
    print(f"  {document['rows']:,} rows in {document['seconds']:.1f} s")


def _print_core(document: dict[str, Any]) -> None:
    """Print one row per task, then their mean."""
    from tabulate import tabulate

    tasks = document["tasks"].items()
    rows = [[label, *(task.get(name) for name in COLUMNS)] for label, task in tasks]
    print(tabulate(rows, headers=("task", *COLUMNS), floatfmt=".4f"))
    for label, task in tasks:
        if "error" in task:
            print(f"  {label} could not be evaluated: {task['error']}")
    if document["centred"] is None:
        print("  no mean, because a task could not be evaluated")
        return
    name = "CORE" if document["name"] == "core" else document["name"]
    if document["core"] is None:
        name = f"mean of these tasks of {name}"
    published, corrected = (
        f"{document[key]:.4f} +- {document[f'{key}_error']:.4f}"
        for key in ("centred", "centred_corrected")
    )
    note = f"; {corrected} with DCLM's corrected baselines" if corrected != published else ""
    print(f"  {name} {published}{note}")
    mode = "all examples" if document["mode"] == "full" else document["mode"]
    print(f"  bundle {document['bundle']}, {mode}")


def weights_of(run: str, home: Path) -> Weights:
    """Return the weights of a run or in a file; print remarks on them to standard error."""
    from slm.model import weights

    if Path(run).is_file():
        stored = weights.load_file(Path(run), home)
    else:
        stored = weights.load_run(find_run(home, run))
    for line in stored.remarks():
        report_line(line)
    return stored
