"""What a comparison claims, in one code and one sentence; and which further seeds would be expected to decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slm.fits.compare.e_values import BETTING, ENOUGH, e_value
from slm.fits.compare.effects import Effect, Gaps

Array = NDArray[np.float64]

EQUAL = 0.05
"""Shares of compute that make no difference."""
SEEDS = 8
"""Further seeds a side that are still affordable."""
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Advice:
    """The cheapest further seeds that are expected to decide, were estimate and noise as they seem."""

    depth: int | None
    """Where; None is at every depth."""
    seeds: int
    """Further seeds of each recipe."""
    flops: float
    """What they cost."""


@dataclass(frozen=True)
class Verdict:
    """The answer."""

    code: str
    """better_every_depth, better_overall, better_some_depths, gain_shrinks, worse_every_depth, worse_overall,
    worse_some_depths, mixed, equal or cannot_tell."""
    sentence: str
    """In words."""
    advice: Advice | None
    """Where it cannot tell and seeds would."""


def decide(
    names: tuple[str, str],
    amount: str,
    claims: Mapping[int, str | None],
    whole: str | None,
    shrinking: str | None,
    within: float | None,
    measured: bool,
    advice: Advice | None,
) -> Verdict:
    """The verdict on (base, candidate).

    `amount` is the effect in words, `claims` what is shown (`better` or `worse`) at each depth and `whole` over all,
    `shrinking` the words for a gain shown to shrink, `within` how far from equal the recipes may be, as a share of
    compute, `measured` whether the runs hold their noise at all.
    """
    base, candidate = names
    places = {
        word: [depth for depth, claim in claims.items() if claim == word]
        for word in ("better", "worse")
    }
    shown = [word for word, own in places.items() if own or whole == word]
    if len(shown) > 1:
        where = " and ".join(
            f"{word} {'at ' + spoken(own) if own else 'over all depths'}"
            for word, own in places.items()
        )
        return Verdict("mixed", f"{candidate} is {where} than {base}: {amount}", None)
    for word in shown:
        here, lead = places[word], f"{candidate} is {word} than {base}"
        if word == "better" and whole == word and shrinking:
            return Verdict(
                "gain_shrinks",
                f"{lead}, but the gain shrinks with depth, {shrinking}: {amount}",
                None,
            )
        if len(here) == len(claims) > 1:
            return Verdict(f"{word}_every_depth", f"{lead} at every depth: {amount}", None)
        if whole == word and len(claims) > 1:
            alone = f"shown alone at {spoken(here)}" if here else "not shown at any depth alone"
            return Verdict(f"{word}_overall", f"{lead} over all depths, {alone}: {amount}", None)
        rest = "not shown elsewhere" if len(claims) > 1 else "the only depth compared"
        return Verdict(
            f"{word}_some_depths", f"{lead} at {spoken(here)} only, {rest}: {amount}", None
        )
    if within is not None and within < EQUAL:
        return Verdict(
            "equal", f"{candidate} and {base} are equal within {100 * within:.2g} %: {amount}", None
        )
    return Verdict(
        "cannot_tell", f"cannot tell{_help(advice, within, measured)} ({amount})", advice
    )


def _help(advice: Advice | None, within: float | None, measured: bool) -> str:
    if not measured:
        return ": one run of each holds no noise, more seeds or depths would"
    if advice:
        place = f"d{advice.depth}" if advice.depth else "every depth"
        return f": {COUNTS[advice.seeds]} more seed{'s' * (advice.seeds > 1)} at {place} would"
    bound = "" if within is None else f"; the effect, if any, is below {100 * within:.2g} %"
    return f", and no affordable number of seeds is expected to{bound}"


def spoken(given: Sequence[int]) -> str:
    """`d4`, `d4 and d8`, `d4, d8 and d12`."""
    words = [f"d{depth}" for depth in given]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def advise(
    gaps: Gaps, test: Effect, runs: Array, flops: Array, order: Sequence[int]
) -> Advice | None:
    """The cheapest of up to 8 further seeds a side at one depth or at each; None where none is expected to decide.

    `runs` (2, K) counts those of base and candidate at the depths `order`, `flops` (K,) what one of each costs
    together. The effect over all depths is taken to be `test`, with the noise it has.
    """
    if test.free < 1:
        return None
    unit = test.error * np.sqrt(gaps.weight @ gaps.slope**2)
    options = []
    for place in (*range(len(order)), None):
        chosen = np.arange(len(order)) == place if place is not None else np.ones(len(order), bool)
        for seeds in range(1, SEEDS + 1):
            more = runs + seeds * chosen
            weight = more[0] * more[1] / (more[0] + more[1])
            t = test.estimate * np.sqrt(weight @ gaps.slope**2) / unit
            free = test.free + seeds * int(chosen.sum()) * (1 if gaps.paired else 2)
            if BETTING * e_value(t, free, weight.sum()) + 1 - BETTING >= ENOUGH:
                depth = None if place is None else order[place]
                options.append(Advice(depth, seeds, float(seeds * flops @ chosen)))
                break
    return min(options, key=lambda option: option.flops, default=None)
