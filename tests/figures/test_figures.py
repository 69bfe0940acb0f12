"""Figures: labels, hold-outs, levels, files of equal bytes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from slm.figures import (
    draw_comparison,
    draw_fit,
    plot_comparison,
    plot_core,
    plot_curve,
    plot_fit,
    plot_frontier,
    plot_residuals,
    plot_runs,
    save,
    save_svg,
)
from slm.figures.core_curve import LEVELS
from slm.fits import Comparison, CoreFit, CurveFit, Interval, Point, Trial, fit_curves
from slm.fits.compare.comparison import compare
from tests.drawing import empty_figures

FLOPS = np.geomspace(3e10, 5e12, 5)


def ladder() -> list[Point]:
    """Return runs of five depths and two seeds."""
    draw = np.random.default_rng(1)
    return [
        Point(f"{depth}-{seed}", "pocket", depth, 1e4 * depth**2, 1e6, c, loss, seed, None, "a")
        for depth, c in zip(range(2, 7), FLOPS.tolist())
        for seed, loss in enumerate(
            (1.1 + 3000 * c**-0.29 * np.exp(0.004 * draw.standard_normal(2))).tolist()
        )
    ]


def valleys() -> list[Point]:
    """Return runs at two budgets, one without a minimum."""
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


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG."""
    file = io.BytesIO()
    save_svg(figure, file)
    return file.getvalue().decode()


def texts(drawing: Figure | Path) -> str:
    """Return all text of a figure or of an SVG file."""
    svg = drawing.read_text() if isinstance(drawing, Path) else svg_of(drawing)
    return " ".join(re.findall(r">([^<>]+)</", svg))


def fit_of(points: Sequence[Point]) -> CurveFit:
    """Fit curves, once for the same runs."""
    return _fit_once(tuple(points))


@cache
def _fit_once(points: tuple[Point, ...]) -> CurveFit:
    return fit_curves(points)


def test_a_curve_labels_axes_runs_and_law(tmp_path: Path) -> None:
    curves = [
        (depth, np.geomspace(c / 100, c, 20), 1.5 * np.geomspace(c / 100, c, 20) ** -0.01)
        for depth, c in enumerate(FLOPS)
    ]
    points = ladder()
    png, svg = save(plot_curve(fit_of(points), curves, "my sweep"), tmp_path / "fit.v1")
    assert (png, svg) == (tmp_path / "fit.v1.png", tmp_path / "fit.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    labels = texts(svg)
    for text in (
        "my sweep",
        "training compute (FLOPs)",
        "validation loss (bits per byte)",
        "beyond the runs",
        "L = E +",
    ):
        assert text in labels
    for depth in range(2, 7):
        assert f"d{depth} ×2" in labels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.v1.png", "fit.v1.svg"], (
        "a temporary file stayed"
    )


def test_a_grid_labels_a_budget_without_a_minimum() -> None:
    labels = texts(plot_curve(fit_curves(valleys(), form="power")))
    assert "parameters (matrices+head)" in labels
    assert "1e12 FLOPs: no minimum" in labels
    assert "fewer than two minima: no exponents" in labels


