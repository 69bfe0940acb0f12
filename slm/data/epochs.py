"""Epochs: how often a run reads its corpus, how often it may, and which depths a corpus allows."""

from __future__ import annotations

from typing import Any

from slm.recipe import Hyperparameters, Recipe

MAX_EPOCHS = 4
"""Largest number of passes over a corpus that a run may make."""


def check_epochs(hp: Hyperparameters, available: int, corpus: str) -> None:
    """Raise ValueError if a run needs more than MAX_EPOCHS passes over the available rows."""
    if hp.train_rows > MAX_EPOCHS * available:
        tokens = available * hp.sequence_length
        raise ValueError(
            f"depth {hp.depth} needs {hp.tokens:,} tokens; corpus {corpus} has "
            f"{tokens:,}, enough for {MAX_EPOCHS} epochs of "
            f"{MAX_EPOCHS * tokens:,}: give more text, or a shorter horizon"
        )


def epochs(hp: Hyperparameters, available: int) -> dict[str, Any]:
    """Return the tokens that a model reads, and in how many epochs of the available rows."""
    return {"depth": hp.depth, "tokens": hp.tokens, "epochs": hp.train_rows / available}


def reach(recipe: Recipe, available: int, max_depth: int) -> dict[str, Any]:
    """Return the deepest compute-optimal models for one epoch and for MAX_EPOCHS.

    Models of up to `max_depth` layers are considered. A depth is None if even one layer needs more
    than the available rows.
    """
    rows = {depth: recipe(depth).train_rows for depth in range(1, max_depth + 1)}

    def deepest(epochs: int) -> int | None:
        return max((depth for depth in rows if rows[depth] <= epochs * available), default=None)

    return {
        "recipe": recipe.name,
        "one_epoch": deepest(1),
        "most_epochs": MAX_EPOCHS,
        "at_most": deepest(MAX_EPOCHS),
    }
