"""Corpora -> a tokeniser and rows of tokens on disk, which every run of every sweep shares. No torch here."""

from slm.data.dataset import MAX_EPOCHS, Prepared, all_prepared, recipe_for, row_shape
from slm.data.prepare import prepare, prepared_for
from slm.data.tokenizer import Tokenizer, tokenizer_of

__all__ = [
    "MAX_EPOCHS",
    "Prepared",
    "Tokenizer",
    "all_prepared",
    "prepare",
    "prepared_for",
    "recipe_for",
    "row_shape",
    "tokenizer_of",
]
