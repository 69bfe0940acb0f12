"""What runs say about compute: laws, minima, surfaces, comparisons, what to run next. numpy and scipy alone."""

from __future__ import annotations

from slm.fits.compare.comparison import AtDepth, Comparison, Trial, compare
from slm.fits.compare.e_values import ENOUGH
from slm.fits.compare.paired_core import paired_core
from slm.fits.core_fit import CoreFit, NoCoreFit, Reach
from slm.fits.csv_points import Table, read_points, read_trials
from slm.fits.curve import CurveFit, fit_curves
from slm.fits.design import Candidate, Design, Goal, next_runs
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Minimum, Valley
from slm.fits.ladder import HoldOut
from slm.fits.parametric import Bootstrap, Parametric, Rung, bootstrap, fit_parametric
from slm.fits.points import NotComparable, Point, check
from slm.fits.power_law import ADDITIVE, PURE, Law
from slm.fits.prediction import Prediction, Target
from slm.fits.summary import comparison_table, design_summary, design_table, summary, tables
from slm.fits.surface import PAPER, Surface, fit_surface
from slm.fits.warning import FitWarning

__all__ = [
    "ADDITIVE",
    "ENOUGH",
    "PAPER",
    "PURE",
    "AtDepth",
    "Bootstrap",
    "Candidate",
    "Comparison",
    "CoreFit",
    "CurveFit",
    "Design",
    "FitWarning",
    "Goal",
    "HoldOut",
    "Interval",
    "IsoFlop",
    "Law",
    "Minimum",
    "NoCoreFit",
    "NotComparable",
    "Parametric",
    "Point",
    "Prediction",
    "Reach",
    "Rung",
    "Surface",
    "Table",
    "Target",
    "Trial",
    "Valley",
    "bootstrap",
    "check",
    "compare",
    "comparison_table",
    "design_summary",
    "design_table",
    "fit_curves",
    "fit_parametric",
    "fit_surface",
    "next_runs",
    "paired_core",
    "read_points",
    "read_trials",
    "summary",
    "tables",
]
