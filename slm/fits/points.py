"""What a fit reads: one record per finished run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slm.fits.warning import FitWarning


class NotComparable(ValueError):
    """The runs' losses are not measured on one axis, or are not one family."""


ALLOW = "--allow-mixed takes them as one and labels what comes of it"
ORIGIN = ("recipe", "import", "axis")
"""Parts that say where a run is from: what another part says on one side alone is then no further difference."""
DIGITS = 8
"""Of a fingerprint, shown."""


@dataclass(frozen=True)
class Point:
    """The end of one run. Checkpoints of one run are not independent and never make two points."""

    run_id: str
    """Identity of the run."""
    recipe: str
    """Name of the family."""
    depth: int
    """Layers."""
    params: float
    """N; the convention is said once, at the fit. NaN where it is not known."""
    tokens: float
    """D, training tokens. NaN where they are not known: a run without either has its place on L(C) alone."""
    flops: float
    """C, training FLOPs as counted, not 6·N·D."""
    loss: float
    """Final validation loss in bits per byte."""
    seed: int
    """Seed; runs that differ in nothing else are replicates."""
    budget: float | None
    """FLOPs asked for, of a run in an isoFLOP grid; None for a compute-optimal run."""
    comparison_key: str
    """Losses of two different keys are not one axis; `name=value` parts joined by blanks."""
    weight: float = 1.0
    """Of the run in the objective of a surface; the laws and valleys give every run one."""
    core: float | None = None
    """CORE, or the mean of another bundle: centred accuracy, 0 at chance; None where it was not measured."""
    core_error: float | None = None
    """Its standard error over examples; None where it is not known, and then that of all of CORE's."""
    core_key: str | None = None
    """Values of `core` of two different keys are not one axis; None of a source that does not say."""

    def __post_init__(self) -> None:
        """Refuse what has no logarithm, by name: ValueError."""
        for name in ("depth", "params", "tokens", "flops", "loss", "budget", "weight"):
            value = getattr(self, name)
            unknown = value is None or (name in ("params", "tokens") and math.isnan(value))
            if not unknown and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"run {self.run_id}: {name} is {value}; a fit needs positive finite numbers"
                )
        if self.core is not None and not -1 <= self.core <= 1:
            raise ValueError(
                f"run {self.run_id}: core is {self.core}; a centred accuracy lies from -1 to 1"
            )

    @property
    def sized(self) -> bool:
        """Whether its size and tokens are known, as a surface and a valley need."""
        return not math.isnan(self.params + self.tokens)

    @property
    def setting(self) -> tuple[float, ...]:
        """What runs share that differ in nothing but the seed."""
        return (
            (self.depth, self.params, self.tokens, self.budget or 0.0)
            if self.sized
            else (self.depth, self.flops)
        )

    @property
    def parts(self) -> dict[str, str]:
        """What one curve has in common: the family, and the parts of the comparison key."""
        return {"recipe": self.recipe, **parts_of(self.comparison_key)}

    @property
    def core_name(self) -> str:
        """What `core` is called: CORE, or the name of another bundle."""
        named = re.search(r"(?:^|\s)metric=(\S+)", self.core_key or "")
        return named[1] if named and named[1] != "core" else "CORE"


def check(points: Sequence[Point], mixed: bool = False) -> None:
    """Raise ValueError for no run or one given twice, NotComparable for several recipes or comparison keys.

    `mixed` takes several as one curve, on the caller's word.
    """
    if not points:
        raise ValueError("there is no finished run to fit")
    ids = [point.run_id for point in points]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"run {twice[0]} is given twice; a run is one point")
    told = differences([point.parts for point in points])
    if told and not mixed:
        raise NotComparable(
            f"the runs are not one curve: {told}; name one experiment or one family, or {ALLOW}"
        )


def parts_of(key: str) -> dict[str, str]:
    """Name -> value of a comparison key; what has no name is `key`, and a name given twice has both values."""
    found: dict[str, str] = {}
    for part in key.split():
        name, value = part.split("=", 1) if "=" in part else ("key", part)
        found[name] = f"{found[name]} {value}" if name in found else value
    return found


def differences(runs: Sequence[Mapping[str, str]]) -> str:
    """The parts of the runs' axes that differ, each value with its number of runs; empty where none does."""
    names = dict.fromkeys(name for own in runs for name in own)
    counts = {name: Counter(own.get(name) for own in runs) for name in names}
    differ = {name: own for name, own in counts.items() if len(own) > 1}
    telling = [
        name for name, own in differ.items() if name in ORIGIN or len(own.keys() - {None}) > 1
    ]
    return "; ".join(f"{name}: {_against(differ[name])}" for name in telling or differ)


def _against(values: Counter[str | None]) -> str:
    """Each value with its runs; a fingerprint by its first digits."""
    shown = {value: _short(value) for value in values}
    if len(set(shown.values())) < len(values):
        shown = {value: value or "none" for value in values}
    return " against ".join(
        f"{shown[value]} ({count} run{'s' * (count != 1)})" for value, count in values.items()
    )


def _short(value: str | None) -> str:
    return (
        f"{value[:DIGITS]}…"
        if value and re.fullmatch(rf"[0-9a-f]{{{DIGITS + 2},}}", value)
        else value or "none"
    )


def axes_of(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """The axes of runs that are on several, as keys; none where they are on one."""
    keys = {" ".join(f"{name}={value}" for name, value in sorted(own.items())) for own in runs}
    return sorted(keys) if len(keys) > 1 else []


def mixture(runs: Sequence[Mapping[str, str]]) -> list[FitWarning]:
    """What a reader must know of runs of several axes: one caution, none where they are on one."""
    if not axes_of(runs):
        return []
    why = (
        "taken as one on your word, so that what sets them apart counts as compute, recipe or noise"
    )
    return [FitWarning("mixed-axes", f"{len(axes_of(runs))} axes are {why}: {differences(runs)}")]
