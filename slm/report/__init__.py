"""An experiment on one page: self-contained HTML, or Markdown for a pull request."""

from __future__ import annotations

from slm.report.charts import drawings
from slm.report.gather import ExperimentData, Family, gather
from slm.report.render import Drawing, Report, render_html, render_markdown
from slm.report.sections import build_report

__all__ = [
    "Drawing",
    "ExperimentData",
    "Family",
    "Report",
    "build_report",
    "drawings",
    "gather",
    "render_html",
    "render_markdown",
]
