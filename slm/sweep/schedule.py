"""Schedule of a sweep: devices and start of each run, so that the sweep ends soonest.

A run takes 1, 2, 4, 8 … devices for its whole duration: a moldable job. Its devices are an aligned
block (0-1, 2-3, 0-3 …), as fast links between GPUs are. Two such blocks are nested or disjoint. If
every run starts as soon as its block is free (list scheduling, Graham 1969), the last one therefore
ends at the largest load of a device,

    max_d  busy_d + Σ seconds of the runs whose block holds d,

and no order ends sooner. (Follow the runs back from the last end, each time to one that ended when
the next began: a device of the smallest block on that path was never idle.) So a schedule is one
block per run, and a partial schedule is described by its loads.

Beam search (Ow & Morton 1988) finds the blocks. Runs are added by decreasing work, each on every
possible block. Loads that differ only by swapped halves of a block count as one. The beam keeps the
partial schedules with the lowest bound, max(largest load, mean load once the remaining runs add
their least work). A narrow beam finds a makespan, a wide one looks for a shorter one. If the wide
beam drops nothing (seven runs on four devices, for example) the result is exact.

With sub-linear speed-up more devices mean more work, and a run gets them only where that shortens
the sweep. With linear speed-up the shortest sweep runs everything on all devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from operator import attrgetter
from typing import NamedTuple

NARROW = 10
"""Width of the first beam: partial schedules."""
WIDE = 2**14
"""Width of the second beam times runs and devices, which bounds its time."""

Choices = dict[int, float]
"""Seconds of a run by number of devices, in increasing order, for the sizes that the machine has.
"""
Loads = tuple[float, ...]
"""Seconds on each device."""


@dataclass(frozen=True)
class Job:
    """A run to schedule."""

    name: str
    seconds: dict[int, float]
    """Duration by number of devices."""


@dataclass(frozen=True)
class Assignment:
    """A run with its devices and times."""

    job: Job
    devices: tuple[int, ...]
    """Indices of the machine's devices: an aligned block."""
    start: float
    """Seconds from now."""
    end: float
    """Seconds from now."""


class _Partial(NamedTuple):
    """A schedule of the first runs."""

    bound: float
    """Lower bound on the makespan of all runs."""
    loads: Loads
    blocks: tuple[range, ...]
    """Devices of the first runs, in order."""


