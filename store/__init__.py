"""The results database: run folders in, tables out. README.md is its data dictionary."""

from store.ingest import Counts, ingest, is_current, rebuild
from store.places import QueryError, StoreError, home
from store.query import curves, results, sql

__all__ = ["Counts", "QueryError", "StoreError", "curves", "home", "ingest", "is_current", "rebuild", "results", "sql"]
