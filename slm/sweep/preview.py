"""The plan of a sweep in words: one row a run, totals, the schedule drawn, and what estimates rest on."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slm.cli.options import table
from slm.cli.runs import states_of
from slm.text import count

if TYPE_CHECKING:
    from slm.experiment import Experiment, RequestedRun
    from slm.hardware.runtime import FinishedRun, Price, RuntimeModel
    from slm.plan import Plan
    from slm.run import RunState
    from slm.sweep.forecast import Forecast
    from slm.sweep.launcher import Waiting
    from slm.sweep.local import Local
    from slm.sweep.planning import Corpora
    from slm.sweep.slurm import Slurm

DAY = 86400.0
NARROWEST = 20
"""Columns of the chart, at least."""
FINISHED = ("finished", "diverged", "cancelled")
"""States of runs that a sweep does not train."""


@dataclass(frozen=True)
class Row:
    """A run of a sweep that is planned."""

    asked: RequestedRun
    """What is asked."""
    plan: Plan | None
    """Its plan; None while its data are not prepared."""
    state: str
    """How it is: one of launch.STATES, or that its data are not prepared."""
    name: str
    """Its run_id, else its place in the sweep."""
    waiting: Waiting | None
    """What is left of it; None where nothing is."""


@dataclass(frozen=True)
class Planned:
    """An experiment's runs, and what they will take."""

    experiment: Experiment
    """What is asked."""
    rows: list[Row]
    """Its runs, cheapest first."""
    forecast: Forecast
    """Of those that are left."""
    estimates: RuntimeModel
    """Where its times come from."""
    where: str
    """The devices, for people."""


def planned(
    experiment: Experiment,
    corpora: Corpora,
    launcher: Local | Slurm,
    price: Price | None,
    home: Path,
) -> Planned:
    """What a sweep will do. Raises ValueError for a horizon beyond the data, and for a run that no memory holds."""
    from slm.sweep import forecast
    from slm.sweep.local import Local

    rows = _rows(experiment, corpora, home)
    waiting = [row.waiting for row in rows if row.waiting]
    columns = max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)
    if isinstance(launcher, Local):
        expected = forecast.of(waiting, _labels(rows), launcher, price, columns)
    else:
        expected = forecast.in_queue(waiting, launcher, price)
    return Planned(experiment, rows, expected, launcher.seconds, launcher.where)


def _rows(experiment: Experiment, corpora: Corpora, home: Path) -> list[Row]:
    """Every run once."""
    from slm.sweep.planning import plan_of

    found: dict[str, tuple[RequestedRun, Plan | None, bool]] = {}
    for place, asked in enumerate(experiment.requested_runs()):
        prepared = corpora.find(asked)
        plan = plan_of(asked, prepared) if prepared else asked.plan
        found.setdefault(plan.run_id if plan else str(place), (asked, plan, prepared is not None))
    states = states_of([home / name for name, (_, plan, _) in found.items() if plan])
    return [_row(*own, name, home / name, states) for name, own in found.items()]


def _row(
    asked: RequestedRun,
    plan: Plan | None,
    prepared: bool,
    name: str,
    folder: Path,
    states: Mapping[Path, RunState],
) -> Row:
    from slm.run import attempt_slot, checkpoint_step, last_attempt
    from slm.sweep.launcher import Waiting

    given, left, devices, state = asked.hyperparameters, 1.0, None, "planned"
    if plan:
        state = states[folder].status
        left -= checkpoint_step(folder) / given.steps
        last = last_attempt(folder)
        devices = len(attempt_slot(last).ids) or None if last else None
    waiting = None if state in FINISHED else Waiting(name, given, devices, left)
    return Row(
        asked, plan, state if prepared or state in FINISHED else "data not prepared", name, waiting
    )


def _labels(rows: list[Row]) -> dict[str, str]:
    """What a chart calls the runs: the depth, and what else differs."""
    seeds = len({row.asked.seed for row in rows}) > 1
    recipes = len({row.asked.recipe for row in rows}) > 1
    horizons = len({row.asked.horizon for row in rows}) > 1

    def label(asked: RequestedRun) -> str:
        parts = [asked.recipe] if recipes else []
        parts += [f"d{asked.hyperparameters.depth}"]
        parts += [asked.horizon.partition("=")[2] or asked.horizon] if horizons else []
        parts += [f"s{asked.seed}"] if seeds else []
        return " ".join(parts)

    return {row.name: label(row.asked) for row in rows}


def document(own: Planned) -> dict[str, Any]:
    """The plan for --json."""
    from slm.hardware.runtime import median_error

    past = _past(own.estimates, own.forecast)
    return {
        "experiment": own.experiment.name,
        "data": own.experiment.data,
        "runs": [_document(row, own.forecast) for row in own.rows],
        "seconds": own.forecast.seconds,
        "cost": own.forecast.cost,
        "estimates": {"past_runs": len(past), "median_error": median_error(past)},
    }


def _document(row: Row, forecast: Forecast) -> dict[str, Any]:
    given, share = row.asked.hyperparameters, forecast.shares.get(row.name)
    found: dict[str, Any] = {
        "run_id": row.plan.run_id if row.plan else None,
        "recipe": row.asked.recipe,
    }
    found |= {"depth": given.depth, "horizon": row.asked.horizon, "seed": row.asked.seed}
    found |= {
        "parameters_scaling": given.parameters.scaling,
        "parameters_total": given.parameters.total,
    }
    found |= {
        "tokens": given.tokens,
        "batch_tokens": given.batch_tokens,
        "steps": given.steps,
        "flops": given.flops,
    }
    found |= {"epochs": row.plan.data.epochs if row.plan else None, "state": row.state}
    found |= dict.fromkeys(("device", "devices", "memory_bytes", "start", "seconds", "cost"))
    if share:
        found |= {
            "device": share.slot.device_name,
            "devices": list(share.slot.ids) or share.slot.ranks,
        }
        found |= {
            "memory_bytes": share.memory_bytes,
            "start": share.start,
            "seconds": share.seconds,
        }
        found |= {"cost": share.cost}
    return found


