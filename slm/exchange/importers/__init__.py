"""Importers: results of other programs as rows of the store, read, checked and stored.

The format is recognised by content; `formats.FORMATS` lists those that are known. Every defect is
reported; a row that cannot be trusted is flagged, and nothing that was read is changed.
"""

from slm.exchange.importers.formats import Import, read_import
from slm.exchange.importers.storage import imported_experiments, remove_import, write_import

__all__ = ["Import", "imported_experiments", "read_import", "remove_import", "write_import"]
