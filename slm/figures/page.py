"""A figure that notebooks show as PNG, whether or not pyplot is loaded."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SCREEN_DPI = 110
"""Resolution of the PNG in a notebook, which keeps notebooks small."""


class Page(Figure):
    """The figure that every `plot` function returns; `rc` are the matplotlib settings it is drawn
    with."""

    def __init__(self, rc: dict[Any, Any], **options: Any) -> None:
        super().__init__(**options)
        self.rc = rc

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(self.rc):
            self.savefig(file, format="png", dpi=SCREEN_DPI)
        return file.getvalue()
