"""The results database: run folders in, tables out. README.md is its data dictionary."""

from store.check import CheckReport, VacuumReport, check, vacuum
from store.ingest import Counts, ingest, is_current, rebuild
from store.paths import QueryError, StoreError, home, home_id
from store.query import curves, experiment_home, results, sql

__all__ = [
    "CheckReport",
    "Counts",
    "QueryError",
    "StoreError",
    "VacuumReport",
    "check",
    "curves",
    "experiment_home",
    "home",
    "home_id",
    "ingest",
    "is_current",
    "rebuild",
    "results",
    "sql",
    "vacuum",
]
