"""Packing of a tokenized task into batches that read every shared prefix once. numpy only, no
model.

A packed sequence holds the prefix that several rows of an example share, then the suffix of each
row without its last token, after which no logits are needed. A suffix attends to the prefix and
itself only, and every token keeps its position in its row, so the model returns what it returns for
each row alone.

A row longer than the context keeps its last tokens. If the rows of an example have different
lengths, they then begin at different tokens, and only rows that begin alike share a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.prompts import Ints, TokenizedTask

PAD = -1


@dataclass(frozen=True)
class PackedSequence:
    """Rows of one example with a shared prefix."""

    rows: tuple[int, ...]
    """Row numbers in the tokenized task."""
    crop: int
    """Tokens cropped from the beginning of each row."""
    prefix: int
    """Tokens of the shared prefix."""
    suffixes: tuple[int, ...]
    """Tokens read of each row after the prefix."""

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return self.prefix + sum(self.suffixes)


@dataclass(frozen=True)
class PackedTask:
    """Tokenized task packed for a model with a limited context."""

    sequences: list[PackedSequence]
    """Sequences of all examples except the skipped ones."""
    cropped: NDArray[np.bool_]
    """Whether a row of the example is longer than the context (E,)."""
    skipped: NDArray[np.bool_]
    """Whether a span of the example and the token before it do not fit into the context (E,)."""

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(sequence.length for sequence in self.sequences)


@dataclass(frozen=True)
class Batch:
    """Packed sequences as N tokens one after another, with index tables padded to the longest."""

    ids: Ints
    """Token ids (N,)."""
    positions: Ints
    """Position of each token in its row (N,)."""
    previous: Ints
    """Index of the token before it in its row (N,); its own index if it is the first."""
    pieces: Ints
    """Number within its sequence of the suffix of each token (N,), from 1; 0 for the prefix."""
    prefixes: Ints
    """Token indices of each sequence's prefix (B, P), padded with PAD."""
    suffixes: Ints
    """Token indices of each sequence's suffixes, one after another (B, S), padded with PAD."""
    queries: Ints
    """Token indices of each sequence's scored tokens (B, Q), padded with PAD."""
    rows: Ints
    """Row in the tokenized task of each scored token (A,)."""
    scored: Ints
    """Index of the token whose logits are needed (A,)."""
    targets: Ints
    """Id of the token that follows it (A,)."""


def pack(tokenized: TokenizedTask, context: int) -> PackedTask:
    """Pack the examples of a task for a model that reads at most `context` tokens."""
    crops = np.maximum(0, tokenized.lengths - context)
    does_not_fit = (tokenized.starts - crops < 1) & (tokenized.spans > 0)
    examples = tokenized.first_rows[:-1]
    skipped = np.logical_or.reduceat(does_not_fit, examples)
    sequences: list[PackedSequence] = []
    for example in np.flatnonzero(~skipped).tolist():
        prefix = int(tokenized.prefixes[example])
        groups: dict[tuple[int, int], list[int]] = {}
        for row in tokenized.rows_of(example):
            crop = int(crops[row])
            alone = row if crop >= prefix else PAD
            groups.setdefault((crop, alone), []).append(row)
        for (crop, _), rows in groups.items():
            sequences.append(_sequence(tokenized, prefix, rows, crop))
    return PackedTask(sequences, np.logical_or.reduceat(crops > 0, examples), skipped)


def _sequence(tokenized: TokenizedTask, prefix: int, rows: list[int], crop: int) -> PackedSequence:
    suffixes = tokenized.suffixes[rows].tolist()
    prefix -= crop
    if len(rows) == 1:
        return PackedSequence((rows[0],), crop, prefix + suffixes[0] - 1, (0,))
    if not any(suffixes):
        prefix -= 1
    read = tuple(max(0, suffix - 1) for suffix in suffixes)
    return PackedSequence(tuple(rows), crop, prefix, read)


