"""Forecast of a sweep before it starts: time, memory and cost of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm.hardware.memory import peak_memory
from slm.hardware.runtime import STARTUP_SECONDS, Price
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
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
    if isinstance(launcher, Local):
        return _on_machine(waiting, launcher, price)
    return _in_queue(waiting, launcher, price)


def _on_machine(waiting: Sequence[WaitingRun], launcher: Local, price: Price | None) -> Forecast:
    assignments = launcher.timetable(waiting)
    devices = len(launcher.machine.ids)
    hp = {run.name: run.hp for run in waiting}
    runs = {}
    for assignment in assignments:
        name = assignment.job.name
        slot = launcher.slot(assignment)
        seconds = assignment.end - assignment.start
        cost = price.of(seconds, len(slot.ids), devices) if price else None
        memory = _peak_memory(hp[name], slot, launcher)
        runs[name] = RunForecast(slot, assignment.start, seconds, memory, cost)
    total = makespan(assignments)
    return Forecast(runs, total, price.of(total, devices, devices) if price else None, assignments)


def _in_queue(waiting: Sequence[WaitingRun], launcher: Slurm, price: Price | None) -> Forecast:
    """Forecast runs of a cluster; the price is that of a node, or of a device."""
    runs = {}
    for run in waiting:
        slot = launcher.cluster.slot(run.hp)
        seconds = STARTUP_SECONDS + run.remaining * (
            launcher.runtime(run.hp, slot) - STARTUP_SECONDS
        )
        cost = price.of(seconds, slot.ranks, slot.ranks // slot.nodes) if price else None
        memory = _peak_memory(run.hp, slot, launcher)
        runs[run.name] = RunForecast(slot, None, seconds, memory, cost)
    longest = max((run.seconds for run in runs.values()), default=0.0)
    cost = sum(run.cost or 0.0 for run in runs.values()) if price else None
    return Forecast(runs, longest, cost, [])


def _peak_memory(hp: Hyperparameters, slot: Slot, launcher: Local | Slurm) -> int:
    rows = launcher.micro_batches.choose(hp, slot).training
    return peak_memory(hp, rows, slot.device, slot.ranks_of(hp))
