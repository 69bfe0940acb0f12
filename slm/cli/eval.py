"""`slm eval`: what a checkpoint or the final weights of a run are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import progress, report_line
from slm.cli.options import Json, print_json
from slm.cli.runs import run_folder

if TYPE_CHECKING:
    from pathlib import Path

    from slm.evaluate.core import Asked
    from slm.weights import Weights

RunOrFile = Annotated[str, typer.Argument(help="A run_id, or its first digits; or a file of weights.")]


def evaluate(
    run: RunOrFile,
    core: Annotated[bool, typer.Option("--core", help="Measure CORE instead of val_bpb.")] = False,
    max_per_task: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most; else all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="These tasks of CORE alone: a,b.", metavar="TASKS")] = None,
    bundle: Annotated[str | None, typer.Option(help="Which bundle, where the home has several.", metavar="ID")] = None,
    as_json: Json = False,
) -> None:
    """Measure val_bpb, or CORE, of a run's final weights, its newest checkpoint, or a file of weights, each once."""
    from slm import events
    from slm.evaluate import later
    from slm.weights import device_at_hand
    from store import home

    if not core and (max_per_task, tasks, bundle) != (None, None, None):
        raise ValueError("--max-per-task, --tasks and --bundle are about CORE: add --core")
    weights, device = weights_of(run, home()), device_at_hand()
    if core:
        asked = _asked(home(), bundle, max_per_task, tasks)
        path = later.core(weights, home(), asked, device, progress("tokens"), progress("tasks planned"))
    else:
        path = later.val_bpb(weights, home(), device, progress("rows"))
    document = events.read_json(path)
    if as_json:
        print_json(document)
        return
    plan, given = weights.plan, weights.plan.hyperparameters
    print(f"run {plan.run_id}: {plan.recipe} d{given.depth}, step {weights.step:,} of {given.steps:,}")
    _print_core(document) if core else _print_val_bpb(document)
    print(f"  {path}")


def _asked(home: Path, bundle: str | None, most: int | None, tasks: str | None) -> Asked:
    from slm.evaluate.bundle import installed
    from slm.evaluate.core import Asked

    labels = tuple(dict.fromkeys(label.strip() for label in tasks.split(","))) if tasks else None
    return Asked(installed(home, bundle), most, labels)


def _print_val_bpb(document: dict[str, Any]) -> None:
    print(f"  val_bpb {document['val_bpb']:.4f}, val_loss {document['val_loss']:.4f} nats a token")
    print(f"  {document['rows']:,} rows in {document['seconds']:.1f} s")


def _print_core(document: dict[str, Any]) -> None:
    """A line a task, then what they say together."""
    from tabulate import tabulate

    names = ("examples", "accuracy", "standard_error", "centred", "bits_per_byte", "cropped", "skipped", "ties")
    rows = [[label, *(own.get(name) for name in names)] for label, own in document["tasks"].items()]
    headers = ("task", "examples", "accuracy", "+-", "centred", "bits/byte", "cropped", "skipped", "ties")
    print(tabulate(rows, headers=headers, floatfmt=".4f"))
    for label, own in document["tasks"].items():
        if "error" in own:
            print(f"  {label} could not be evaluated: {own['error']}")
    if document["centred"] is None:
        print("  no mean: a task is missing")
        return
    name = "mean of these tasks" if document["core"] is None else "CORE"
    old, new = (f"{document[key]:.4f} +- {document[f'{key}_error']:.4f}" for key in ("centred", "centred_corrected"))
    print(f"  {name} {old}; by DCLM's corrected baselines {new}")
    most = document["max_per_task"]
    print(f"  bundle {document['bundle']}, {f'{most} examples a task at most' if most else 'all examples'}")


def weights_of(run: str, home: Path) -> Weights:
    """The weights of a run or in a file, with what is to be said of them on standard error."""
    from pathlib import Path

    from slm import weights

    found = weights.of_file(Path(run), home) if Path(run).is_file() else weights.of_run(run_folder(home, run))
    for line in found.remarks():
        report_line(line)
    return found
