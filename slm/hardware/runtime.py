"""Run time and cost of a run: FLOPs over throughput, corrected by every finished run.

Symbols: C training FLOPs of a run, d width, L depth, S steps, w workers (ranks times threads).

Prior           trainer seconds = warm-up + S·L·(overhead of a layer) + C / rate,
                rate = share·peak·w^efficiency·d / (d + half width): small matrices use less of a
                device.
Correction      ln(measured / prior) of the finished runs on a device of the same name is, around
                the run to be estimated, level + slopes·(differences in ln d, ln batch, ln w) +
                noise: Bayesian linear regression with the prior deviations below. One run shifts
                every estimate, more of them fit the slopes. Runs of other sizes have more noise.
                The noise is Student's (by reweighting), so that one run on a busy machine bends
                little.
Whole run       the trainer's seconds, and STARTUP_SECONDS.

Runs on other devices do not count. Tests hold the median error from the third run on, each run
estimated from the smaller ones, to 20 %: in published times of eleven models on eight H100s, and in
pocket sweeps on one and two quiet cores.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from slm import text
from slm.files import read_json
from slm.hardware import devices

if TYPE_CHECKING:
    from slm.hardware.slot import Slot
    from slm.recipe import Hyperparameters

STARTUP_SECONDS = 4.0
"""Seconds of torchrun and imports before the trainer starts: 2.5 to 5 on two cores."""


@dataclass(frozen=True)
class DevicePrior:
    """Throughput of a kind of device until runs on it are measured."""

    peak: float
    """FLOPs a second of one device, or one CPU thread, whose own peak is not known."""
    share: float
    """Part of the peak that a wide model reaches on one worker."""
    half_width: float
    """Width at which a model reaches half of that."""
    efficiency: float
    """Exponent of the speed-up by workers."""
    layer_seconds: float
    """Seconds a layer and step beyond its FLOPs: the many small operations."""
    warm_up: float
    """Seconds of the trainer before the first step."""

    def seconds(self, run: Hyperparameters | FinishedRun, name: str, workers: int) -> float:
        """Return the trainer's seconds for a run on a device of a name."""
        peak = devices.peak_flops(name) or self.peak
        speed_up = workers**self.efficiency
        rate = self.share * peak * speed_up * run.width / (run.width + self.half_width)
        overhead = run.steps * run.depth * self.layer_seconds
        return self.warm_up + overhead + run.flops / rate


