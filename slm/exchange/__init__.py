"""Homes that travel: an export holds the tables of a home and the files they are made from; merge takes those in.

An export's `runs/` is laid out as a home is.
"""

from slm.exchange.into import Merged, merge
from slm.exchange.out import export

__all__ = ["Merged", "export", "merge"]
