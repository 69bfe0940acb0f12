"""The report: what a browser shows of it, what it says where there is little to say, and that names stay names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.experiment import Experiment
from slm.figures import style
from slm.recipe import pocket
from slm.report import Family, Found, markdown, report_of
from slm.report.charts import dark
from tests.browser import Browser, browser
from tests.cli.test_fit_curves import document, refusal, slm
from tests.homes import home_of, surface

DEPTHS = (2, 3, 4, 5, 6)
NASTY = """Does <script>document.title = 'run'</script> & "<b>" *pay* [x](http://a.example) | `--yes`?"""
SHOWN = """(function () {
  const style = (one) => getComputedStyle(document.querySelector(one));
  return {
    text: document.body.innerText, title: document.title, width: document.documentElement.scrollWidth,
    headings: [...document.querySelectorAll("h1, h2")].map((own) => own.textContent),
    drawings: [...document.querySelectorAll("svg")].map((own) => own.getAttribute("aria-label")),
    drawn: [...document.querySelectorAll("svg")].map((own) => own.getBoundingClientRect().height),
    heads: [...document.querySelectorAll("table")].map((own) => own.querySelectorAll("th[scope]").length),
    scripts: document.scripts.length, ids: [...document.querySelectorAll("[id]")].map((own) => own.id),
    paper: style("body").backgroundColor,
    inks: ["body", ".facts", ".question", ".detail", ".caption", ".cautions code", "dt", "footer"]
      .map((one) => style(one).color),
  };
})()"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder whose question is full of markup, a grid with a CORE, a change, one run, and runs that failed."""
    home = tmp_path_factory.mktemp("told")
    home_of(home, Experiment("ladder", (pocket,), DEPTHS))
    _ask(home, "ladder", NASTY)
    home_of(
        home,
        Experiment("grid", (pocket,), DEPTHS, flops=(3e11, 1e12), seeds=(0, 1)),
        core=lambda given: 0.1,
    )
    fast = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)
    home_of(
        home,
        Experiment("change", (pocket, fast), DEPTHS),
        lambda given: 1.01 * surface(given),
        code="c0de2",
    )
    home_of(home, Experiment("one", (pocket,), (3,), seeds=(4,)), code="c0de3")
    home_of(home, Experiment("broken", (pocket,), DEPTHS), code="c0de4")
    _break(home, "broken")
    return home


def _ask(home: Path, name: str, question: str) -> None:
    path = home / "experiments" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"question": question}))


def _break(home: Path, name: str) -> None:
    """One run of five stays finished; one diverges, two fail, the largest is not started."""
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
    with browser(tmp_path_factory.mktemp("profile")) as own:
        yield own


def page(home: Path, name: str, again: bool = False) -> Path:
    """The page of an experiment, made once."""
    path = home / "reports" / f"{name}.html"
    if again or not path.exists():
        code, out, err = slm(home, "report", name)
        assert code == 0, err
        assert out.endswith(f"report: {path}\n")
    return path


def shown(chromium: Browser, path: Path, width: int, theme: str) -> dict[str, Any]:
    """What stands on the page, once it has asked for nothing but itself and complained of nothing."""
    chromium.open(path, width, theme)
    found = chromium.ask(SHOWN)
    assert chromium.requests() == [path.as_uri()]
    assert chromium.complaints() == []
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2: 4.5 is enough for text, 3 for lines."""
    levels = []
    for colour in (one, other):
        parts = (
            re.findall(r"\d+", colour)
            if "(" in colour
            else [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
        )
        linear = [
            x / 12.92 if (x := int(own) / 255) <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
            for own in parts[:3]
        ]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_shows_the_whole_report(
    swept: Path, chromium: Browser, width: int, theme: str
) -> None:
    found = shown(chromium, page(swept, "ladder"), width, theme)
    assert found["title"] == "ladder · slm"
    assert found["headings"][:4] == ["ladder", "The answer", "What more compute buys", "Cautions"]
    text = found["text"].replace("\N{NO-BREAK SPACE}", " ")
    for said in (
        "Doubling compute lowers val_bpb by",
        "one_dial_no_exponents",
        "slm sweep --recipe pocket",
        "5 of 5",
        "d6",
    ):
        assert said in text
    assert found["width"] == width, "the page is wider than the screen"
    assert found["drawings"][0].startswith("Validation loss of 5 runs against training compute")
    assert min(found["drawn"]) > 100
    assert min(found["heads"]) > 1
    assert len(found["ids"]) == len(set(found["ids"]))
    assert min(contrast(ink, found["paper"]) for ink in found["inks"]) >= 4.5
    assert (contrast(found["paper"], "#ffffff") > 10) == (theme == "dark")


def test_what_a_file_says_stays_words(swept: Path, chromium: Browser) -> None:
    """Neither a question nor a log's message becomes markup, in HTML or in Markdown."""
    found = shown(chromium, page(swept, "ladder"), 390, "light")
    assert NASTY in found["text"]
    assert found["scripts"] == 0
    broken = page(swept, "broken").read_text()
    assert "<img" not in broken
    assert "&lt;img src=x&gt; | oom" in broken
    told = slm(swept, "report", "ladder", "--markdown")[1]
    assert r"\<script>" in told
    assert r"[x\](http://a.example) \| \`--yes\`" in told


