"""A figure that notebooks show as PNG, whether or not pyplot is loaded."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

from slm.figures.style import RC

SCREEN_DPI = 110
"""Resolution of the PNG in a notebook, which keeps notebooks small."""


class Page(Figure):
    """The figure that every `plot` function returns."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(RC):
            self.savefig(file, format="png", dpi=SCREEN_DPI)
        return file.getvalue()
