"""`slm eval`: what a checkpoint or the final weights of a run are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import progress, report_line
from slm.cli.options import Json, labels_of, print_json
from slm.cli.runs import run_folder
from slm.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from slm.evaluate.core import Asked
    from slm.model.weights import Weights

RunOrFile = Annotated[
    str, typer.Argument(help="A run_id, or its first digits; or a file of weights.")
]


def evaluate(
    run: RunOrFile,
    core: Annotated[bool, typer.Option("--core", help="Measure CORE instead of val_bpb.")] = False,
    max_per_task: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task at most; else all.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="These tasks of CORE alone: a,b.", metavar="TASKS")
    ] = None,
    without: Annotated[
        str | None, typer.Option(help="All tasks but these: a,b.", metavar="TASKS")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="core, pocket-core, or a bundle's id.", metavar="NAME")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="CORE: GPUs to use; else all.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="CORE: processes on the CPU's cores; else one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure val_bpb, or CORE, of a run's final weights, its newest checkpoint, or a file of weights, each once."""
    from slm.evaluate import evaluator as later
    from slm.model.weights import device_at_hand
    from store import home

    if not core and any(
        own is not None for own in (max_per_task, tasks, without, bundle, gpus, ranks)
    ):
        options = "--max-per-task, --tasks, --without, --bundle, --gpus and --ranks"
        raise ValueError(f"{options} are about CORE: add --core")
    weights, device = weights_of(run, home()), device_at_hand()
    if core:
        asked = _asked(weights, home(), bundle, max_per_task, tasks, without)
        path = _core(weights, home(), asked, device, _ranks(device, gpus, ranks))
    else:
        path = later.val_bpb(weights, home(), device, progress("rows"))
    document = read_json(path)
    if as_json:
        print_json(document)
        return
    plan, given = weights.plan, weights.plan.hyperparameters
    print(
        f"run {plan.run_id}: {plan.recipe} d{given.depth}, step {weights.step:,} of {given.steps:,}"
    )
    _print_core(document) if core else _print_val_bpb(document)
    print(f"  {path}")


def _asked(
    weights: Weights,
    home: Path,
    bundle: str | None,
    most: int | None,
    tasks: str | None,
    without: str | None,
) -> Asked:
    """What a command names of a bundle; without a name it is the one that `pocket.bundle_for` gives the run."""
    from slm.evaluate.core import Asked
    from slm.evaluate.pocket_core import bundle_for
    from slm.model.weights import prepared_of

    if tasks is not None and without is not None:
        raise ValueError("--tasks and --without: choose one")
    own = bundle_for(weights.plan, home, bundle, lambda: prepared_of(weights.plan, home))
    asked = Asked(own, most, labels_of(tasks) if tasks else None)
    return asked.without(labels_of(without)) if without else asked


def _ranks(device: torch.device, gpus: int | None, ranks: int | None) -> int:
    """Processes to evaluate with: one a GPU, or so many on the CPU. Raises ValueError for more than there is."""
    from slm.hardware import devices

    option, asked, other = (
        ("--gpus", gpus, ranks) if device.type == "cuda" else ("--ranks", ranks, gpus)
    )
    if other is not None:
        has = "GPUs: say --gpus" if device.type == "cuda" else "no GPU: say --ranks"
        raise ValueError(f"this machine has {has}")
    here = devices.gpu_count() if device.type == "cuda" else devices.cores()
    if asked is not None and asked > here:
        raise ValueError(f"{option} {asked}: {here} found here")
    return asked or (here if device.type == "cuda" else 1)


def _core(weights: Weights, home: Path, asked: Asked, device: torch.device, ranks: int) -> Path:
    """The file of the evaluation; made by so many processes where it is not there."""
    from slm.evaluate import distributed as processes
    from slm.evaluate import evaluator as later
    from slm.hardware import devices

    reports = progress("tokens"), progress("tasks planned")
    if ranks == 1:
        return later.core(weights, home, asked, device, *reports)
    request: dict[str, Any] = {
        "home": str(home),
        "weights": str(weights.path),
        "device": device.type,
    }
    request |= {"bundle": asked.bundle.id, "most": asked.most, "labels": asked.labels}
    return processes.core(request, ranks, max(1, devices.cores() // ranks), *reports)


def _print_val_bpb(document: dict[str, Any]) -> None:
    print(f"  val_bpb {document['val_bpb']:.4f}, val_loss {document['val_loss']:.4f} nats a token")
    print(f"  {document['rows']:,} rows in {document['seconds']:.1f} s")


def _print_core(document: dict[str, Any]) -> None:
    """A line a task, then what they say together."""
    from tabulate import tabulate

    names = (
        "examples",
        "accuracy",
        "standard_error",
        "centred",
        "bits_per_byte",
        "cropped",
        "skipped",
        "ties",
    )
    rows = [[label, *(own.get(name) for name in names)] for label, own in document["tasks"].items()]
    headers = (
        "task",
        "examples",
        "accuracy",
        "+-",
        "centred",
        "bits/byte",
        "cropped",
        "skipped",
        "ties",
    )
    print(tabulate(rows, headers=headers, floatfmt=".4f"))
    for label, own in document["tasks"].items():
        if "error" in own:
            print(f"  {label} could not be evaluated: {own['error']}")
    if document["centred"] is None:
        print("  no mean: a task is missing")
        return
    name = (
        document["name"]
        if document["core"] is not None
        else f"mean of these tasks of {document['name']}"
    )
    name = name.replace("core", "CORE") if document["name"] == "core" else name
    old, new = (
        f"{document[key]:.4f} +- {document[f'{key}_error']:.4f}"
        for key in ("centred", "centred_corrected")
    )
    print(f"  {name} {old}" + (f"; by DCLM's corrected baselines {new}" if new != old else ""))
    print(
        f"  bundle {document['bundle']}, {'all examples' if document['mode'] == 'full' else document['mode']}"
    )


def weights_of(run: str, home: Path) -> Weights:
    """The weights of a run or in a file, with what is to be said of them on standard error."""
    from pathlib import Path

    from slm.model import weights

    found = (
        weights.of_file(Path(run), home)
        if Path(run).is_file()
        else weights.of_run(run_folder(home, run))
    )
    for line in found.remarks():
        report_line(line)
    return found
