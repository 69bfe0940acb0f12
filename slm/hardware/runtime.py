"""How long a run will take and what it costs: a model of FLOPs over throughput, corrected by every finished run.

Symbols: C training FLOPs of a run, d width, L depth, S steps, w workers (ranks times threads).

DevicePrior           seconds at work = warm-up + S·L·(overhead of a layer) + C / rate,
                rate = share·peak·w^efficiency·d / (d + half width): small matrices use less of a device.
Correction      ln(measured / guessed) of the finished runs on a device of the same name is, around the run to be
                estimated, level + slopes·(differences in ln d, ln batch, ln w) + noise: Bayesian linear regression with
                the prior deviations below. One run shifts everything, more of them teach the slopes. Far runs have
                more noise. The noise is Student's (by reweighting), so that one run on a busy machine bends little.
Whole run       the time at work, and START.

Other devices inform nothing. Tests hold the median error from the third run on, each run estimated from the smaller
ones, to 20 %: in published times of eleven models on eight H100s, and in pocket sweeps on one and two quiet cores.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from slm.files import read_json
from slm.hardware import devices

if TYPE_CHECKING:
    from slm.hardware.slot import Slot
    from slm.recipe import Hyperparameters

START = 4.0
"""Seconds of torchrun and imports before the trainer is at work: 2.5 to 5 on two cores."""


@dataclass(frozen=True)
class DevicePrior:
    """What is taken for a kind of device until runs on it are measured."""

    peak: float
    """FLOPs a second of one device, or one CPU thread, whose own peak is not known."""
    share: float
    """Part of the peak that a wide model reaches on one worker."""
    half_width: float
    """Width at which a model reaches half of that."""
    efficiency: float
    """Exponent of the speed-up by workers."""
    layer_seconds: float
    """Time a layer and step beyond its FLOPs: the many small operations."""
    warm_up: float
    """Seconds at work before the first step."""


GUESSES = {
    "cpu": DevicePrior(
        peak=80e9, share=1.0, half_width=80, efficiency=0.6, layer_seconds=2.5e-3, warm_up=0.5
    ),
    "mps": DevicePrior(
        peak=5e12, share=0.7, half_width=384, efficiency=1.0, layer_seconds=1e-3, warm_up=1.0
    ),
    "cuda": DevicePrior(
        peak=1e14, share=0.7, half_width=384, efficiency=0.92, layer_seconds=5e-4, warm_up=30.0
    ),
}
"""By device. `cuda` comes within a tenth of nanochat's published MFU (41, 46 and 51 % at d12, d18 and d24 on eight
H100s, 53 % at d16 on one); its warm-up, which is compiling, is a guess. `cpu` is what pocket reached on a machine with
AVX-512: another may have a quarter of it. `mps` is a guess throughout."""

LEVEL, SLOPES = 1.5, (0.5, 0.2, 0.3)
"""Prior deviations: how far a guess may be off, in ln seconds, and how much that may change for e times the width, the
batch, the workers."""
NOISE = 0.1
"""Scatter of equal runs, in ln seconds; at e times the width, the batch or the workers its variance is doubled."""
ROUNDS = 20
"""Reweightings; few change anything where no run is far off."""


@dataclass(frozen=True)
class Past:
    """A finished run as its home has it."""

    flops: float
    """Training FLOPs."""
    width: int
    """Model dimension."""
    depth: int
    """Layers."""
    batch_tokens: int
    """Tokens a step."""
    steps: int
    """Optimiser steps."""
    device_name: str
    """What it ran on, as `devices.name` says."""
    ranks: int
    """Processes."""
    threads: int
    """Threads a process."""
    wall_seconds: float
    """Time of the trainer at work, evaluation and checkpoints included, START not."""
    estimated_seconds: float | None
    """What its start was told it would take, START included; None where nothing was, or it took several attempts."""


class Throughput:
    """Estimates times from what is known of devices and from finished runs."""

    def __init__(self, past: Sequence[Past]) -> None:
        self._past: defaultdict[str, list[Past]] = defaultdict(list)
        for run in past:
            self._past[run.device_name].append(run)

    def seconds(
        self, given: Hyperparameters, device: str, device_name: str, ranks: int, threads: int = 1
    ) -> float:
        """Seconds of a whole run on "cpu", "cuda" or "mps", start-up included."""
        guessed = _at_work(given, device, device_name, ranks * threads)
        here = _place(given, ranks * threads)
        errors, differences = [], []
        for run in self._past.get(device_name, ()):
            workers = run.ranks * run.threads
            errors.append(math.log(run.wall_seconds / _at_work(run, device, device_name, workers)))
            differences.append([there - own for there, own in zip(_place(run, workers), here)])
        return START + guessed * (math.exp(_level(errors, differences)) if errors else 1.0)

    def basis(self, device: str, device_name: str) -> str:
        """What estimates for a device rest on: "5 runs", "its peak", or "a guess"."""
        if runs := len(self._past.get(device_name, ())):
            return "1 run" if runs == 1 else f"{runs} runs"
        return "its peak" if device == "cuda" and devices.peak_flops(device_name) else "a guess"


class RuntimeModel:
    """The times of runs on slots, as the finished runs of a home teach them."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._found: dict[str, Past] = {}
        self.learn()

    def learn(self) -> None:
        """Look at what has finished."""
        self._found |= _finished(self._home, self._found)
        self.past = list(self._found.values())
        """The finished runs."""
        self.throughput = Throughput(self.past)
        """What they taught."""
        self._known: dict[tuple[Hyperparameters, Slot], float] = {}

    def __call__(self, given: Hyperparameters, slot: Slot) -> float:
        """Seconds of a whole run on a slot."""
        if (given, slot) not in self._known:
            device, name, ranks = slot.device, slot.device_name, slot.ranks_of(given)
            self._known[given, slot] = self.throughput.seconds(
                given, device, name, ranks, slot.threads
            )
        return self._known[given, slot]


