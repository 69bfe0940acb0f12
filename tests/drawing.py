"""Empty figures for tests that claim nothing about them: drawing takes most of a fit's time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

from slm.fits import Comparison, CurveFit
from slm.report import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def empty_figures() -> Iterator[None]:
    """Replace every figure of a fit or a comparison by an empty one; the same files are written."""
    with (
        mock.patch("slm.figures.plot_fit", _empty_fit),
        mock.patch.object(charts, "plot_fit", _empty_fit),
        mock.patch("slm.figures.plot_comparison", _empty_comparison),
    ):
        yield


def _empty_fit(
    fit: CurveFit, name: str = "curve", curves: Sequence[object] = (), title: str = ""
) -> Figure:
    return _empty()


def _empty_comparison(comparison: Comparison) -> Figure:
    return _empty()


def _empty() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1), dpi=50)
