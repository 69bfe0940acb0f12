"""The results database: what was measured. Run folders in, DataFrames out; README.md is its data dictionary."""

from store.ingest import Counts, StoreError, ingest, rebuild
from store.query import curves, home, results, sql

__all__ = ["Counts", "StoreError", "curves", "home", "ingest", "rebuild", "results", "sql"]
