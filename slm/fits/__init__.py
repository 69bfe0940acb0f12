"""Scaling-law fits: laws, isoFLOP minima, surfaces, CORE, comparisons and designs of further runs.

Works on typed points with numpy and scipy alone.
"""

from __future__ import annotations

from slm.fits.compare.comparison import compare
from slm.fits.compare.e_values import CLAIM_THRESHOLD
from slm.fits.compare.paired_core import paired_core
from slm.fits.compare.result import Comparison, DepthEffect
from slm.fits.compare.trials import Trial
from slm.fits.core_fit import CoreFit, NoCoreFit
from slm.fits.curve import CurveFit, fit_curves
from slm.fits.design import Candidate, Design, Goal, next_runs
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlopCurve, IsoFlopFit, Minimum
from slm.fits.points import NotComparable, Point, check
from slm.fits.power_law import ADDITIVE, Law
from slm.fits.prediction import Target
from slm.fits.summary import comparison_table, design_summary, design_table, summary, tables
from slm.fits.surface import Surface

__all__ = [
    "ADDITIVE",
    "CLAIM_THRESHOLD",
    "Candidate",
    "Comparison",
    "CoreFit",
    "CurveFit",
    "DepthEffect",
    "Design",
    "Goal",
    "Interval",
    "IsoFlopCurve",
    "IsoFlopFit",
    "Law",
    "Minimum",
    "NoCoreFit",
    "NotComparable",
    "Point",
    "Surface",
    "Target",
    "Trial",
    "check",
    "compare",
    "comparison_table",
    "design_summary",
    "design_table",
    "fit_curves",
    "next_runs",
    "paired_core",
    "summary",
    "tables",
]