def test_a_page_needs_no_other_file_and_is_the_same_every_time(swept: Path) -> None:
    path = page(swept, "ladder")
    first = path.read_bytes()
    asked = re.findall(rb'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', first)
    assert {own for pair in asked for own in pair if not own.startswith(b"#")} == {b""}
    assert page(swept, "ladder", again=True).read_bytes() == first


def test_markdown_says_the_same_and_draws_beside_itself(swept: Path, tmp_path: Path) -> None:
    html = page(swept, "grid").read_text()
    assert slm(swept, "report", "grid", "--markdown", "--output", str(tmp_path / "grid.md"))[0] == 0
    told = (tmp_path / "grid.md").read_text()
    titles = re.findall(r"<h2>([^<]+)</h2>", html)
    assert re.findall(r"^## (.+)$", told, re.M) == titles
    assert {"Runs", "Fits", "CORE", "Throughput", "Where it comes from"} < set(titles)
    for cell in re.findall(r'<td class="number">([^<]+)</td>', html):
        assert cell.replace("\N{NO-BREAK SPACE}", " ") in told
    drawings = re.findall(r"\]\(<([^>]+)>\)", told)
    assert len(drawings) == html.count("<svg ")
    assert all(Path(own).exists() for own in drawings)


def test_a_change_has_a_curve_for_each_recipe_and_says_where_they_are_judged(swept: Path) -> None:
    html = page(swept, "change").read_text()
    assert re.findall(r"<h3>(\w+)</h3>", html) == ["pocket", "fast", "pocket", "fast"]
    assert "slm compare change/pocket change/fast" in html
    assert "with recipes or seeds that no flag asks for" in html


def test_one_run_is_a_page_that_says_what_is_missing(swept: Path) -> None:
    told = slm(swept, "report", "one", "--markdown")[1]
    assert "No law L(C): 1 different compute" in told
    assert "every run has one seed" in told
    assert "`slm sweep --plan RUN/plan.json --name one`" not in told
    assert "slm sweep --plan RUN/plan.json --name one" in told


def test_failures_are_told_with_what_they_cost_and_the_way_out(swept: Path) -> None:
    told = slm(swept, "report", "broken", "--markdown")[1]
    assert "**1 of 5**" in told
    assert "d3 diverged, which is a result" in told
    assert (
        len(
            re.findall(
                r"failed \((?:oom|error)\): `slm logs \w{12}` says why, `slm retry \w{12}`", told
            )
        )
        == 2
    )
    assert "1 run planned: the sweep, typed again" in told
    assert "4 attempts for 4 runs; 3 ended without finishing, after 3 min 00 s together" in told


def test_an_experiment_without_a_result_is_a_page(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("none", (pocket,), (2, 3), steps=20))
    for done in tmp_path.glob("*/done.json"):
        done.unlink()
    html = page(tmp_path, "none").read_text()
    assert "No answer yet: 2 runs running" in html
    assert [own.name for own in (tmp_path / "reports").iterdir()] == ["none.html"]
    assert "slm sweep --recipe pocket --depths 2,3 --steps 20 --name none" in html


def test_an_imported_run_of_which_little_is_known_leaves_blanks(swept: Path) -> None:
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
    families = [Family("", None, "no run has its tokens")]
    told = markdown(report_of(Found("theirs", "", {}, [bare, nameless], [], families)))
    assert "lowest val_bpb: **0.9000**, d4\n" in told
    assert "highest CORE: **0.2500**, theirs" in told
    assert "`no_seed`: a defect (2 imported runs)" in told
    assert "`recomputed`: computed from the row's other numbers (2 imported runs)" in told
    assert "What is missing" not in told, "nobody here can train or evaluate what was imported"
    assert not re.search(r"None|nan|\b4\.0\b", told)


def test_runs_without_a_common_axis_are_refused_by_name(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("mixed", (pocket,), DEPTHS))
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


def test_json_has_the_rows_the_fits_and_where_the_page_is(swept: Path) -> None:
    found = document(swept, "report", "ladder")
    assert [row["depth"] for row in found["runs"]] == list(DEPTHS)
    assert found["fits"][0]["points"]["n"] == 5
    assert found["fits"][0]["hash"] == document(swept, "fit-curves", "ladder")["hash"], (
        "the record is fit-curves' own"
    )
    assert found["question"] == NASTY
    assert Path(found["page"]).exists()


def test_every_colour_of_a_line_is_seen_in_the_dark() -> None:
    shades = [
        f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"
        for r, g, b, _ in style.shades(7)
    ]
    for colour in (style.INK, style.WORDS, style.FAINT, style.LAW, style.SURFACE, *shades):
        assert contrast(dark(colour.lower()), dark("#ffffff")) >= 3
