"""The results database: run folders in, tables out. README.md is its data dictionary."""

from store.check import Checked, Freed, check, vacuum
from store.ingest import Counts, ingest, is_current, rebuild
from store.paths import QueryError, StoreError, home, identity
from store.query import curves, home_of, results, sql

__all__ = [
    "Checked",
    "Counts",
    "Freed",
    "QueryError",
    "StoreError",
    "check",
    "curves",
    "home",
    "home_of",
    "identity",
    "ingest",
    "is_current",
    "rebuild",
    "results",
    "sql",
    "vacuum",
]