@pytest.mark.parametrize("count", [1, 10])
def test_the_same_fit_is_the_same_file(tmp_path: Path, count: int) -> None:
    points = ladder()[:count]
    first, second = (save(plot_curve(fit_curves(points)), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()


def test_no_label_covers_a_run_or_another_label() -> None:
    """Depths so close that their labels would overlap at their first positions."""
    centres: list[tuple[float, float]] = []
    points = [
        Point(f"{k}", "pocket", 10 + k, 1e4, 1e6, 1e12 * 1.08**k, 2 - 0.01 * k, 0, None, "a")
        for k in range(8)
    ]
    svg = svg_of(plot_curve(fit_of(points)))
    for match in re.finditer(
        r"translate\(([\d.]+) ([\d.]+)\)[^>]*>d1\d<|x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>d1\d<", svg
    ):
        x, y = (float(value) for value in match.groups() if value)
        centres.append((x, y))
    assert len(centres) == 8
    for k, (x, y) in enumerate(centres):
        assert all(abs(x - other) > 15 or abs(y - below) > 8 for other, below in centres[:k])


def positions(svg: str, pattern: str) -> list[tuple[str, float, float]]:
    """Return every text that matches the pattern, and its centre in points."""
    matches = re.finditer(
        rf'(?:translate\(([\d.-]+) ([\d.-]+)\)|x="([\d.-]+)" y="([\d.-]+)")[^>]*>({pattern})<',
        svg,
    )
    return [
        (match[5], float(match[1] or match[3]), float(match[2] or match[4])) for match in matches
    ]


def grid(budgets: Sequence[float] = (1e11, 1e12, 1e13), noise: float = 0.001) -> list[Point]:
    """Return runs that determine a minimum per budget and a surface; N* = (C/6)^0.5 / 4."""
    draw, points = np.random.default_rng(2), []
    for budget in budgets:
        sizes = np.sqrt(budget / 6) / 4 * np.geomspace(1 / 5, 5, 6)
        tokens = budget / 6 / sizes
        losses = (1 + sizes**-0.3 + 16**0.3 * tokens**-0.3) * np.exp(
            noise * draw.standard_normal(6)
        )
        points += [
            Point(f"{budget:g}-{k}", "pocket", k + 2, n, d, budget, loss, 0, budget, "a")
            for k, (n, d, loss) in enumerate(zip(sizes.tolist(), tokens.tolist(), losses.tolist()))
        ]
    return points


def comparison(factor: float = 0.97) -> Comparison:
    """Compare a candidate that is three per cent better at five depths, two seeds each."""
    sides = [
        [
            Trial(f"{by}-{run.run_id}", run.depth, run.seed, run.flops, by * run.loss)
            for run in ladder()
        ]
        for by in (1.0, factor)
    ]
    return compare(*sides, ("old", "new"))


def test_a_fit_writes_the_figures_it_has(tmp_path: Path) -> None:
    """A ladder alone has no frontier, and runs without evaluations no CORE."""
    with empty_figures():
        lone = draw_fit(fit_of(ladder()), tmp_path / "lone")
        few = draw_fit(fit_of(ladder()[:2]), tmp_path / "few")
        full = draw_fit(fit_of(grid()), tmp_path / "full")
    assert [path.name for path in lone] == [
        "lone.png",
        "lone.svg",
        "lone-residuals.png",
        "lone-residuals.svg",
    ]
    assert [path.name for path in few] == ["few.png", "few.svg"], "drawn without a law"
    assert [path.stem for path in full[::2]] == ["full", "full-frontier", "full-residuals"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (*lone, *few, *full)
    )


def test_a_curve_without_hold_outs_has_no_panel_of_them() -> None:
    assert "held out" not in texts(plot_curve(fit_of(ladder()[:6])))


def test_hold_outs_are_drawn_under_the_law() -> None:
    fit = fit_of(ladder())
    held = [run for hold_out in fit.selection.hold_outs for run in hold_out.predicted]
    labels = texts(plot_curve(fit))
    assert (
        f"held out: {sum(run.covered for run in held)} of {len(held)} inside the predicted interval"
        in labels
    )
    assert "off the law (%)" in labels


def test_a_missed_hold_out_has_its_own_mark() -> None:
    runs = ladder()
    runs[-2:] = [replace(run, loss=1.2 * run.loss) for run in runs[-2:]]
    assert "predicted, missed" in texts(plot_curve(fit_of(runs)))


def test_the_frontier_has_the_exponents_of_params_and_tokens() -> None:
    optimal = [
        replace(run, run_id=f"optimal-{k}", depth=k, budget=None)
        for k, run in enumerate(grid()[2::6], 2)
    ]
    fit = fit_of([*grid(), *optimal])
    labels = texts(plot_frontier(fit))
    assert fit.isoflop
    assert fit.isoflop.params_exponent
    assert fit.isoflop.tokens_exponent
    assert f"minima: a = {fit.isoflop.params_exponent.text('.2f')}" in labels
    assert f"minima: b = {fit.isoflop.tokens_exponent.text('.2f')}" in labels
    assert "parameters N (matrices+head)" in labels
    assert "compute-optimal runs" in labels


def test_a_residual_beyond_the_panel_is_drawn_at_its_edge() -> None:
    flops = np.geomspace(1e12, 1e14, 24)
    losses = (1 + 3000 * flops**-0.3) * np.exp(0.001 * np.random.default_rng(0).standard_normal(24))
    runs = [
        Point(f"{k}", "pocket", k, 1e4, 1e6, c, y, 0, None, "a")
        for k, (c, y) in enumerate(zip(flops.tolist(), losses.tolist()), 2)
    ]
    outliers = [replace(run, loss=1.2 * run.loss) if run.depth == 6 else run for run in runs]
    assert "beyond the panel" not in texts(plot_residuals(fit_of(ladder())))
    assert "beyond the panel" in texts(plot_residuals(fit_of(outliers)))


def measured() -> list[Point]:
    """Return the ladder with a CORE, at chance where the loss is high."""
    return [replace(run, core=max(0.0, 0.5 - 0.17 * run.loss)) for run in ladder()]


def test_core_is_drawn_with_published_levels_in_its_range(tmp_path: Path, reference: Path) -> None:
    drawn = draw_fit(fit_of(measured()), tmp_path / "fit")
    assert [path.stem for path in drawn[::2]] == ["fit", "fit-residuals", "fit-core"]
    labels = texts(drawn[-1])
    assert "GPT-2 124M  0.114" in labels
    assert "GPT-3 175B" not in labels, "a level far above the runs"
    assert "runs at chance" in labels
    text = (reference / "data/nanochat/karpathy/gpt2_gpt3_core.csv").read_text()
    published = [(row["family"], row["core"]) for row in csv.DictReader(text.splitlines())]
    assert [(name[:5], f"{level:.3f}") for name, level in LEVELS.items()] == published


def test_a_comparison_has_its_decision_and_every_depth(tmp_path: Path) -> None:
    result = comparison()
    png, svg = draw_comparison(result, tmp_path / "against")
    labels = texts(svg)
    assert " ".join(result.decision.sentence.split()[:6]) in labels
    for text in (
        "old",
        "new",
        *(f"d{depth}" for depth in range(2, 7)),
        "compute multiplier",
        "no difference",
    ):
        assert text in labels
    assert re.search(r">\s*over all depths\s*<", svg.read_text()), "no legend of the band"
    assert f"over all depths: {result.multiplier.text('.3g')}" in labels
    assert draw_comparison(comparison(), tmp_path / "again")[0].read_bytes() == png.read_bytes()


def test_an_open_end_is_an_arrow_and_an_unknown_multiplier_nothing() -> None:
    result = comparison()
    first, *others = result.per_depth

    def paths(multiplier: Interval) -> int:
        """Count the paths of a figure whose smallest depth has this multiplier."""
        per_depth = (replace(first, multiplier=multiplier), *others)
        return svg_of(plot_comparison(replace(result, per_depth=per_depth))).count("<path")

    closed = paths(Interval(1.2, 1.1, 1.3, True))
    open_end, unknown = paths(Interval(1.2, 1.1)), paths(Interval(None))
    assert unknown < closed < open_end


@pytest.mark.parametrize("rising", [False, True])
def test_labels_of_residuals_and_core_do_not_overlap(rising: bool) -> None:
    """Ten depths within a factor of two in compute."""
    points = [
        Point(
            f"{k}",
            "pocket",
            10 + k,
            1e4 * 1.04**k,
            1e6,
            1e12 * 1.08**k,
            2 - 0.01 * k,
            0,
            None,
            "a",
            core=0.1 + 0.004 * k,
        )
        for k in range(10)
    ]
    fit = fit_of(points)
    assert fit.law
    if rising:
        assert isinstance(fit.core, CoreFit)
        svg = svg_of(plot_core(fit.core))
    else:
        svg = svg_of(plot_residuals(fit))
    centres = positions(svg, r"d1\d")
    assert len(centres) == 10
    for k, (_, x, y) in enumerate(centres):
        assert all(abs(x - other) > 12 or abs(y - below) > 8 for _, other, below in centres[:k])


def test_no_file_is_left_when_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing the first file succeeds, writing the second fails."""
    original = Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        original(figure, path, **options)
        if options["format"] == "svg":
            raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space left"):
        save(plot_curve(fit_of(ladder()[:1])), tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_is_shown_as_png_and_an_unknown_one_is_named() -> None:
    fit = fit_of(ladder())
    assert plot_fit(fit)._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="figure 'frontier': this fit has curve, residuals"):
        plot_fit(fit, "frontier")


def test_runs_are_plotted_without_a_law() -> None:
    labels = texts(plot_runs(ladder(), title="runs"))
    assert "compute-optimal runs (×n: seeds)" in labels
    assert "beyond the runs" not in labels
