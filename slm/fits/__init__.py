"""What runs say about compute: laws, isoFLOP minima, surfaces. Typed points in, a fit out; numpy and scipy alone."""

from __future__ import annotations

from slm.fits.curve import Caution, CurveFit, fit_curves
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Minimum, Valley
from slm.fits.parametric import Bootstrap, Parametric, Rung, bootstrap, fit_parametric
from slm.fits.points import NotComparable, Point
from slm.fits.power_law import ADDITIVE, PURE, Law
from slm.fits.prediction import Prediction, Target
from slm.fits.surface import PAPER, Surface, fit_surface
from slm.fits.table import Table, read_points
from slm.fits.terminal import summary, tables

__all__ = [
    "ADDITIVE",
    "PAPER",
    "PURE",
    "Bootstrap",
    "Caution",
    "CurveFit",
    "Interval",
    "IsoFlop",
    "Law",
    "Minimum",
    "NotComparable",
    "Parametric",
    "Point",
    "Prediction",
    "Rung",
    "Surface",
    "Table",
    "Target",
    "Valley",
    "bootstrap",
    "fit_curves",
    "fit_parametric",
    "fit_surface",
    "read_points",
    "summary",
    "tables",
]