def show(own: Planned, say: Callable[[str], None]) -> None:
    """The plan as a table, totals and a chart."""
    rows, forecast = own.rows, own.forecast
    headers = [
        "run",
        "recipe",
        "d",
        "horizon",
        "seed",
        "params",
        "tokens",
        "batch",
        "steps",
        "FLOPs",
        "epochs",
    ]
    headers += ["GB", "on", "time", *(["cost"] if forecast.cost is not None else []), "state"]
    cells = [_cells(row, forecast) for row in rows]
    same = [
        name
        for name in ("recipe", "horizon", "seed")
        if len({own[headers.index(name)] for own in cells}) == 1
    ]
    kept = [place for place, name in enumerate(headers) if name not in same]
    say(
        table([[own[place] for place in kept] for own in cells], [headers[place] for place in kept])
    )
    alike = ", ".join(f"{name} {cells[0][headers.index(name)]}" for name in same)
    what = f"experiment {own.experiment.name}{f' ({alike})' if alike else ''}, data {own.experiment.data}"
    say(f"{what}: {len(rows)} runs on {own.where}: {_totals(rows, forecast)}")
    epochs = [row.plan.data.epochs for row in rows if row.plan]
    if wrapped := sum(own > 1 for own in epochs):
        say(
            f"{wrapped} of them read rows of {own.experiment.data} more than once, up to {max(epochs):.2f} epochs"
        )
    if forecast.shares:
        say(_basis(own.estimates, forecast))
    for line in forecast.chart if len(forecast.shares) > 1 else []:
        say(line)


def _totals(rows: list[Row], forecast: Forecast) -> str:
    from slm.text import duration

    left = [row for row in rows if row.waiting]
    flops = sum(row.waiting.left * row.asked.hyperparameters.flops for row in left if row.waiting)
    others = Counter(row.state for row in rows if not row.waiting)
    done = others.pop("finished", 0)
    parts = ["all done" if done == len(rows) else f"{done} done"]
    parts += [f"{count} {state}" for state, count in others.items()]
    if left:
        parts += [
            f"{len(left)} to train",
            f"{flops:.3g} FLOPs",
            f"about {duration(forecast.seconds)}",
        ]
    if forecast.cost is not None:
        parts += [f"cost {forecast.cost:,.2f}"]
    if any(row.state == "data not prepared" for row in rows):
        most = max(
            rows, key=lambda row: row.asked.hyperparameters.tokens
        ).asked.hyperparameters.tokens
        parts += [f"data not prepared yet: {count(most)} tokens for the longest"]
    return ", ".join(parts)


def _past(estimates: RuntimeModel, forecast: Forecast) -> list[FinishedRun]:
    """The finished runs on the devices that a forecast is for: they alone inform it."""
    names = {own.slot.device_name for own in forecast.shares.values()}
    return [run for run in estimates.runs if run.device_name in names]


def _basis(estimates: RuntimeModel, forecast: Forecast) -> str:
    """What the estimates rest on, and how far past ones were off."""
    from slm.hardware.runtime import median_error

    slots = {(own.slot.device, own.slot.device_name) for own in forecast.shares.values()}
    rest = ", ".join(sorted({estimates.throughput.basis(*slot) for slot in slots}))
    error = median_error(_past(estimates, forecast))
    off = "none was checked yet" if error is None else f"past ones were off by {error:.0%} (median)"
    return f"times rest on {rest}; {off}"


def _cells(row: Row, forecast: Forecast) -> list[str | None]:
    from slm.text import duration

    asked, share = row.asked, forecast.shares.get(row.name)
    given = asked.hyperparameters
    cells = [
        row.plan.run_id if row.plan else None,
        asked.recipe,
        str(given.depth),
        asked.horizon,
        str(asked.seed),
    ]
    cells += [
        count(given.parameters.total),
        count(given.tokens),
        f"{given.batch_tokens:,}",
        f"{given.steps:,}",
    ]
    cells += [f"{given.flops:.3g}", f"{row.plan.data.epochs:.2f}" if row.plan else None]
    if share is None:
        return [*cells, None, None, None, *([None] if forecast.cost is not None else []), row.state]
    cost = [f"{share.cost:,.2f}"] if share.cost is not None else []
    device = "cpu" if share.slot.device == "cpu" else share.slot.device_name
    on = f"{share.slot.ranks * share.slot.threads} x {device}"
    return [
        *cells,
        f"{share.memory_bytes / 1e9:.3g}",
        on,
        duration(share.seconds),
        *cost,
        row.state,
    ]


def ask(forecast: Forecast, yes: bool) -> None:
    """Ask before a sweep of more than a day. Raises ValueError where nobody can be asked, Abort for a no."""
    from slm.text import duration

    if yes or forecast.seconds <= DAY:
        return
    if not sys.stdin.isatty():
        raise ValueError(
            f"the plan takes about {duration(forecast.seconds)}: --yes starts it without asking"
        )
    typer.confirm(f"about {duration(forecast.seconds)}: start?", abort=True, err=True)
