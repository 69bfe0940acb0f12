"""What a sweep will take before anything is spent: time, memory and cost of each run, and which is when on what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slm.hardware.memory import peak_memory
from slm.hardware.runtime import STARTUP_SECONDS, Price
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.sweep.launcher import Waiting
from slm.sweep.local import Local
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.schedule import Job, Placement, chart, makespan
from slm.sweep.slurm import Slurm


@dataclass(frozen=True)
class Share:
    """What one run will take."""

    slot: Slot
    """Where."""
    start: float | None
    """Seconds from now; None where a queue decides."""
    seconds: float
    """How long."""
    memory_bytes: int
    """Peak of tensors on one rank."""
    cost: float | None
    """None without a price."""


@dataclass(frozen=True)
class Forecast:
    """What the runs that are left will take."""

    shares: dict[str, Share]
    """By name of the run."""
    seconds: float
    """Until the last one ends; of the longest where a queue decides."""
    cost: float | None
    """Of all; None without a price."""
    chart: list[str]
    """The schedule drawn; nothing where a queue decides."""


def of(
    waiting: Sequence[Waiting],
    labels: dict[str, str],
    launcher: Local,
    price: Price | None,
    columns: int,
) -> Forecast:
    """The forecast of runs that share one machine; the chart calls them by their labels.

    Raises ValueError where the machine's memory does not hold a run.
    """
    placed = launcher.timetable(waiting, [])
    given, devices, total = (
        {run.name: run.given for run in waiting},
        len(launcher.machine.ids),
        makespan(placed),
    )
    shares, labelled = {}, []
    for own in placed:
        name, slot, seconds = own.job.name, launcher.slot(own), own.end - own.start
        cost = price.of(seconds, len(slot.ids), devices) if price else None
        shares[name] = Share(
            slot, own.start, seconds, _peak(given[name], slot, launcher.memory), cost
        )
        labelled.append(
            Placement(Job(labels[name], own.job.seconds), own.devices, own.start, own.end)
        )
    cost = price.of(total, devices, devices) if price else None
    return Forecast(shares, total, cost, chart(labelled, devices // launcher.unit, columns))


def in_queue(waiting: Sequence[Waiting], launcher: Slurm, price: Price | None) -> Forecast:
    """The forecast of runs that a cluster starts when it can; `price` is of a node, or of a device."""
    shares = {}
    for run in waiting:
        slot = launcher.cluster.slot(run.given)
        seconds = STARTUP_SECONDS + run.left * (launcher.seconds(run.given, slot) - STARTUP_SECONDS)
        cost = price.of(seconds, slot.ranks, slot.ranks // slot.nodes) if price else None
        shares[run.name] = Share(slot, None, seconds, _peak(run.given, slot, launcher.memory), cost)
    total = sum(own.cost or 0.0 for own in shares.values()) if price else None
    return Forecast(shares, max((own.seconds for own in shares.values()), default=0.0), total, [])


def _peak(given: Hyperparameters, slot: Slot, memory: MicroBatches) -> int:
    return peak_memory(given, memory.rows(given, slot).training, slot.device, slot.ranks_of(given))