def _at_work(run: Hyperparameters | Past, device: str, device_name: str, workers: int) -> float:
    """The guess of a run's seconds at work."""
    guess = GUESSES[device]
    peak = devices.peak_flops(device_name) or guess.peak
    rate = (
        guess.share * peak * workers**guess.efficiency * run.width / (run.width + guess.half_width)
    )
    return guess.warm_up + run.steps * run.depth * guess.layer_seconds + run.flops / rate


def _place(run: Hyperparameters | Past, workers: int) -> tuple[float, float, float]:
    """Where a run lies among others that a guess may be wrong for."""
    return math.log(run.width), math.log(run.batch_tokens), math.log(workers)


def _level(errors: list[float], differences: list[list[float]]) -> float:
    """The error, in ln seconds, to expect where the differences are none."""
    import numpy as np

    y, x = np.array(errors), np.array(differences)
    terms = np.column_stack(
        [np.full(len(y), LEVEL), x * SLOPES]
    )  # in units of the prior's deviations
    variance = NOISE**2 * (1 + (x**2).sum(1))
    mean = np.array([np.median(y) / LEVEL, *(0.0 for _ in SLOPES)])
    for _ in range(ROUNDS):
        weights = (
            2 / (1 + (y - terms @ mean) ** 2 / variance) / variance
        )  # Student's, one degree of freedom
        precision = terms.T @ (weights[:, None] * terms) + np.eye(len(mean))
        mean = np.linalg.solve(precision, terms.T @ (weights * y))
    return float(mean[0] * LEVEL)


def past_error(past: Sequence[Past]) -> float | None:
    """Median of |estimated / actual - 1| over the runs that had an estimate; None where none had."""
    errors = [
        abs(run.estimated_seconds / (START + run.wall_seconds) - 1)
        for run in past
        if run.estimated_seconds
    ]
    return median(errors) if errors else None


def past_runs(home: Path) -> list[Past]:
    """The finished runs of a home, by its files; what cannot be read, or changed its device on the way, is left out."""
    return list(_finished(home, {}).values())


def _finished(home: Path, known: Mapping[str, Past]) -> dict[str, Past]:
    """The finished runs of a home by run_id, those left out that are known: what is finished stays as it is."""
    folders = sorted(set(os.listdir(home)) - known.keys()) if home.is_dir() else []
    return {name: run for name in folders if (run := _past(home / name))}


def _past(folder: Path) -> Past | None:
    """A run by its files; None where they do not say how long it took on one kind of device."""
    try:
        done, given = (
            read_json(folder / "done.json"),
            read_json(folder / "plan.json")["hyperparameters"],
        )
        count = int(done["attempt"])
        attempts = [
            read_json(folder / "attempts" / f"{k:03d}" / "attempt.json")
            for k in range(1, count + 1)
        ]
        ((name, ranks, threads),) = {
            (attempt["device_name"], attempt["ranks"], attempt["threads"]) for attempt in attempts
        }
        width, depth, batch, steps = (
            int(given[key]) for key in ("width", "depth", "batch_tokens", "steps")
        )
        estimated = attempts[0].get("estimated_seconds") if count == 1 else None
        took, estimated = float(done["wall_seconds"]), estimated and float(estimated)
        run = Past(
            float(done["flops"]), width, depth, batch, steps, name, ranks, threads, took, estimated
        )
        numbers = (run.flops, run.width, run.batch_tokens, run.ranks, run.threads, run.wall_seconds)
        return run if all(0 < number < math.inf for number in numbers) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class Price:
    """What an hour costs."""

    amount: float
    """Of any currency, an hour."""
    per_device: bool
    """Whether of one device, or of the whole machine."""

    def of(self, seconds: float, devices_used: int, devices_total: int) -> float:
        """The cost of a time on some of a machine's devices: of those, or their share of the machine."""
        units = devices_used if self.per_device else devices_used / devices_total
        return self.amount * units * seconds / 3600


def price_of(text: str) -> Price:
    """The price in "24/h" or "24", of the whole machine, or "3/gpu/h", of one device. Raises ValueError for another."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(/gpu)?(/h)?", text.strip())
    if found is None:
        raise ValueError(
            f"--price {text!r}: write 24/h for the whole machine, or 3/gpu/h for one device"
        )
    return Price(float(found[1]), found[2] is not None)
