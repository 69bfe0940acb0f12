"""Planned rows -> batches of tokens for a model, each prompt once: numpy, no model.

A lane of a batch holds the prompt of one example and after it the tails of its rows, without each row's last token,
after which nothing is asked. A tail sees the prompt and itself alone, and every token keeps its place in its row: so
the model gives what it gives for each row alone.

A row longer than the context keeps its last tokens. Where the rows of an example are of several lengths they then begin
at different tokens, and only those that begin alike share a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.tasks import Ints, Planned

PAD = -1


@dataclass(frozen=True)
class Lane:
    """Rows of one example that begin with the same tokens."""

    rows: tuple[int, ...]
    """Their numbers in the plan."""
    crop: int
    """Tokens left out at their beginning."""
    prompt: int
    """Tokens read once for all."""
    tails: tuple[int, ...]
    """Tokens read of each after those."""

    @property
    def length(self) -> int:
        """Tokens that a model reads."""
        return self.prompt + sum(self.tails)


@dataclass(frozen=True)
class Lanes:
    """What a model of some context reads of a plan."""

    lanes: list[Lane]
    """Of all examples but those skipped."""
    cropped: NDArray[np.bool_]
    """Whether a row of the example is longer than the context (E,)."""
    skipped: NDArray[np.bool_]
    """Whether a span of the example does not fit into the context with a token before it (E,)."""

    @property
    def tokens(self) -> int:
        """Tokens that a model reads."""
        return sum(lane.length for lane in self.lanes)


@dataclass(frozen=True)
class Batch:
    """Lanes as N tokens one after another; prompts and tails by their numbers in these, padded to the longest."""

    ids: Ints
    """Tokens (N,)."""
    places: Ints
    """Each token's place in its row (N,)."""
    before: Ints
    """The token before it (N,); itself where there is none."""
    prompts: Ints
    """Tokens of each lane's prompt (B, P), PAD after its end."""
    tails: Ints
    """Tokens of each lane's tails (B, S), one tail after another, PAD after their end."""
    parts: Ints
    """Which tail each of those is of (B, S), PAD after their end."""
    rows: Ints
    """The row in the plan that each asked token belongs to (A,)."""
    asked: Ints
    """The token whose logits are asked (A,)."""
    targets: Ints
    """The token that follows it (A,)."""


def lanes_of(plan: Planned, context: int | None, shared: bool = True) -> Lanes:
    """The lanes of a plan for a model that reads `context` tokens at most; not `shared`: every row its own lane."""
    crops = np.maximum(0, plan.lengths - (context or plan.lengths.max()))
    misfit = (plan.starts - crops < 1) & (plan.spans > 0)
    cropped, skipped = (np.logical_or.reduceat(which, plan.first[:-1]) for which in (crops > 0, misfit))
    lanes = []
    for example in np.flatnonzero(~skipped).tolist():
        prompt, rows = int(plan.prompts[example]), range(*plan.first[example : example + 2].tolist())
        alike: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            apart = row if not shared or crops[row] >= prompt else rows[0]
            alike.setdefault((int(crops[row]), apart), []).append(row)
        lanes += [_lane(plan, prompt, tuple(own), crop) for (crop, _), own in alike.items()]
    return Lanes(lanes, cropped, skipped)


def _lane(plan: Planned, prompt: int, rows: tuple[int, ...], crop: int) -> Lane:
    tails = plan.tails[list(rows)].tolist()
    if len(rows) == 1:
        return Lane(rows, crop, prompt + tails[0] - 1 - crop, (0,))
    return Lane(rows, crop, prompt - crop - (not any(tails)), tuple(max(0, tail - 1) for tail in tails))


def grouped(lanes: list[Lane], tokens: int) -> list[list[Lane]]:
    """Lanes of a batch each: so many tokens at most, padding included, but a lane at least; with tails or without.

    The longest come first, which leaves little padding, and finds out early whether memory suffices.
    """
    groups: list[list[Lane]] = []
    for tailed in (True, False):
        group: list[Lane] = []
        prompt = tails = 0
        for lane in sorted((lane for lane in lanes if any(lane.tails) == tailed), key=_longest):
            prompt, tails = max(prompt, lane.prompt), max(tails, sum(lane.tails))
            if not group or (len(group) + 1) * (prompt + tails) > tokens:
                group, prompt, tails = [], lane.prompt, sum(lane.tails)
                groups.append(group)
            group.append(lane)
    return groups


def _longest(lane: Lane) -> tuple[int, int, tuple[int, ...]]:
    return -lane.length, -lane.prompt, lane.rows


class Batches:
    """Makes the batches of a plan."""

    def __init__(self, plan: Planned) -> None:
        self._plan = plan
        per_row = plan.tails.copy()
        per_row[plan.first[:-1]] += plan.prompts
        ends = np.cumsum(per_row)
        self._tails = ends - plan.tails
        self._prompts = (ends - per_row)[plan.first[:-1]]

    def batch(self, lanes: Sequence[Lane]) -> Batch:
        """Lanes side by side."""
        prompts = np.full((len(lanes), max(lane.prompt for lane in lanes)), PAD)
        tails, parts = np.full((2, len(lanes), max(sum(lane.tails) for lane in lanes)), PAD)
        ids: list[NDArray[Any]] = []
        places: list[Ints] = []
        before: list[Ints] = []
        asked, begin = [], 0
        for number, lane in enumerate(lanes):
            rows, at = [self._row(row, lane.crop) for row in lane.rows], begin + lane.prompt
            ids.append(rows[0][: lane.prompt])
            places.append(np.arange(lane.prompt))
            before.append(np.maximum(begin, np.arange(begin, at) - 1))
            prompts[number, : lane.prompt] = np.arange(begin, at)
            tails[number, : sum(lane.tails)] = np.arange(at, begin + lane.length)
            parts[number, : sum(lane.tails)] = np.repeat(np.arange(len(rows)), lane.tails)
            for row, tokens, tail in zip(lane.rows, rows, lane.tails, strict=True):
                asked.append(self._asked(row, tokens, lane, begin, at))
                ids.append(tokens[lane.prompt : lane.prompt + tail])
                places.append(np.arange(lane.prompt, lane.prompt + tail))
                before.append(np.where(np.arange(tail) > 0, np.arange(at, at + tail) - 1, begin + lane.prompt - 1))
                at += tail
            begin = at
        own, where, targets = (np.concatenate(each).astype(np.int64) for each in zip(*asked, strict=True))
        flat = [np.concatenate(each).astype(np.int64) for each in (ids, places, before)]
        return Batch(flat[0], flat[1], flat[2], prompts, tails, parts, own, where, targets)

    def _row(self, row: int, crop: int) -> NDArray[Any]:
        """The tokens of a row."""
        plan = self._plan
        example = plan.owners[row]
        prompt, tail = self._prompts[example], self._tails[row]
        parts = plan.tokens[prompt : prompt + plan.prompts[example]], plan.tokens[tail : tail + plan.tails[row]]
        return np.concatenate(parts)[crop:]

    def _asked(self, row: int, tokens: NDArray[Any], lane: Lane, begin: int, tail: int) -> tuple[Ints, Ints, Any]:
        """A row's span: the row's number, the token before each of its tokens, and these.

        The token before is in the lane's prompt, which begins at `begin`, or in the row's tail, which begins at `tail`.
        """
        targets = np.arange(self._plan.starts[row] - lane.crop, len(tokens))
        source = targets - 1
        where = np.where(source < lane.prompt, begin + source, tail + source - lane.prompt)
        return np.full(len(where), row), where, tokens[targets]