def group_sequences(sequences: list[PackedSequence], tokens: int) -> list[list[PackedSequence]]:
    """Group sequences into batches of at most `tokens` tokens, padding included, or one sequence.

    Sequences with and without suffixes are batched apart, the longest first: that leaves little
    padding and shows early whether memory suffices.
    """
    groups: list[list[PackedSequence]] = []
    for has_suffixes in (True, False):
        group: list[PackedSequence] = []
        prefix = 0
        suffixes = 0
        for sequence in sorted(sequences, key=_longest_first):
            if any(sequence.suffixes) != has_suffixes:
                continue
            prefix = max(prefix, sequence.prefix)
            suffixes = max(suffixes, sum(sequence.suffixes))
            if not group or (len(group) + 1) * (prefix + suffixes) > tokens:
                group = []
                groups.append(group)
                prefix = sequence.prefix
                suffixes = sum(sequence.suffixes)
            group.append(sequence)
    return groups


def _longest_first(sequence: PackedSequence) -> tuple[int, int, tuple[int, ...]]:
    return -sequence.length, -sequence.prefix, sequence.rows


def build_batch(tokenized: TokenizedTask, sequences: Sequence[PackedSequence]) -> Batch:
    """Return the batch of some sequences of a task.

    Its tokens are pieces one after another: for each sequence the prefix, read from its first row,
    then every suffix.
    """
    prefix = np.array([sequence.prefix for sequence in sequences])
    crop = np.array([sequence.crop for sequence in sequences])
    # 1) one entry per piece: its sequence, its number (0 for the prefix), row, length, begin
    rows_of = [(sequence.rows[0], *sequence.rows) for sequence in sequences]
    sequence_of, number = _enumerate_groups([len(rows) for rows in rows_of])
    rows = np.concatenate(rows_of)
    lengths = np.concatenate([(s.prefix, *s.suffixes) for s in sequences])
    begins = np.cumsum(lengths) - lengths
    prefix_begins = begins[number == 0]
    # 2) one entry per token: piece, sequence, position in its row, index of the previous token
    piece, positions = _enumerate_groups(lengths)
    token = np.arange(len(piece))
    sequence = sequence_of[piece]
    in_prefix = number[piece] == 0
    last_of_prefix = prefix_begins + prefix - 1
    first_previous = np.where(in_prefix, token, last_of_prefix[sequence])
    previous = np.where(positions > 0, token - 1, first_previous)
    positions = positions + np.where(in_prefix, 0, prefix[sequence])
    # 3) one entry per scored token: the row's span, shifted by one, in the prefix or the suffix
    suffix_pieces = np.flatnonzero(number)
    which, offset = _enumerate_groups(tokenized.spans[rows[suffix_pieces]])
    scoring = suffix_pieces[which]
    scored_rows = rows[scoring]
    to = sequence_of[scoring]
    target = tokenized.starts[scored_rows] + offset
    source = target - crop[to] - 1
    suffix_begins = begins[scoring] - prefix[to]
    scored = source + np.where(source < prefix[to], prefix_begins[to], suffix_begins)
    # 4) index tables per sequence
    count = len(sequences)
    return Batch(
        ids=tokenized.at(rows[piece], positions + crop[sequence]),
        positions=positions,
        previous=previous,
        pieces=number[piece],
        prefixes=_table(sequence[in_prefix], token[in_prefix], count),
        suffixes=_table(sequence[~in_prefix], token[~in_prefix], count),
        queries=_table(to, scored, count),
        rows=scored_rows,
        scored=scored,
        targets=tokenized.at(scored_rows, target),
    )


def _enumerate_groups(sizes: Sequence[int] | Ints) -> tuple[Ints, Ints]:
    """Return, for every member of groups of these sizes, its group and its number in the group."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    return groups, np.arange(len(groups)) - np.repeat(starts, sizes)


def _table(rows: Ints, values: Ints, count: int) -> Ints:
    """Return a table of `count` rows, each with its values from the left, then PAD.

    `rows` are the ascending rows of the values.
    """
    _, columns = _enumerate_groups(np.bincount(rows, minlength=count))
    table = np.full((count, columns.max(initial=-1) + 1), PAD)
    table[rows, columns] = values
    return table
