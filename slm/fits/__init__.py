"""What runs say about compute: laws, isoFLOP minima, intervals. Typed points in, a fit out; numpy and scipy alone."""

from __future__ import annotations

from slm.fits.curve import Caution, CurveFit, fit_curves
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Minimum, Valley
from slm.fits.points import NotComparable, Point
from slm.fits.power_law import ADDITIVE, PURE, Law
from slm.fits.terminal import summary, tables

__all__ = [
    "ADDITIVE",
    "PURE",
    "Caution",
    "CurveFit",
    "Interval",
    "IsoFlop",
    "Law",
    "Minimum",
    "NotComparable",
    "Point",
    "Valley",
    "fit_curves",
    "summary",
    "tables",
]
