"""Corpora -> a tokeniser and rows of tokens on disk, which every run of every sweep shares. No torch here."""

from slm.data.prepare import Prepared, prepare, prepared_for, row_shape

__all__ = ["Prepared", "prepare", "prepared_for", "row_shape"]
