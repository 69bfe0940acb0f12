"""Which run of a sweep trains on which devices of a machine, and when, so that the whole sweep ends soonest.

A run takes 1, 2, 4, 8 … devices, chosen once and kept: a moldable job. They are an aligned block (0-1, 2-3, 0-3 …), as
fast links between GPUs are. Of two such blocks one holds the other or they share no device. So when whichever run can
start first does (list scheduling, Graham 1969), the last one ends at the largest load of a device,

    max_d  busy_d + Σ seconds of the runs whose block holds d,

and in no order could it end sooner. (From the last end go back, run by run, to one that ended as the next began: a
device of the smallest block on that way was never idle.) A schedule is therefore a block for each run, and all that
matters of a partial one is its loads.

They are found by beam search (Ow & Morton 1988): runs of most work first, each on every block. Of loads that differ by
halves of a block that changed places one is kept; of all of them those that promise the shortest sweep, by
max(largest load, mean of the loads with the least work left). A narrow beam finds a makespan, a wide one what is
shorter; where it drops nothing, as with seven runs on four devices, the answer is exact.

Where speed-ups are sub-linear, more devices are more work, and a run has them only where that shortens the whole.
Where they are linear, every run on all devices is the shortest sweep there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from operator import attrgetter
from typing import NamedTuple

NARROW = 10
"""Partial schedules that the first beam keeps."""
WIDE = 2**14
"""Those of the second, times runs and devices: this bounds its time."""
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
"""Seconds of the units of a time axis."""
TICK_COLUMNS = 10
"""Columns from one tick to the next, at least."""

Choices = dict[int, float]
"""Seconds of a run by the numbers of devices that the machine has, fewest first."""
Loads = tuple[float, ...]
"""Seconds on each device."""


@dataclass(frozen=True)
class Job:
    """A run to be placed."""

    name: str
    """What people call it."""
    seconds: dict[int, float]
    """How long it takes, by number of devices."""


@dataclass(frozen=True)
class Placement:
    """A run with its devices and times."""

    job: Job
    """The run."""
    devices: tuple[int, ...]
    """Indices of the machine's devices: an aligned block."""
    start: float
    """Seconds from now."""
    end: float
    """Seconds from now."""


class _Partial(NamedTuple):
    """A schedule of the first runs."""

    bound: float
    """Seconds that all runs will take, at least."""
    loads: Loads
    """What the first runs come to."""
    blocks: tuple[range, ...]
    """Where they are."""


