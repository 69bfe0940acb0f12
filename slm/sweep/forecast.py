"""Forecast of a sweep before it starts: time, memory and cost of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm.hardware.memory import peak_memory
from slm.hardware.runtime import Price
from slm.hardware.slot import Slot
from slm.sweep.launcher import WaitingRun
from slm.sweep.local import Local
from slm.sweep.schedule import Assignment, makespan
from slm.sweep.slurm import Slurm


@dataclass(frozen=True)
class RunForecast:
    """Time, memory and cost of one run."""

    slot: Slot
    start: float | None
    """Seconds from now; None if a queue decides."""
    seconds: float
    memory_bytes: int
    """Peak of tensors on one rank."""
    cost: float | None
    """None without a price."""


@dataclass(frozen=True)
class Forecast:
    """Time, memory and cost of the runs that a sweep has to train."""

    runs: dict[str, RunForecast]
    """Forecasts by name of the run."""
    seconds: float
    """Time until the last run ends; in a queue the duration of the longest run."""
    cost: float | None
    """None without a price."""
    assignments: list[Assignment]
    """Schedule on one machine; empty if a queue decides."""


def forecast(
    waiting: Sequence[WaitingRun], launcher: Local | Slurm, price: Price | None
) -> Forecast:
    """Forecast the runs that wait. Raises ValueError for a run that no memory holds."""

    def run_forecast(
        run: WaitingRun, slot: Slot, start: float | None, seconds: float, devices_total: int
    ) -> RunForecast:
        """Return the forecast of a run on a machine with `devices_total` devices."""
        rows = launcher.micro_batches.choose(run.hp, slot).training
        memory = peak_memory(run.hp, rows, slot.device, slot.ranks_of(run.hp))
        devices = len(slot.ids) or slot.ranks
        cost = price.of(seconds, devices, devices_total) if price else None
        return RunForecast(slot, start, seconds, memory, cost)

    runs = {}
    if isinstance(launcher, Slurm):
        for run in waiting:
            slot = launcher.cluster.slot(run.hp)
            seconds = run.seconds(launcher.runtime, slot)
            runs[run.name] = run_forecast(run, slot, None, seconds, slot.ranks // slot.nodes)
        longest = max((each.seconds for each in runs.values()), default=0.0)
        total_cost = sum(each.cost or 0.0 for each in runs.values()) if price else None
        return Forecast(runs, longest, total_cost, [])
    devices_total = len(launcher.machine.ids)
    by_name = {run.name: run for run in waiting}
    assignments = launcher.timetable(waiting)
    for assignment in assignments:
        run = by_name[assignment.job.name]
        seconds = assignment.end - assignment.start
        slot = launcher.slot(assignment)
        runs[run.name] = run_forecast(run, slot, assignment.start, seconds, devices_total)
    total = makespan(assignments)
    cost = price.of(total, devices_total, devices_total) if price else None
    return Forecast(runs, total, cost, assignments)
