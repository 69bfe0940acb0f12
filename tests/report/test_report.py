"""Reports: rendering in a browser, escaping, gaps and failures, Markdown, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.experiment import Experiment
from slm.figures import style
from slm.recipe import pocket
from slm.report import ExperimentData, Family, build_report, render_markdown
from slm.report.render import TEMPLATES
from tests.browser import Browser, browser
from tests.cli.test_fit_curves import document, refusal, slm
from tests.homes import home_of, surface

DEPTHS = (2, 3, 4, 5, 6)
NASTY = (
    """Does <script>document.title = 'run'</script> & "<b>" *pay* """
    """[x](http://a.example) | `--yes`?"""
)
INSPECT = """(function () {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const images = all("figure img");
  return {
    text: document.body.innerText,
    title: document.title,
    width: document.documentElement.scrollWidth,
    headings: all("h1, h2").map((node) => node.textContent),
    drawings: images.map((node) => node.alt),
    drawn: images.map((node) => node.naturalWidth && node.getBoundingClientRect().height),
    heads: all("table").map((node) => node.querySelectorAll("th[scope]").length),
    scripts: document.scripts.length,
    ids: all("[id]").map((node) => node.id),
    paper: style("body").backgroundColor,
    inks: ["body", ".facts", ".question", ".detail", ".caption", ".warnings code", "dt", "footer"]
      .map((selector) => style(selector).color),
  };
})()"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a home: a ladder whose question has markup, a grid with CORE, two recipes, one run,
    failures."""
    home = tmp_path_factory.mktemp("report")
    home_of(home, Experiment("ladder", (pocket,), DEPTHS))
    _set_question(home, "ladder", NASTY)
    home_of(
        home,
        Experiment("grid", (pocket,), DEPTHS, flops=(3e11, 1e12)),
        core=lambda hp: 0.1,
    )
    fast = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)
    home_of(
        home,
        Experiment("change", (pocket, fast), DEPTHS),
        lambda hp: 1.01 * surface(hp),
        code="c0de2",
    )
    home_of(home, Experiment("one", (pocket,), (3,), seeds=(4,)), code="c0de3")
    home_of(home, Experiment("broken", (pocket,), DEPTHS), code="c0de4")
    _break(home, "broken")
    return home


def _set_question(home: Path, name: str, question: str) -> None:
    path = home / "experiments" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"question": question}))


def _break(home: Path, name: str) -> None:
    """Leave one of five runs finished: one diverges, two fail, the largest is not started."""
    runs = json.loads((home / "experiments" / f"{name}.json").read_text())["runs"]
    for run, reason in zip(runs[1:4], ("diverged", "oom", "error")):
        (home / run / "done.json").unlink()
        ended = {
            "time": 61.0,
            "code": 1,
            "signal": None,
            "reason": reason,
            "message": f"<img src=x> | {reason}",
        }
        (home / run / "attempts" / "001" / "exit.json").write_text(json.dumps(ended))
    (home / runs[4] / "done.json").unlink()
    (home / runs[4] / "attempts" / "001" / "attempt.json").unlink()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def page(home: Path, name: str, again: bool = False) -> Path:
    """Return the page of an experiment, made once; only that of the ladder has its figures."""
    path = home / "reports" / f"{name}.html"
    if again or not path.exists():
        code, out, err = slm(home, "report", name, drawn=name == "ladder")
        assert code == 0, err
        assert out.endswith(f"report: {path}\n")
    return path