PRIORS = {
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
"""Prior of each device. `cuda` comes within a tenth of nanochat's published MFU (41, 46 and 51 % at
d12, d18 and d24 on eight H100s, 53 % at d16 on one); its warm-up, which is compiling, is a guess.
`cpu` is what pocket reached on a machine with AVX-512: another may have a quarter of it. `mps` is a
guess throughout."""

LEVEL = 1.5
"""Prior deviation of the level: the prior's possible error, in ln seconds."""
SLOPES = (0.5, 0.2, 0.3)
"""Prior deviations of the slopes: the error's possible change, in ln seconds, for e times the
width, the batch, the workers."""
NOISE = 0.1
"""Scatter of equal runs, in ln seconds; at e times the width, the batch or the workers its variance
is doubled."""
ROUNDS = 20
"""Reweightings; a few of them suffice where no run is an outlier."""


@dataclass(frozen=True)
class FinishedRun:
    """Size and run time of a finished run, as its home records them."""

    flops: float
    width: int
    depth: int
    batch_tokens: int
    steps: int
    device_name: str
    """The device as `devices.name` names it."""
    ranks: int
    threads: int
    """Threads of each rank."""
    wall_seconds: float
    """Seconds of the trainer, evaluation and checkpoints included, STARTUP_SECONDS not."""
    estimated_seconds: float | None
    """Estimate that was made at its start, STARTUP_SECONDS included; None without one, or where the
    run took several attempts."""

    @property
    def workers(self) -> int:
        """Ranks times threads."""
        return self.ranks * self.threads

    @classmethod
    def read(cls, folder: Path) -> FinishedRun | None:
        """Read a run's files; None where they do not give its time on one kind of device."""
        try:
            done = read_json(folder / "done.json")
            hp = read_json(folder / "plan.json")["hyperparameters"]
            attempts = []
            for number in range(1, done["attempt"] + 1):
                path = folder / "attempts" / f"{number:03d}" / "attempt.json"
                attempts.append(read_json(path))
            setups = {(item["device_name"], item["ranks"], item["threads"]) for item in attempts}
            ((name, ranks, threads),) = setups
            estimate = attempts[0].get("estimated_seconds") if len(attempts) == 1 else None
            run = cls(
                flops=done["flops"],
                width=hp["width"],
                depth=int(hp["depth"]),
                batch_tokens=hp["batch_tokens"],
                steps=int(hp["steps"]),
                device_name=name,
                ranks=ranks,
                threads=threads,
                wall_seconds=done["wall_seconds"],
                estimated_seconds=estimate and float(estimate),
            )
            positive = (run.flops, run.width, run.batch_tokens, run.workers, run.wall_seconds)
            return run if all(0 < number < math.inf for number in positive) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Throughput:
    """Run times from the priors of devices and from finished runs."""

    runs: Sequence[FinishedRun]

    def _runs_on(self, device_name: str) -> list[FinishedRun]:
        return [run for run in self.runs if run.device_name == device_name]

    def seconds(
        self, hp: Hyperparameters, device: str, device_name: str, ranks: int, threads: int = 1
    ) -> float:
        """Return the seconds of a whole run on "cpu", "cuda" or "mps", start-up included."""
        prior = PRIORS[device]
        workers = ranks * threads
        seconds = prior.seconds(hp, device_name, workers)
        point = _coordinates(hp, workers)
        errors = []
        differences = []
        for run in self._runs_on(device_name):
            error = run.wall_seconds / prior.seconds(run, device_name, run.workers)
            errors.append(math.log(error))
            run_point = _coordinates(run, run.workers)
            differences.append([x - x0 for x, x0 in zip(run_point, point, strict=True)])
        correction = math.exp(_level(errors, differences)) if errors else 1.0
        return STARTUP_SECONDS + seconds * correction

    def basis(self, device: str, device_name: str) -> str:
        """Return the basis of a device's estimates: "5 runs", "its peak", or "a guess"."""
        if runs := self._runs_on(device_name):
            return text.plural(len(runs), "run")
        is_known = device == "cuda" and devices.peak_flops(device_name)
        return "its peak" if is_known else "a guess"


class RuntimeModel:
    """Run times on slots, corrected by the finished runs of a home."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs: dict[str, FinishedRun] = {}
        self.throughput = Throughput([])
        """The model fitted to the finished runs."""
        self._seconds = cache(self.throughput.seconds)
        self.learn()

    @property
    def runs(self) -> list[FinishedRun]:
        """The finished runs; unreadable ones, and those that changed their device, are left out."""
        return list(self._runs.values())

    def learn(self) -> None:
        """Read the runs that have finished since the last call; a finished run never changes."""
        folders = os.listdir(self._home) if self._home.is_dir() else []
        for name in sorted({*folders} - self._runs.keys()):
            if run := FinishedRun.read(self._home / name):
                self._runs[name] = run
        self.throughput = Throughput(self.runs)
        self._seconds = cache(self.throughput.seconds)

    def __call__(self, hp: Hyperparameters, slot: Slot) -> float:
        """Return the seconds of a whole run on a slot."""
        ranks = slot.ranks_of(hp)
        return self._seconds(hp, slot.device, slot.device_name, ranks, slot.threads)


def _coordinates(run: Hyperparameters | FinishedRun, workers: int) -> tuple[float, float, float]:
    """Return ln d, ln batch and ln w of a run."""
    return math.log(run.width), math.log(run.batch_tokens), math.log(workers)


def _level(errors: list[float], differences: list[list[float]]) -> float:
    """Return the error, in ln seconds, to expect where the differences are zero."""
    import numpy as np

    y = np.array(errors)
    x = np.array(differences)
    # terms are in units of the prior's deviations, so that their prior precision is the identity
    terms = np.column_stack([np.full(len(y), LEVEL), x * SLOPES])
    variance = NOISE**2 * (1 + (x**2).sum(1))
    mean = np.zeros(1 + len(SLOPES))
    mean[0] = np.median(y) / LEVEL
    for _ in range(ROUNDS):
        # the weights of Student's distribution with one degree of freedom
        residuals = y - terms @ mean
        weights = 2 / (1 + residuals**2 / variance) / variance
        precision = terms.T @ (weights[:, None] * terms) + np.eye(len(mean))
        mean = np.linalg.solve(precision, terms.T @ (weights * y))
    return float(mean[0] * LEVEL)


def median_error(runs: Sequence[FinishedRun]) -> float | None:
    """Return the median of |estimated / actual - 1| over the runs with an estimate, else None."""
    errors = []
    for run in runs:
        if run.estimated_seconds:
            actual = STARTUP_SECONDS + run.wall_seconds
            errors.append(abs(run.estimated_seconds / actual - 1))
    return median(errors) if errors else None


@dataclass(frozen=True)
class Price:
    """Price of an hour, in any currency."""

    amount: float
    per_device: bool
    """Whether the amount is for one device, or for the whole machine."""

    def of(self, seconds: float, devices_used: int, devices_total: int) -> float:
        """Return the cost of the devices used: theirs, or their share of the machine's."""
        units = devices_used if self.per_device else devices_used / devices_total
        return self.amount * units * seconds / 3600


def parse_price(price: str) -> Price:
    """Parse "24/h" or "24" (the whole machine) and "3/gpu/h" (one device).

    Raises ValueError for any other text.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(/gpu)?(/h)?", price.strip())
    if match is None:
        raise ValueError(
            f"--price {price!r}: write 24/h for the whole machine, or 3/gpu/h for one device"
        )
    return Price(float(match[1]), per_device=match[2] is not None)
