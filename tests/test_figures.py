"""The figure is there, says what it shows, and is the same file every time."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from slm.figures import draw_curve
from slm.fits import Point, fit_curves

FLOPS = np.geomspace(3e10, 5e12, 5)


def ladder() -> list[Point]:
    """Five depths, two seeds."""
    draw = np.random.default_rng(1)
    return [
        Point(f"{depth}-{seed}", "pocket", depth, 1e4 * depth**2, 1e6, c, loss, seed, None, "a")
        for depth, c in zip(range(2, 7), FLOPS.tolist())
        for seed, loss in enumerate((1.1 + 3000 * c**-0.29 * np.exp(0.004 * draw.standard_normal(2))).tolist())
    ]


def valleys() -> list[Point]:
    """Two budgets, one of which has no minimum."""
    return [
        Point(
            f"{budget:g}-{k}",
            "pocket",
            k,
            size,
            budget / size,
            budget,
            2 - shift + (k - best) ** 2 / 50,
            0,
            budget,
            "a",
        )
        for budget, best, shift in ((1e11, 4, 0.0), (1e12, 9, 0.4))
        for k, size in enumerate((1e4 * 1.6 ** np.arange(6)).tolist(), 2)
    ]


def words(svg: Path) -> str:
    """All text of a drawing."""
    return " ".join(re.findall(r">([^<>]+)</", svg.read_text()))


def test_a_figure_names_its_axes_its_runs_and_its_law(tmp_path: Path) -> None:
    curves = [
        (depth, np.geomspace(c / 100, c, 20), 1.5 * np.geomspace(c / 100, c, 20) ** -0.01)
        for depth, c in enumerate(FLOPS)
    ]
    points = ladder()
    png, svg = draw_curve(fit_curves(points), points, tmp_path / "fit.v1", curves=curves, title="my sweep")
    assert (png, svg) == (tmp_path / "fit.v1.png", tmp_path / "fit.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    said = words(svg)
    for text in (
        "my sweep",
        "training compute (FLOPs)",
        "validation loss (bits per byte)",
        "beyond the runs",
        "L = E +",
    ):
        assert text in said
    for depth in range(2, 7):
        assert f"d{depth} ×2" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.v1.png", "fit.v1.svg"], "a temporary file stayed"


def test_a_grid_shows_minima_and_the_budget_that_has_none(tmp_path: Path) -> None:
    points = valleys()
    said = words(draw_curve(fit_curves(points), points, tmp_path / "grid")[1])
    assert "parameters (matrices+head)" in said
    assert "1e12 FLOPs: no minimum" in said
    assert "fewer than two minima: no exponents" in said


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_same_fit_is_the_same_file(tmp_path: Path, count: int) -> None:
    points = ladder()[:count]
    first, second = (draw_curve(fit_curves(points), points, tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()


def test_no_label_covers_a_run_or_another_label(tmp_path: Path) -> None:
    """Depths so close that their labels would lie on each other where they are first put."""
    placed: list[tuple[float, float]] = []
    points = [Point(f"{k}", "pocket", 10 + k, 1e4, 1e6, 1e12 * 1.08**k, 2 - 0.01 * k, 0, None, "a") for k in range(8)]
    svg = draw_curve(fit_curves(points), points, tmp_path / "close")[1].read_text()
    for match in re.finditer(
        r"translate\(([\d.]+) ([\d.]+)\)[^>]*>d1\d<|x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>d1\d<", svg
    ):
        x, y = (float(value) for value in match.groups() if value)
        placed.append((x, y))
    assert len(placed) == 8
    for k, (x, y) in enumerate(placed):
        assert all(abs(x - other) > 15 or abs(y - own) > 8 for other, own in placed[:k])
