"""Homes that travel: an export holds the tables of a home and the files they are made from; merge takes those in.

An export's `runs/` is laid out as a home is.
"""

from slm.exchange.export import export
from slm.exchange.merge import Merged, merge

__all__ = ["Merged", "export", "merge"]
