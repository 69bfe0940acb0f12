"""An experiment as it is told to others: one self-contained HTML page, or the same in Markdown."""

from __future__ import annotations

from slm.report.charts import drawings
from slm.report.content import Report
from slm.report.gather import Family, Found
from slm.report.markdown import markdown
from slm.report.page import page
from slm.report.sections import report_of

__all__ = ["Family", "Found", "Report", "drawings", "markdown", "page", "report_of"]
