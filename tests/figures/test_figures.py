"""The figure is there, says what it shows, and is the same file every time."""

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
    draw_core,
    draw_curve,
    draw_fit,
    draw_frontier,
    draw_residuals,
)
from slm.figures.core_curve import LEVELS
from slm.fits import Comparison, CoreFit, Interval, Point, Trial, fit_curves
from slm.fits.compare.comparison import compare

FLOPS = np.geomspace(3e10, 5e12, 5)


def ladder() -> list[Point]:
    """Five depths, two seeds."""
    draw = np.random.default_rng(1)
    return [
        Point(f"{depth}-{seed}", "pocket", depth, 1e4 * depth**2, 1e6, c, loss, seed, None, "a")
        for depth, c in zip(range(2, 7), FLOPS.tolist())
        for seed, loss in enumerate(
            (1.1 + 3000 * c**-0.29 * np.exp(0.004 * draw.standard_normal(2))).tolist()
        )
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
    png, svg = draw_curve(fit_curves(points), tmp_path / "fit.v1", curves=curves, title="my sweep")
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.v1.png", "fit.v1.svg"], (
        "a temporary file stayed"
    )


def test_a_grid_shows_minima_and_the_budget_that_has_none(tmp_path: Path) -> None:
    points = valleys()
    said = words(draw_curve(fit_curves(points), tmp_path / "grid")[1])
    assert "parameters (matrices+head)" in said
    assert "1e12 FLOPs: no minimum" in said
    assert "fewer than two minima: no exponents" in said


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_same_fit_is_the_same_file(tmp_path: Path, count: int) -> None:
    points = ladder()[:count]
    first, second = (draw_curve(fit_curves(points), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()


def test_no_label_covers_a_run_or_another_label(tmp_path: Path) -> None:
    """Depths so close that their labels would lie on each other where they are first put."""
    placed: list[tuple[float, float]] = []
    points = [
        Point(f"{k}", "pocket", 10 + k, 1e4, 1e6, 1e12 * 1.08**k, 2 - 0.01 * k, 0, None, "a")
        for k in range(8)
    ]
    svg = draw_curve(fit_curves(points), tmp_path / "close")[1].read_text()
    for match in re.finditer(
        r"translate\(([\d.]+) ([\d.]+)\)[^>]*>d1\d<|x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>d1\d<", svg
    ):
        x, y = (float(value) for value in match.groups() if value)
        placed.append((x, y))
    assert len(placed) == 8
    for k, (x, y) in enumerate(placed):
        assert all(abs(x - other) > 15 or abs(y - own) > 8 for other, own in placed[:k])


def places(svg: Path, pattern: str) -> list[tuple[str, float, float]]:
    """Every text that fits the pattern, and where its middle stands, in points."""
    found = re.finditer(
        rf'(?:translate\(([\d.-]+) ([\d.-]+)\)|x="([\d.-]+)" y="([\d.-]+)")[^>]*>({pattern})<',
        svg.read_text(),
    )
    return [(match[5], float(match[1] or match[3]), float(match[2] or match[4])) for match in found]


def grid(budgets: Sequence[float] = (1e11, 1e12, 1e13), noise: float = 0.001) -> list[Point]:
    """Valleys that hold both a minimum each and a surface; N* = (C/6)^0.5 / 4."""
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
    """A candidate that is three per cent better at five depths, two seeds each."""
    sides = [
        [
            Trial(f"{by}-{run.run_id}", run.depth, run.seed, run.flops, by * run.loss)
            for run in ladder()
        ]
        for by in (1.0, factor)
    ]
    return compare(*sides, ("old", "new"))


def test_every_figure_of_a_fit_is_drawn_and_no_other(tmp_path: Path) -> None:
    """One dial has no frontier, and nothing measured has no CORE."""
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


def test_what_was_foretold_of_runs_held_out_stands_under_the_law(tmp_path: Path) -> None:
    assert "held out" not in words(draw_curve(fit_curves(ladder()[:6]), tmp_path / "none")[1])
    hit, off = ladder(), ladder()
    off[-2:] = [replace(run, loss=1.2 * run.loss) for run in off[-2:]]
    fits = fit_curves(hit), fit_curves(off)
    held = [run for hold_out in fits[0].selection.hold_outs for run in hold_out.predicted]
    said = words(draw_curve(fits[0], tmp_path / "hit")[1])
    assert (
        f"held out: {sum(run.covered for run in held)} of {len(held)} inside the predicted interval"
        in said
    )
    assert "off the law (%)" in said
    assert "predicted, missed" in words(draw_curve(fits[1], tmp_path / "missed")[1])


def test_the_frontier_says_both_exponents_of_both_axes(tmp_path: Path) -> None:
    points = [*grid(), *ladder()]
    fit = fit_curves(points)
    said = words(draw_frontier(fit, tmp_path / "fit", "mine")[1])
    assert fit.isoflop
    assert fit.isoflop.params_exponent
    assert fit.isoflop.tokens_exponent
    assert f"minima: a = {fit.isoflop.params_exponent.text('.2f')}" in said
    assert f"minima: b = {fit.isoflop.tokens_exponent.text('.2f')}" in said
    assert "parameters N (matrices+head)" in said
    assert "compute-optimal runs" in said


def test_a_run_far_from_the_law_is_shown_at_the_edge(tmp_path: Path) -> None:
    flops = np.geomspace(1e12, 1e14, 24)
    losses = (1 + 3000 * flops**-0.3) * np.exp(0.001 * np.random.default_rng(0).standard_normal(24))
    near = [
        Point(f"{k}", "pocket", k, 1e4, 1e6, c, y, 0, None, "a")
        for k, (c, y) in enumerate(zip(flops, losses), 2)
    ]
    far = [replace(own, loss=1.2 * own.loss) if own.depth == 6 else own for own in near]
    assert "beyond the panel" not in words(
        draw_residuals(fit_curves(near), tmp_path / "near", "")[1]
    )
    assert "beyond the panel" in words(draw_residuals(fit_curves(far), tmp_path / "far", "")[1])


def measured() -> list[Point]:
    """The ladder with a CORE, at chance where the loss is high."""
    return [replace(own, core=max(0.0, 0.5 - 0.17 * own.loss)) for own in ladder()]


def test_core_stands_beside_the_published_levels_that_are_near(
    tmp_path: Path, reference: Path
) -> None:
    drawn = draw_fit(fit_curves(measured()), tmp_path / "fit")
    assert [path.stem for path in drawn[::2]] == ["fit", "fit-residuals", "fit-core"]
    said = words(drawn[-1])
    assert "GPT-2 124M  0.114" in said
    assert "GPT-3 175B" not in said, "a level far above the runs"
    assert "runs at chance" in said
    text = (reference / "data/nanochat/karpathy/gpt2_gpt3_core.csv").read_text()
    published = [(row["family"], row["core"]) for row in csv.DictReader(text.splitlines())]
    assert [(name[:5], f"{level:.3f}") for name, level in LEVELS.items()] == published


def test_a_comparison_says_its_verdict_and_shows_every_depth(tmp_path: Path) -> None:
    found = comparison()
    png, svg = draw_comparison(found, tmp_path / "against")
    said = words(svg)
    assert " ".join(found.decision.sentence.split()[:6]) in said
    for text in (
        "old",
        "new",
        *(f"d{depth}" for depth in range(2, 7)),
        "compute multiplier",
        "no difference",
    ):
        assert text in said
    assert f"over all depths: {found.multiplier.text('.3g')}" in said
    assert draw_comparison(comparison(), tmp_path / "again")[0].read_bytes() == png.read_bytes()


def test_an_open_end_is_an_arrow_and_an_unknown_multiplier_nothing(tmp_path: Path) -> None:
    found = comparison()
    closed, open_end, unknown = (
        draw_comparison(
            replace(
                found, per_depth=(replace(found.per_depth[0], multiplier=own), *found.per_depth[1:])
            ),
            tmp_path / name,
        )[1]
        .read_text()
        .count("<path")
        for name, own in (
            ("closed", Interval(1.2, 1.1, 1.3, True)),
            ("open", Interval(1.2, 1.1)),
            ("unknown", Interval(None)),
        )
    )
    assert unknown < closed < open_end


@pytest.mark.parametrize("rising", [False, True])
def test_labels_of_residuals_and_of_core_keep_apart(tmp_path: Path, rising: bool) -> None:
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
        svg = draw_core(fit.core, tmp_path / "close", "")[1]
    else:
        svg = draw_residuals(fit, tmp_path / "close", "")[1]
    placed = places(svg, r"d1\d")
    assert len(placed) == 10
    for k, (_, x, y) in enumerate(placed):
        assert all(abs(x - other) > 12 or abs(y - own) > 8 for _, other, own in placed[:k])


def test_no_file_is_left_when_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the two files is written, the second is not."""
    whole = Figure.savefig

    def savefig(figure: Figure, path: Path, **given: Any) -> None:
        whole(figure, path, **given)
        if given["format"] == "svg":
            raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space left"):
        draw_curve(fit_curves(ladder()[:1]), tmp_path / "fit")
    assert list(tmp_path.iterdir()) == []
