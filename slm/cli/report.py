"""`slm report`: an experiment as one page."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm import results as fitting
from slm.cli.options import Json, Mixed, print_json, records
from slm.files import replacing

if TYPE_CHECKING:
    from slm.report import Family, Found, Report

WHERE = "Where to write it; else reports/NAME.html of the home, and Markdown on standard output."


def report(
    experiment: Annotated[
        str | None, typer.Argument(help="The experiment; else the only one there is.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help=WHERE)] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Markdown, for a pull request.")
    ] = False,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Tell an experiment on one page: question, answer, curve, runs, cautions, cost, provenance, how to repeat it."""
    from slm.report import markdown, page, report_of

    if as_markdown and as_json:
        raise ValueError("--markdown and --json: choose one")
    home = fitting.ingested()
    name = experiment or fitting.only_experiment(home)
    where = output or home / "reports" / f"{name}.html"
    if where.is_dir():
        raise ValueError(f"--output {where}: a folder; name a file in it")
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = _found(
            name, home, where.with_suffix("") if as_markdown else Path(folder) / name, allow_mixed
        )
        told = report_of(found)
        text = markdown(told) if as_markdown else page(told)
    if as_markdown and output is None:
        print(text, end="")
        return
    with replacing(where) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if as_json:
        print_json(_document(found, told, where))
    else:
        print("\n".join([*told.answer, "", f"report: {where}"]))


def _found(name: str, home: Path, stem: Path, mixed: bool) -> Found:
    """All that the store holds of an experiment, its fits made and drawn under `stem`.

    Raises QueryError for an experiment that is not there, ValueError for one without runs, NotComparable for runs whose
    losses have no common axis and are not to be `mixed`.
    """
    import store
    from slm.report import Found

    frame = store.results(name, home=home)
    if frame.empty:
        raise ValueError(
            f"experiment {name!r} has no runs any more: the sweep, typed again, plans them"
        )
    owner = str(frame["home"].iloc[0])
    query = "select question, declared from experiments where home = ? and name = ?"
    (asked,) = records(store.sql(query, [owner, name], home=home))
    attempts = """select attempts.* from attempts join memberships using (home, run_id)
                  where home = ? and experiment = ? order by run_id, attempt"""
    made = records(store.sql(attempts, [owner, name], home=home))
    rows, declared = sorted(records(frame), key=_order), asked["declared"]
    if not mixed:
        _check_axis(rows)
    declared = json.loads(declared) if isinstance(declared, str) else declared or {}
    return Found(
        name, asked["question"] or "", declared, rows, made, list(_families(name, stem, mixed))
    )


def _order(row: dict[str, Any]) -> tuple[float, int, str, int]:
    """Budgets one after the other, in each the depths."""
    budget = fitting.budget_of(row["horizon"] or "")
    return budget or 0.0, row["depth"] or 0, row["recipe"] or "", row["seed"] or 0


def _check_axis(rows: Sequence[dict[str, Any]]) -> None:
    """One page sets losses side by side. Raises NotComparable where they have no common axis."""
    from slm.fits import NotComparable
    from slm.fits.points import ALLOW, differences, parts_of

    told = differences(
        [parts_of(row["comparison_key"]) for row in rows if row["status"] == "finished"]
    )
    if told:
        raise NotComparable(f"the runs are not one page: {told}; {ALLOW}")


def _families(name: str, stem: Path, mixed: bool) -> Iterator[Family]:
    """A fit for each recipe with a finished run that a fit may use; where there is none, why."""
    from slm import fits
    from slm.report import Family, drawings

    try:
        runs = fitting.of_experiments([name])
    except fits.NotComparable:
        raise
    except ValueError as error:
        yield Family("", None, str(error))
        return
    recipes = list(dict.fromkeys(point.recipe for point in runs.points))
    for recipe in recipes:
        own = _of_recipe(runs, recipe)
        drawn_as = (
            f"{stem}-{re.sub(r'[^A-Za-z0-9._-]+', '_', recipe)}" if len(recipes) > 1 else stem
        )
        fit = fits.fit_curves(own.points, own.convention, others=own.others, mixed=mixed)
        document = fit.document() | {"predictions": [], "reach": []}
        document["points"]["excluded"] += runs.excluded
        record = fitting.recorded("fit-curves", [name], document)
        drawn = drawings(fit, drawn_as, fitting.training_curves(own, "val_bpb"))
        yield Family(recipe, fit, "", record, drawn)


def _of_recipe(runs: fitting.Runs, recipe: str) -> fitting.Runs:
    """The runs of one recipe."""
    mine = [point.recipe == recipe for point in runs.points]
    others = {name: list(compress(sizes, mine)) for name, sizes in runs.others.items()}
    rows = runs.rows[mine] if runs.rows is not None else None
    return replace(runs, points=list(compress(runs.points, mine)), rows=rows, others=others)


def _document(found: Found, told: Report, where: Path) -> dict[str, Any]:
    return {
        "experiment": found.name,
        "question": found.question,
        "answer": list(told.answer),
        "runs": found.rows,
        "attempts": [
            {name: own for name, own in row.items() if name != "diff"} for row in found.attempts
        ],
        "fits": [own.record for own in found.families if own.record],
        "page": str(where),
    }
