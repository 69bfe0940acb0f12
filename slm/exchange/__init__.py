"""Exchange results between homes and with other programs: exports, merges, importers.

An export holds the tables of a home and the files they are made from, laid out as in the home.
"""

from slm.exchange.export import export
from slm.exchange.incoming import MergeResult
from slm.exchange.merge import merge

__all__ = ["MergeResult", "export", "merge"]
