"""Preview of a sweep: one row per run, totals, the basis of the estimates, and a chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.experiment import Experiment, RequestedRun
from slm.hardware.runtime import FinishedRun, Price, median_error
from slm.monitor.status import run_states
from slm.sweep import chart
from slm.sweep.forecast import Forecast, RunForecast, forecast
from slm.sweep.launcher import WaitingRun
from slm.sweep.local import Local
from slm.sweep.planning import PlannedRun
from slm.sweep.slurm import Slurm
from slm.text import count, duration

DONE_STATES = ("finished", "diverged", "cancelled")
"""States of runs that a sweep does not train."""
NOT_PREPARED = "data not prepared"
OPTIONAL_COLUMNS = ("recipe", "horizon", "seed")
"""Columns that a table leaves out if all runs agree: attributes of a RequestedRun."""
Cells = dict[str, str | None]
"""Cells of a table row, by column."""


@dataclass(frozen=True)
class Row:
    """A run of a planned sweep."""

    run: PlannedRun
    name: str
    """run_id, or the position in the sweep while it has no plan."""
    state: str
    """State: one of run.STATES, or NOT_PREPARED."""
    waiting: WaitingRun | None
    """The run as a launcher gets it; None if there is nothing to train."""


@dataclass(frozen=True)
class Preview:
    """The runs of a sweep and what they will take."""

    experiment: Experiment
    rows: list[Row]
    """Runs, cheapest first."""
    forecast: Forecast
    """Time, memory and cost of the runs that wait."""
    launcher: Local | Slurm

    def document(self) -> dict[str, Any]:
        """Return the preview for `--json`."""
        past = self._past()
        return {
            "experiment": self.experiment.name,
            "data": self.experiment.data,
            "runs": [_document(row, self.forecast.runs.get(row.name)) for row in self.rows],
            "seconds": self.forecast.seconds,
            "cost": self.forecast.cost,
            "estimates": {"past_runs": len(past), "median_error": median_error(past)},
        }

    def table(self) -> list[Cells]:
        """Return one row of cells per run, without columns in which all runs agree."""
        constant = self._constant()
        table = [_cells(row, self.forecast) for row in self.rows]
        for cells in table:
            for name in constant:
                del cells[name]
        return table

    def lines(self, columns: int) -> list[str]:
        """Return totals, the basis of the estimates, and a chart of this width."""
        constant = self._constant()
        common = ", ".join(f"{name} {value}" for name, value in constant.items())
        lines = [
            f"experiment {self.experiment.name}{f' ({common})' if common else ''}, "
            f"data {self.experiment.data}: "
            f"{len(self.rows)} runs on {self.launcher.description}: {self._totals()}"
        ]
        epochs = [row.run.plan.data.epochs for row in self.rows if row.run.plan]
        if repeats := sum(value > 1 for value in epochs):
            lines.append(
                f"{repeats} of them read rows of {self.experiment.data} more than once, "
                f"up to {max(epochs):.2f} epochs"
            )
        if self.forecast.runs:
            lines.append(self._basis())
        if isinstance(self.launcher, Local) and len(self.forecast.runs) > 1:
            labels = {row.name: _label(row.run.request, constant) for row in self.rows}
            lines += chart.draw(self.forecast.assignments, labels, self.launcher.units, columns)
        return lines

    def _constant(self) -> dict[str, str]:
        """Return recipe, horizon and seed as far as all runs agree in them."""
        constant = {}
        for name in OPTIONAL_COLUMNS:
            values = {str(getattr(row.run.request, name)) for row in self.rows}
            if len(values) == 1:
                constant[name] = values.pop()
        return constant

    def _totals(self) -> str:
        states = Counter(row.state for row in self.rows if not row.waiting)
        finished = states.pop("finished", 0)
        parts = ["all done" if finished == len(self.rows) else f"{finished} done"]
        parts += [f"{number} {state}" for state, number in states.items()]
        if waiting := [row.waiting for row in self.rows if row.waiting]:
            flops = sum(run.remaining * run.hp.flops for run in waiting)
            parts.append(f"{len(waiting)} to train")
            parts.append(f"{flops:.3g} FLOPs")
            parts.append(f"about {duration(self.forecast.seconds)}")
        if self.forecast.cost is not None:
            parts.append(f"cost {self.forecast.cost:,.2f}")
        if any(row.state == NOT_PREPARED for row in self.rows):
            longest = max(row.run.request.hyperparameters.tokens for row in self.rows)
            parts.append(f"{NOT_PREPARED} yet: {count(longest)} tokens for the longest")
        return ", ".join(parts)

    def _past(self) -> list[FinishedRun]:
        """Return the finished runs on the same devices, which alone inform the forecast."""
        names = {run.slot.device_name for run in self.forecast.runs.values()}
        return [run for run in self.launcher.runtime.runs if run.device_name in names]

    def _basis(self) -> str:
        """Return what the estimates rest on, and the error of earlier ones."""
        throughput = self.launcher.runtime.throughput
        slots = [run.slot for run in self.forecast.runs.values()]
        basis = {throughput.basis(slot.device, slot.device_name) for slot in slots}
        accuracy = "none was checked yet"
        if (error := median_error(self._past())) is not None:
            accuracy = f"past ones were off by {error:.0%} (median)"
        return f"times rest on {', '.join(sorted(basis))}; {accuracy}"


def preview(
    experiment: Experiment,
    runs: Sequence[PlannedRun],
    launcher: Local | Slurm,
    price: Price | None,
    home: Path,
) -> Preview:
    """Preview a sweep. Raises ValueError for a run that no memory holds."""
    # a run without a plan has no folder yet
    folders = [home / (run.run_id or str(position)) for position, run in enumerate(runs)]
    states = run_states(folders)
    rows = []
    for run, folder in zip(runs, folders, strict=True):
        state = states[folder].status
        waiting = None
        if state not in DONE_STATES:
            waiting = WaitingRun.read(folder, run.request.hyperparameters)
            state = state if run.is_prepared else NOT_PREPARED
        rows.append(Row(run, folder.name, state, waiting))
    expected = forecast([row.waiting for row in rows if row.waiting], launcher, price)
    return Preview(experiment, rows, expected, launcher)


def _label(run: RequestedRun, constant: Container[str]) -> str:
    """Return the label of a run in a chart: its depth, and what differs between runs."""
    parts = [] if "recipe" in constant else [run.recipe]
    parts.append(f"d{run.hyperparameters.depth}")
    if "horizon" not in constant:
        parts.append(run.horizon.partition("=")[2] or run.horizon)
    if "seed" not in constant:
        parts.append(f"s{run.seed}")
    return " ".join(parts)


def _document(row: Row, expected: RunForecast | None) -> dict[str, Any]:
    request = row.run.request
    plan = row.run.plan
    hp = request.hyperparameters
    slot = expected.slot if expected else None
    document = {
        "run_id": row.run.run_id,
        "recipe": request.recipe,
        "depth": hp.depth,
        "horizon": request.horizon,
        "seed": request.seed,
        "parameters_scaling": hp.parameters.scaling,
        "parameters_total": hp.parameters.total,
        "tokens": hp.tokens,
        "batch_tokens": hp.batch_tokens,
        "steps": hp.steps,
        "flops": hp.flops,
        "epochs": plan.data.epochs if plan else None,
        "state": row.state,
        "device": slot.device_name if slot else None,
        "devices": (list(slot.ids) or slot.ranks) if slot else None,
    }
    for name in ("memory_bytes", "start", "seconds", "cost"):
        document[name] = getattr(expected, name, None)
    return document


def _cells(row: Row, forecast: Forecast) -> Cells:
    request = row.run.request
    plan = row.run.plan
    hp = request.hyperparameters
    cells: Cells = {
        "run": row.run.run_id,
        "recipe": request.recipe,
        "d": str(hp.depth),
        "horizon": request.horizon,
        "seed": str(request.seed),
        "params": count(hp.parameters.total),
        "tokens": count(hp.tokens),
        "batch": f"{hp.batch_tokens:,}",
        "steps": f"{hp.steps:,}",
        "FLOPs": f"{hp.flops:.3g}",
        "epochs": f"{plan.data.epochs:.2f}" if plan else None,
        "GB": None,
        "on": None,
        "time": None,
    }
    if forecast.cost is not None:
        cells["cost"] = None
    if expected := forecast.runs.get(row.name):
        slot = expected.slot
        device = "cpu" if slot.device == "cpu" else slot.device_name
        cells["GB"] = f"{expected.memory_bytes / 1e9:.3g}"
        cells["on"] = f"{slot.ranks * slot.threads} x {device}"
        cells["time"] = duration(expected.seconds)
        if expected.cost is not None:
            cells["cost"] = f"{expected.cost:,.2f}"
    return cells | {"state": row.state}
