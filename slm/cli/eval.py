"""`slm eval`: what a checkpoint or the final weights of a run are worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.data import report_line
from slm.cli.options import Json, print_json
from slm.cli.runs import run_folder

if TYPE_CHECKING:
    from pathlib import Path

    from slm.weights import Weights

PAUSE_SECONDS = 5.0
"""Between two lines on how far it is."""

RunOrFile = Annotated[str, typer.Argument(help="A run_id, or its first digits; or a file of weights.")]


def evaluate(run: RunOrFile, as_json: Json = False) -> None:
    """Measure val_bpb of a run's final weights, of its newest checkpoint, or of a file of weights, each once."""
    from slm import events
    from slm.evaluate import later
    from slm.weights import device_at_hand
    from store import home

    weights = weights_of(run, home())
    path = later.val_bpb(weights, home(), device_at_hand(), _progress())
    document = events.read_json(path)
    if as_json:
        print_json(document)
        return
    plan, given = weights.plan, weights.plan.hyperparameters
    print(f"run {plan.run_id}: {plan.recipe} d{given.depth}, step {weights.step:,} of {given.steps:,}")
    print(f"  val_bpb {document['val_bpb']:.4f}, val_loss {document['val_loss']:.4f} nats a token")
    print(f"  {document['rows']:,} rows in {document['seconds']:.1f} s; {path}")


def weights_of(run: str, home: Path) -> Weights:
    """The weights of a run or in a file, with what is to be said of them on standard error."""
    from pathlib import Path

    from slm import weights

    found = weights.of_file(Path(run), home) if Path(run).is_file() else weights.of_run(run_folder(home, run))
    for line in found.remarks():
        report_line(line)
    return found


def _progress() -> Callable[[int, int], None]:
    """Says now and then how many rows are read, and how long the others will take."""
    from slm.progress import duration

    began = said = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > PAUSE_SECONDS:
            said = now
            report_line(f"{done:,} of {of:,} rows, {duration((now - began) / done * (of - done))} left")

    return report