def schedule(jobs: Sequence[Job], devices: int, busy: Mapping[int, float] = {}) -> list[Assignment]:
    """Schedule runs on a machine, in order of start; `busy`: seconds until a device is free.

    Minimises the end of the last run, those that keep devices busy included; no run could use fewer
    devices without delaying it. Of runs that can start at once the widest comes first, then the
    longest. Raises ValueError for a run that needs a larger machine, and for a size that is no
    power of two.
    """
    if not jobs:
        return []
    ordered = sorted(jobs, key=lambda job: _least_work(_choices(job, devices)), reverse=True)
    choices = [_choices(job, devices) for job in ordered]
    idle = tuple(max(0.0, busy.get(device, 0.0)) for device in range(devices))
    best = _beam(choices, idle, NARROW, inf)[0]
    if shorter := _beam(choices, idle, WIDE // (len(jobs) * devices), best.bound):
        best = shorter[0]
    blocks = _narrowed(choices, best)
    return _start_times(list(zip(ordered, blocks, strict=True)), idle)


def makespan(assignments: Sequence[Assignment]) -> float:
    """Return the seconds until the last run ends; 0 without runs."""
    return max((assignment.end for assignment in assignments), default=0.0)


def _choices(job: Job, devices: int) -> Choices:
    for size in job.seconds:
        if size < 1 or size & (size - 1):
            raise ValueError(f"{job.name} on {size} devices: a run takes 1, 2, 4, 8 … devices")
    least = min(job.seconds)
    if least > devices:
        raise ValueError(f"{job.name} needs {least} devices, and the machine has {devices}")
    return {size: job.seconds[size] for size in sorted(job.seconds) if size <= devices}


def _least_work(choices: Choices) -> float:
    """Return the fewest device-seconds that a run can take."""
    return min(size * seconds for size, seconds in choices.items())


def _blocks(choices: Choices, devices: int) -> Iterator[tuple[range, float]]:
    """Yield the blocks on which a run fits, each with its seconds there."""
    for size, seconds in choices.items():
        for first in range(0, devices - size + 1, size):
            yield range(first, first + size), seconds


def _beam(runs: list[Choices], idle: Loads, width: int, limit: float) -> list[_Partial]:
    """Return schedules of all runs that end before a limit, shortest first; [] if there is none."""
    beam = [_Partial(0.0, idle, ())]
    work = sum(map(_least_work, runs))
    for choices in runs:
        work -= _least_work(choices)
        reached: dict[Loads, _Partial] = {}
        for partial in beam:
            for extended in _extensions(partial, choices, work, limit):
                reached.setdefault(_canonical(extended.loads), extended)
        beam = nsmallest(width, reached.values(), key=attrgetter("bound"))
    return beam


def _extensions(
    partial: _Partial, choices: Choices, work: float, limit: float
) -> Iterator[_Partial]:
    """Add one run on each block with a bound below the limit; `work`: that of later runs."""
    loads = partial.loads
    total = sum(loads)
    for block, seconds in _blocks(choices, len(loads)):
        loaded = _loaded(loads, block, seconds)
        mean = (total + len(block) * seconds + work) / len(loads)
        bound = _rounded(max(mean, *loaded))
        if bound < limit:
            yield _Partial(bound, loaded, (*partial.blocks, block))


def _loaded(loads: Loads, block: range, seconds: float) -> Loads:
    loaded = list(loads)
    for device in block:
        loaded[device] += seconds
    return tuple(loaded)


def _free(loads: Sequence[float], block: range) -> float:
    return max(loads[block.start : block.stop])


def _rounded(seconds: float) -> float:
    """Round to nine digits, so that sums are equal in any order."""
    return float(f"{seconds:.9g}")


def _canonical(loads: Loads) -> Loads:
    """Return a representative of the loads that differ only by swapped halves of a block."""
    canonical = list(loads)
    size = 2
    while size <= len(loads):
        for first in range(0, len(loads) - size + 1, size):
            middle = first + size // 2
            lower = canonical[first:middle]
            upper = canonical[middle : first + size]
            canonical[first : first + size] = min(lower + upper, upper + lower)
        size *= 2
    return tuple(canonical)


def _narrowed(runs: list[Choices], best: _Partial) -> list[range]:
    """Return the blocks after moves to fewer devices, or to as many that are free sooner.

    The makespan stays the same. Terminates: of the loads that a move to equally many devices
    changes, the largest falls.
    """
    loads = best.loads
    blocks = list(best.blocks)
    moved = True
    while moved:
        moved = False
        for number, choices in enumerate(runs):
            block = blocks[number]
            rest = _loaded(loads, block, -choices[len(block)])
            current = len(block), _rounded(_free(rest, block))
            options = _options(choices, rest, best.bound)
            size, free, first = min(options, default=(*current, block.start))
            if (size, free) < current:
                moved = True
                blocks[number] = range(first, first + size)
                loads = _loaded(rest, blocks[number], choices[size])
    return blocks


def _options(choices: Choices, loads: Loads, end: float) -> Iterator[tuple[int, float, int]]:
    """Yield the blocks on which a run ends in time: size, when they are free, first device."""
    for block, seconds in _blocks(choices, len(loads)):
        free = _free(loads, block)
        if _rounded(free + seconds) <= end:
            yield len(block), _rounded(free), block.start


def _start_times(runs: list[tuple[Job, range]], idle: Loads) -> list[Assignment]:
    """Start the runs on their blocks, always the one that can start first."""
    waiting = sorted(runs, key=lambda run: (-len(run[1]), -run[0].seconds[len(run[1])]))
    loads = list(idle)
    assignments = []
    while waiting:
        starts = [_free(loads, block) for _, block in waiting]
        start = min(starts)
        job, block = waiting.pop(starts.index(start))
        end = start + job.seconds[len(block)]
        for device in block:
            loads[device] = end
        assignments.append(Assignment(job, tuple(block), start, end))
    return assignments