def schedule(jobs: Sequence[Job], devices: int, busy: Mapping[int, float] = {}) -> list[Placement]:
    """The runs on a machine, in order of start; `busy` = seconds until a device is free.

    The sweep ends with its last run, those that keep devices busy included, and no run could have fewer devices
    without a later end. Of runs that could start at once the widest is first, then the longest.
    Raises ValueError for a run that the machine is too small for, and for a size that is no power of two.
    """
    if not jobs:
        return []
    runs = sorted(jobs, key=lambda job: _least_work(_choices(job, devices)), reverse=True)
    choices = [_choices(job, devices) for job in runs]
    idle = tuple(max(0.0, busy.get(device, 0.0)) for device in range(devices))
    best = _beam(choices, idle, NARROW, inf)[0]
    best = next(iter(_beam(choices, idle, WIDE // (len(runs) * devices), best.bound)), best)
    return _started(list(zip(runs, _settled(choices, best))), idle)


def makespan(placements: Sequence[Placement]) -> float:
    """Seconds until the last run ends; 0 without runs."""
    return max((placement.end for placement in placements), default=0.0)


def lower_bound(jobs: Sequence[Job], devices: int) -> float:
    """Seconds that every schedule takes on devices that are free, whatever the blocks.

    In a schedule of T seconds each run has a number of devices with which it ends within T. So T is at least the
    longest of the runs at their fastest, and at least the least work so possible, in device-seconds, over the devices:
    the smallest T for which both hold (Turek, Wolf & Yu 1992; Ludwig & Tiwari 1994).
    """
    choices = [_choices(job, devices) for job in jobs]
    fastest = max((min(own.values()) for own in choices), default=0.0)
    ends = {seconds for own in choices for seconds in own.values() if seconds >= fastest}
    return min(
        (max(end, sum(_least_work(own, end) for own in choices) / devices) for end in ends),
        default=0.0,
    )


def _choices(job: Job, devices: int) -> Choices:
    for size in job.seconds:
        if size < 1 or size & (size - 1):
            raise ValueError(f"{job.name} on {size} devices: a run takes 1, 2, 4, 8 … of them")
    if min(job.seconds) > devices:
        raise ValueError(
            f"{job.name} takes {min(job.seconds)} devices, and the machine has {devices}"
        )
    return {size: seconds for size, seconds in sorted(job.seconds.items()) if size <= devices}


def _least_work(choices: Choices, end: float = inf) -> float:
    """Device-seconds of a run that may take so long, at least."""
    return min(size * seconds for size, seconds in choices.items() if seconds <= end)


def _blocks(size: int, devices: int) -> Iterator[range]:
    return (range(first, first + size) for first in range(0, devices - size + 1, size))


def _beam(runs: list[Choices], idle: Loads, width: int, limit: float) -> list[_Partial]:
    """Schedules of all runs that end before a limit, the shortest first; none if the beam met none."""
    beam = [_Partial(0.0, idle, ())]
    left = sum(map(_least_work, runs))
    for choices in runs:
        left -= _least_work(choices)
        reached: dict[Loads, _Partial] = {}
        for partial in beam:
            for longer in _longer(partial, choices, left, limit):
                reached.setdefault(_canonical(longer.loads), longer)
        beam = nsmallest(width, reached.values(), key=attrgetter("bound"))
    return beam


def _longer(partial: _Partial, choices: Choices, left: float, limit: float) -> Iterator[_Partial]:
    """A partial schedule with one more run, on each block where all may still end before the limit."""
    loads = partial.loads
    for size, seconds in choices.items():
        mean = (sum(loads) + size * seconds + left) / len(loads)
        for block in _blocks(size, len(loads)):
            loaded = _loaded(loads, block, seconds)
            bound = _rounded(max(mean, *loaded))
            if bound < limit:
                yield _Partial(bound, loaded, (*partial.blocks, block))


def _loaded(loads: Loads, block: range, seconds: float) -> Loads:
    return (
        *loads[: block.start],
        *[load + seconds for load in loads[block.start : block.stop]],
        *loads[block.stop :],
    )


def _free(loads: Loads, block: range) -> float:
    return max(loads[block.start : block.stop])


def _rounded(seconds: float) -> float:
    """To nine digits, so that sums are equal whatever their order."""
    return float(f"{seconds:.9g}")


def _canonical(loads: Loads) -> Loads:
    """The same for loads that differ by halves of a block that changed places."""
    half = 1
    while 2 * half <= len(loads):
        for first in range(0, len(loads) - 2 * half + 1, 2 * half):
            left, right = loads[first : first + half], loads[first + half : first + 2 * half]
            if right < left:
                loads = (*loads[:first], *right, *left, *loads[first + 2 * half :])
        half *= 2
    return loads


def _settled(runs: list[Choices], best: _Partial) -> list[range]:
    """Blocks of the runs, each moved to fewer devices, or to as many that are free sooner, while the end stays.

    It comes to rest: of the loads that a move to as many devices changes, the largest falls.
    """
    loads, blocks, moved = best.loads, list(best.blocks), True
    while moved:
        moved = False
        for number, choices in enumerate(runs):
            own = blocks[number]
            others = _loaded(loads, own, -choices[len(own)])
            now = len(own), _rounded(_free(others, own)), own.start
            size, free, first = min(_seats(choices, others, best.bound), default=now)
            if (size, free) < now[:2]:
                blocks[number], moved = range(first, first + size), True
                loads = _loaded(others, blocks[number], choices[size])
    return blocks


def _seats(choices: Choices, others: Loads, end: float) -> Iterator[tuple[int, float, int]]:
    """Blocks on which a run can end in time: how many devices, when they are free, the first of them."""
    for size, seconds in choices.items():
        for block in _blocks(size, len(others)):
            if _rounded(_free(others, block) + seconds) <= end:
                yield size, _rounded(_free(others, block)), block.start


def _started(runs: list[tuple[Job, range]], idle: Loads) -> list[Placement]:
    """The runs on their blocks, whichever can start first."""
    waiting = sorted(runs, key=lambda run: (-len(run[1]), -run[0].seconds[len(run[1])]))
    loads, placements = idle, []
    while waiting:
        starts = [_free(loads, block) for _, block in waiting]
        start = min(starts)
        job, block = waiting.pop(starts.index(start))
        end = start + job.seconds[len(block)]
        loads = (*loads[: block.start], *[end] * len(block), *loads[block.stop :])
        placements.append(Placement(job, tuple(block), start, end))
    return placements


def chart(placements: Sequence[Placement], devices: int, width: int) -> list[str]:
    """The schedule as text, `width` columns at most: a line of bars for each device, and an axis of time."""
    margin = len(str(devices - 1)) + 1
    columns = width - margin
    scale = (columns - 1) / (makespan(placements) or 1.0)
    lines = [[" "] * columns for _ in range(devices)]
    for placement in placements:
        first, last = round(placement.start * scale), round(placement.end * scale)
        for device in placement.devices:
            lines[device][first : last + 1] = _bar(placement.job.name, last - first)
    bars = [f"{device:>{margin - 1}} {''.join(line).rstrip()}" for device, line in enumerate(lines)]
    return [*bars, " " * margin + _axis(columns, scale)]


def _bar(name: str, columns: int) -> str:
    """`|d20 ------|`, whose last column is the first of the next bar; without a name that does not fit."""
    label = f"{name} "[: columns - 1] if len(name) < columns else ""
    return f"|{label:-<{columns - 1}}|" if columns else "|"


def _axis(columns: int, scale: float) -> str:
    """Times at even distances, each behind the mark of its column; `scale` = columns a second."""
    apart = TICK_COLUMNS / scale
    unit = next((unit for unit, seconds in UNITS.items() if apart <= 20 * seconds), "d")
    counts = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(count for count in counts if count * UNITS[unit] >= apart)
    ticks = [
        (round(number * UNITS[unit] * scale), f"|{number} {unit}")
        for number in range(0, columns * step, step)
    ]
    line = ""
    for column, text in ticks:
        line = f"{line:<{column}}{text}" if column + len(text) <= columns else line
    return line