def inspect(chromium: Browser, path: Path, width: int, theme: str) -> dict[str, Any]:
    """Return what the page shows, after checking that it loads nothing else and the console is
    empty."""
    chromium.open(path, width, theme)
    result = chromium.evaluate(INSPECT)
    requests = [url for url in chromium.requests() if not url.startswith("data:")]
    assert requests == [path.as_uri()]
    assert chromium.console() == []
    return result


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours by WCAG 2; text needs 4.5, lines 3."""
    levels = []
    for colour in (one, other):
        parts = (
            re.findall(r"\d+", colour)
            if "(" in colour
            else [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        )
        linear = [
            x / 12.92 if (x := int(part) / 255) <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
            for part in parts[:3]
        ]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_whole_report(
    swept: Path, chromium: Browser, width: int, theme: str
) -> None:
    result = inspect(chromium, page(swept, "ladder"), width, theme)
    assert result["title"] == "ladder · slm"
    assert result["headings"][:4] == ["ladder", "The answer", "What more compute buys", "Warnings"]
    text = result["text"].replace("\N{NO-BREAK SPACE}", " ")
    for sentence in (
        "Doubling compute lowers val_bpb by",
        "one_dial_no_exponents",
        "slm sweep --recipe pocket",
        "5 of 5",
        "d6",
    ):
        assert sentence in text
    assert result["width"] == width, "the page is wider than the screen"
    assert result["drawings"][0].startswith("Validation loss of 5 runs against training compute")
    assert min(result["drawn"]) > 100
    assert min(result["heads"]) > 1
    assert len(result["ids"]) == len(set(result["ids"]))
    assert min(contrast(ink, result["paper"]) for ink in result["inks"]) >= 4.5
    assert (contrast(result["paper"], "#ffffff") > 10) == (theme == "dark")


def test_text_of_files_never_becomes_markup(swept: Path, chromium: Browser) -> None:
    """Neither a question nor a log's message becomes markup, in HTML or in Markdown."""
    result = inspect(chromium, page(swept, "ladder"), 390, "light")
    assert NASTY in result["text"]
    assert result["scripts"] == 0
    broken = page(swept, "broken").read_text()
    assert "<img src=x" not in broken
    assert "&lt;img src=x&gt; | oom" in broken
    text = slm(swept, "report", "ladder", "--markdown")[1]
    assert r"\<script>" in text
    assert r"[x\](http://a.example) \| \`--yes\`" in text


def test_a_page_is_self_contained_and_reproducible(swept: Path) -> None:
    path = page(swept, "ladder")
    first = path.read_bytes()
    addresses = re.findall(rb'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', first)
    assert addresses
    assert all(src.startswith(b"data:image/svg+xml;base64,") and not url for src, url in addresses)
    assert page(swept, "ladder", again=True).read_bytes() == first


def test_markdown_has_the_same_content_and_figures_next_to_it(swept: Path, tmp_path: Path) -> None:
    html = page(swept, "grid").read_text()
    assert slm(swept, "report", "grid", "--markdown", "--output", str(tmp_path / "grid.md"))[0] == 0
    text = (tmp_path / "grid.md").read_text()
    titles = re.findall(r"<h2>([^<]+)</h2>", html)
    assert re.findall(r"^## (.+)$", text, re.M) == titles
    assert {"Runs", "Fits", "CORE", "Throughput", "Where it comes from"} < set(titles)
    for cell in re.findall(r'<td class="number">([^<]+)</td>', html):
        assert cell.replace("\N{NO-BREAK SPACE}", " ") in text
    drawings = re.findall(r"\]\(<([^>]+)>\)", text)
    assert len(drawings) == html.count("<img ")
    assert all(Path(path).exists() for path in drawings)


def test_several_recipes_have_a_curve_each_and_the_command_that_compares_them(swept: Path) -> None:
    html = page(swept, "change").read_text()
    assert re.findall(r"<h3>(\w+)</h3>", html) == ["pocket", "fast", "pocket", "fast"]
    assert "slm compare change/pocket change/fast" in html
    assert "with recipes or seeds that no option sets" in html


def test_a_report_of_one_run_lists_what_is_missing(swept: Path) -> None:
    text = slm(swept, "report", "one", "--markdown")[1]
    assert "No law L(C): 1 different compute" in text
    assert "every run has one seed" in text
    assert "`slm sweep --plan RUN/plan.json --name one`" not in text
    assert "slm sweep --plan RUN/plan.json --name one" in text


def test_failures_are_listed_with_cost_and_commands(swept: Path) -> None:
    text = slm(swept, "report", "broken", "--markdown")[1]
    assert "**1 of 5**" in text
    assert "d3 diverged, which is a result" in text
    assert (
        len(
            re.findall(
                r"failed \((?:oom|error)\): `slm logs \w{12}` shows the log, `slm retry \w{12}`",
                text,
            )
        )
        == 2
    )
    assert "1 run planned: run the same sweep again" in text
    assert "4 attempts for 4 runs; 3 ended without finishing, after 3 min 00 s together" in text


