"""Figures: labels, hold-outs, levels, files of equal bytes."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from slm.figures import (
    draw_comparison,
    draw_fit,
    plot_core,
    plot_curve,
    plot_fit,
    plot_frontier,
    plot_residuals,
    plot_runs,
    save,
)
from slm.figures.core_curve import LEVELS
from slm.fits import Comparison, CoreFit, Interval, Point, Trial, fit_curves
from slm.fits.compare.comparison import compare

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


def texts(svg: Path) -> str:
    """Return all text of a drawing."""
    return " ".join(re.findall(r">([^<>]+)</", svg.read_text()))


def test_a_curve_labels_axes_runs_and_law(tmp_path: Path) -> None:
    curves = [
        (depth, np.geomspace(c / 100, c, 20), 1.5 * np.geomspace(c / 100, c, 20) ** -0.01)
        for depth, c in enumerate(FLOPS)
    ]
    points = ladder()
    png, svg = save(plot_curve(fit_curves(points), curves, "my sweep"), tmp_path / "fit.v1")
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


def test_a_grid_labels_a_budget_without_a_minimum(tmp_path: Path) -> None:
    points = valleys()
    labels = texts(save(plot_curve(fit_curves(points)), tmp_path / "grid")[1])
    assert "parameters (matrices+head)" in labels
    assert "1e12 FLOPs: no minimum" in labels
    assert "fewer than two minima: no exponents" in labels


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_same_fit_is_the_same_file(tmp_path: Path, count: int) -> None:
    points = ladder()[:count]
    first, second = (save(plot_curve(fit_curves(points)), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()


def test_no_label_covers_a_run_or_another_label(tmp_path: Path) -> None:
    """Depths so close that their labels would overlap at their first positions."""
    centres: list[tuple[float, float]] = []
    points = [
        Point(f"{k}", "pocket", 10 + k, 1e4, 1e6, 1e12 * 1.08**k, 2 - 0.01 * k, 0, None, "a")
        for k in range(8)
    ]
    svg = save(plot_curve(fit_curves(points)), tmp_path / "close")[1].read_text()
    for match in re.finditer(
        r"translate\(([\d.]+) ([\d.]+)\)[^>]*>d1\d<|x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>d1\d<", svg
    ):
        x, y = (float(value) for value in match.groups() if value)
        centres.append((x, y))
    assert len(centres) == 8
    for k, (x, y) in enumerate(centres):
        assert all(abs(x - other) > 15 or abs(y - below) > 8 for other, below in centres[:k])


def positions(svg: Path, pattern: str) -> list[tuple[str, float, float]]:
    """Return every text that matches the pattern, and its centre in points."""
    matches = re.finditer(
        rf'(?:translate\(([\d.-]+) ([\d.-]+)\)|x="([\d.-]+)" y="([\d.-]+)")[^>]*>({pattern})<',
        svg.read_text(),
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


def test_a_fit_draws_the_figures_it_has(tmp_path: Path) -> None:
    """A ladder alone has no frontier, and runs without evaluations no CORE."""
    lone = draw_fit(fit_curves(ladder()), tmp_path / "lone")
    assert [path.name for path in lone] == [
        "lone.png",
        "lone.svg",
        "lone-residuals.png",
        "lone-residuals.svg",
    ]
    few = draw_fit(fit_curves(ladder()[:2]), tmp_path / "few")
    assert [path.name for path in few] == ["few.png", "few.svg"], "drawn without a law"
    full = draw_fit(fit_curves(grid()), tmp_path / "full")
    assert [path.stem for path in full[::2]] == ["full", "full-frontier", "full-residuals"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (*lone, *few, *full)
    )


def test_hold_outs_are_drawn_under_the_law(tmp_path: Path) -> None:
    assert "held out" not in texts(save(plot_curve(fit_curves(ladder()[:6])), tmp_path / "none")[1])
    hit, off = ladder(), ladder()
    off[-2:] = [replace(run, loss=1.2 * run.loss) for run in off[-2:]]
    fits = fit_curves(hit), fit_curves(off)
    held = [run for hold_out in fits[0].selection.hold_outs for run in hold_out.predicted]
    labels = texts(save(plot_curve(fits[0]), tmp_path / "hit")[1])
    assert (
        f"held out: {sum(run.covered for run in held)} of {len(held)} inside the predicted interval"
        in labels
    )
    assert "off the law (%)" in labels
    assert "predicted, missed" in texts(save(plot_curve(fits[1]), tmp_path / "missed")[1])


def test_the_frontier_has_the_exponents_of_params_and_tokens(tmp_path: Path) -> None:
    points = [*grid(), *ladder()]
    fit = fit_curves(points)
    labels = texts(save(plot_frontier(fit), tmp_path / "fit")[1])
    assert fit.isoflop
    assert fit.isoflop.params_exponent
    assert fit.isoflop.tokens_exponent
    assert f"minima: a = {fit.isoflop.params_exponent.text('.2f')}" in labels
    assert f"minima: b = {fit.isoflop.tokens_exponent.text('.2f')}" in labels
    assert "parameters N (matrices+head)" in labels
    assert "compute-optimal runs" in labels


def test_a_residual_beyond_the_panel_is_drawn_at_its_edge(tmp_path: Path) -> None:
    flops = np.geomspace(1e12, 1e14, 24)
    losses = (1 + 3000 * flops**-0.3) * np.exp(0.001 * np.random.default_rng(0).standard_normal(24))
    inliers = [
        Point(f"{k}", "pocket", k, 1e4, 1e6, c, y, 0, None, "a")
        for k, (c, y) in enumerate(zip(flops, losses), 2)
    ]
    outliers = [replace(run, loss=1.2 * run.loss) if run.depth == 6 else run for run in inliers]
    assert "beyond the panel" not in texts(
        save(plot_residuals(fit_curves(inliers)), tmp_path / "near")[1]
    )
    assert "beyond the panel" in texts(
        save(plot_residuals(fit_curves(outliers)), tmp_path / "far")[1]
    )


def measured() -> list[Point]:
    """Return the ladder with a CORE, at chance where the loss is high."""
    return [replace(run, core=max(0.0, 0.5 - 0.17 * run.loss)) for run in ladder()]


def test_core_is_drawn_with_published_levels_in_its_range(tmp_path: Path, reference: Path) -> None:
    drawn = draw_fit(fit_curves(measured()), tmp_path / "fit")
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


def test_an_open_end_is_an_arrow_and_an_unknown_multiplier_nothing(tmp_path: Path) -> None:
    result = comparison()
    closed, open_end, unknown = (
        draw_comparison(
            replace(
                result,
                per_depth=(
                    replace(result.per_depth[0], multiplier=interval),
                    *result.per_depth[1:],
                ),
            ),
            tmp_path / name,
        )[1]
        .read_text()
        .count("<path")
        for name, interval in (
            ("closed", Interval(1.2, 1.1, 1.3, True)),
            ("open", Interval(1.2, 1.1)),
            ("unknown", Interval(None)),
        )
    )
    assert unknown < closed < open_end


@pytest.mark.parametrize("rising", [False, True])
def test_labels_of_residuals_and_core_do_not_overlap(tmp_path: Path, rising: bool) -> None:
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
    fit = fit_curves(points)
    assert fit.law
    if rising:
        assert isinstance(fit.core, CoreFit)
        svg = save(plot_core(fit.core), tmp_path / "close")[1]
    else:
        svg = save(plot_residuals(fit), tmp_path / "close")[1]
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
        save(plot_curve(fit_curves(ladder()[:1])), tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_is_shown_as_png_and_an_unknown_one_is_named() -> None:
    fit = fit_curves(ladder())
    assert plot_fit(fit)._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="figure 'frontier': this fit has curve, residuals"):
        plot_fit(fit, "frontier")


def test_runs_are_plotted_without_a_law(tmp_path: Path) -> None:
    labels = texts(save(plot_runs(ladder(), title="runs"), tmp_path / "runs")[1])
    assert "compute-optimal runs (×n: seeds)" in labels
    assert "beyond the runs" not in labels
