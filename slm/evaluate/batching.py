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

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.prompts import Ints, Planned

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
    questions: Ints
    """Of each lane, where in `asked` its own are (B, Q), PAD after their end."""


def lanes_of(plan: Planned, context: int | None, shared: bool = True) -> Lanes:
    """The lanes of a plan for a model that reads `context` tokens at most; not `shared`: every row its own lane."""
    crops = np.maximum(0, plan.lengths - (context or plan.lengths.max()))
    misfit = (plan.starts - crops < 1) & (plan.spans > 0)
    cropped, skipped = (
        np.logical_or.reduceat(which, plan.first[:-1]) for which in (crops > 0, misfit)
    )
    lanes = []
    for example in np.flatnonzero(~skipped).tolist():
        prompt, rows = (
            int(plan.prompts[example]),
            range(*plan.first[example : example + 2].tolist()),
        )
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
    return Lane(
        rows, crop, prompt - crop - (not any(tails)), tuple(max(0, tail - 1) for tail in tails)
    )


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
        """Lanes side by side.

        The tokens are a row of pieces, of each lane its prompt, which is read of its first row, and then every tail.
        """
        pieces = [(lane.rows[0], *lane.rows) for lane in lanes]
        lane, part = _numbered([len(own) for own in pieces])
        rows = np.concatenate(pieces)
        prompt, crop = (
            np.array([getattr(own, name) for own in lanes]) for name in ("prompt", "crop")
        )
        of_prompt = part == 0
        lengths = np.concatenate([(own.prompt, *own.tails) for own in lanes])
        begins = np.cumsum(lengths) - lengths
        piece, place = _numbered(lengths)
        token, own = np.arange(len(piece)), lane[piece]
        in_tails = token - (begins[of_prompt] + prompt)[own]
        before = np.where(
            place > 0,
            token - 1,
            np.where(of_prompt[piece], token, (begins[of_prompt] + prompt - 1)[own]),
        )
        place += np.where(of_prompt[piece], 0, prompt[own])
        asking = np.flatnonzero(~of_prompt)
        which, number = _numbered(self._plan.spans[rows[asking]])
        asking, to = asking[which], lane[asking][which]
        target = self._plan.starts[rows[asking]] + number
        source = target - crop[to] - 1
        asked = (
            np.where(source < prompt[to], begins[of_prompt][to], begins[asking] - prompt[to])
            + source
        )
        return Batch(
            self._tokens(rows[piece], place + crop[own]),
            place,
            before,
            _padded(own[in_tails < 0], place[in_tails < 0], token[in_tails < 0], len(lanes)),
            _padded(own[in_tails >= 0], in_tails[in_tails >= 0], token[in_tails >= 0], len(lanes)),
            _padded(
                own[in_tails >= 0],
                in_tails[in_tails >= 0],
                part[piece][in_tails >= 0] - 1,
                len(lanes),
            ),
            rows[asking],
            asked,
            self._tokens(rows[asking], target),
            _padded(
                to,
                _numbered(np.bincount(to, minlength=len(lanes)))[1],
                np.arange(len(to)),
                len(lanes),
            ),
        )

    def _tokens(self, rows: Ints, places: Ints) -> Ints:
        """The tokens of rows at places, before any are cropped."""
        plan, owners = self._plan, self._plan.owners[rows]
        after = places - plan.prompts[owners]
        return plan.tokens[
            np.where(after < 0, self._prompts[owners] + places, self._tails[rows] + after)
        ].astype(np.int64)


def _numbered(counts: Sequence[int] | Ints) -> tuple[Ints, Ints]:
    """Of things in groups of so many: each one's group, and its number there."""
    groups = np.repeat(np.arange(len(counts)), counts)
    return groups, np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)


def _padded(lanes: Ints, columns: Ints, values: Ints, count: int) -> Ints:
    """Values in rows, a lane each, and columns; PAD elsewhere."""
    table = np.full((count, columns.max(initial=-1) + 1), PAD)
    table[lanes, columns] = values
    return table