def test_an_experiment_without_results_has_a_report(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("none", (pocket,), (2, 3), steps=20))
    for done in tmp_path.glob("*/done.json"):
        done.unlink()
    html = page(tmp_path, "none").read_text()
    assert "No answer yet: 2 runs running" in html
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["none.html"]
    assert "slm sweep --recipe pocket --depths 2,3 --steps 20 --name none" in html


def test_unknown_values_of_an_imported_run_are_blank(swept: Path, tmp_path: Path) -> None:
    (row,) = document(swept, "report", "one")["runs"]
    bare = dict.fromkeys(row) | {
        "run_id": "x1",
        "status": "finished",
        "val_bpb": 0.9,
        "depth": 4.0,
        "source": "import",
    }
    bare |= {"flags": "recomputed,no_seed", "comparison_key": "import=1"}
    nameless = bare | {
        "run_id": "x2",
        "depth": None,
        "label": "theirs",
        "core": 0.25,
        "core_metric": "core",
    }
    data = ExperimentData(
        name="theirs",
        question="",
        declared={},
        rows=[bare, nameless],
        attempts=[],
        families=[Family("", None, "no run has its tokens")],
    )
    text = render_markdown(build_report(data), tmp_path / "theirs")
    assert "lowest val_bpb: **0.9000**, d4\n" in text
    assert "highest CORE: **0.2500**, theirs" in text
    assert "`no_seed`: a defect (2 imported runs)" in text
    assert "`recomputed`: computed from the row's other numbers (2 imported runs)" in text
    assert "What is missing" not in text, "nobody here can train or evaluate what was imported"
    assert not re.search(r"None|nan|\b4\.0\b", text)


def test_runs_without_a_common_axis_are_refused_by_name(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("mixed", (pocket,), (2, 3)))
    path = sorted(tmp_path.glob("*/plan.json"))[0]
    plan = json.loads(path.read_text())
    plan["data"]["tokenizer"] = "other"
    path.write_text(json.dumps(plan))
    line = refusal(tmp_path, "report", "mixed")
    assert "tokenizer: " in line
    assert "against" in line
    assert (
        slm(tmp_path, "report", "mixed", "--allow-mixed", "--markdown")[1].count("Mixed axes") > 0
    )
    assert "'mixd'" in refusal(tmp_path, "report", "mixd")
    assert "choose one" in refusal(tmp_path, "report", "mixed", "--markdown", "--json")


def test_json_has_rows_fits_and_the_path_of_the_page(swept: Path) -> None:
    result = document(swept, "report", "ladder")
    assert [row["depth"] for row in result["runs"]] == list(DEPTHS)
    assert result["fits"][0]["points"]["n"] == 5
    assert result["fits"][0]["hash"] == document(swept, "fit-curves", "ladder")["hash"], (
        "the record is fit-curves' own"
    )
    assert result["question"] == NASTY
    assert Path(result["page"]).exists()


def test_every_line_colour_is_visible_on_a_dark_page() -> None:
    """The filter of the style sheet, by the matrix of hue-rotate(180deg) in CSS Filter Effects."""
    css = (TEMPLATES / "page.css").read_text()
    share = float(re.findall(r"filter: invert\(([\d.]+)\) hue-rotate\(180deg\)", css)[0])
    (paper,) = re.findall(r"dark\) \{\s+:root \{ --paper: (#\w+)", css)
    rotate = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])

    def filtered(colour: str) -> str:
        rgb = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        rgb = np.clip(rotate @ (rgb * (1 - 2 * share) + share), 0, 1)
        return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)

    shades = [
        f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"
        for r, g, b, _ in style.shades(7)
    ]
    assert filtered("#ffffff") == paper
    for colour in (style.INK, style.TEXT, style.FAINT, style.LAW, style.SURFACE, *shades):
        assert contrast(filtered(colour), paper) >= 3
