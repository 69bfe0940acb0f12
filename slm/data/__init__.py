"""Corpora -> a tokeniser and rows of tokens on disk, which all runs share. No torch here."""

from slm.data.dataset import PreparedDataset, list_datasets, recipe_for, row_shape
from slm.data.epochs import MAX_EPOCHS
from slm.data.prepare import prepare, prepared_for
from slm.data.tokenizer import Tokenizer, tokenizer_of

__all__ = [
    "MAX_EPOCHS",
    "PreparedDataset",
    "Tokenizer",
    "list_datasets",
    "prepare",
    "prepared_for",
    "recipe_for",
    "row_shape",
    "tokenizer_of",
]
