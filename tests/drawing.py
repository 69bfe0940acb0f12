"""Empty figures for tests that claim nothing about them: drawing takes most of a fit's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def empty_figures() -> Iterator[None]:
    """Replace every figure of a fit or a comparison by an empty one; the same files are written."""
    with (
        mock.patch("slm.figures.plot_fit", _empty),
        mock.patch("slm.figures.plot_comparison", _empty),
    ):
        yield


def _empty(*_: object, **__: object) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(1, 1), dpi=50)
