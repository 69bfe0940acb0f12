"""`slm fit-curves`: what more compute buys."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import Json, print_json, print_table, report_problems

SMOOTHING = 12
"""A training curve is averaged over this share of its logged steps."""

if TYPE_CHECKING:
    import pandas

    from slm.fits import Point


def fit_curves(
    experiment: Annotated[str | None, typer.Argument(help="An experiment; else the only one there is.")] = None,
    file: Annotated[Path | None, typer.Option("--from", help="Runs of a CSV: params, tokens, flops, loss.")] = None,
    names: Annotated[str | None, typer.Option("--map", help="What columns are called there: loss=val_bpb.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw, without ending; else by the fit's name.")] = None,
    as_json: Json = False,
) -> None:
    """Fit val_bpb against FLOPs, with intervals, isoFLOP minima and what cannot be concluded; draw the figure."""
    from slm import figures, fits

    if file is not None and experiment is not None:
        raise ValueError(f"{experiment} and --from {file}: fit one or the other")
    if names is not None and file is None:
        raise ValueError(f"--map {names}: it goes with --from")
    runs = _of_experiment(experiment) if file is None else _of_file(file, names)
    fit = fits.fit_curves(runs.points, runs.convention)
    document: dict[str, Any] = {"experiments": runs.experiments, "created": time.time()} | fit.document()
    document["points"]["excluded"] += runs.excluded
    document["hash"] = _hash(document)
    stem = figure or runs.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_curve(fit, runs.points, stem, curves=runs.curves, title=stem.name)
    if runs.experiments:
        _record(document)
    if as_json:
        print_json(document | {"figures": [str(path) for path in drawn]})
        return
    print(fits.summary(fit))
    for headers, rows in fits.tables(fit):
        print()
        print_table(rows, headers)
    for warning in document["warnings"]:
        print(f"\n{warning['code']}: {warning['message']}")
    for reason, count in Counter(run["reason"] for run in runs.excluded).items():
        print(f"\nleft out: {count} runs, {reason}")
    print(f"\nfigure: {drawn[0]}, {drawn[1]}")


@dataclass(frozen=True)
class _Runs:
    """What is to be fitted."""

    points: list[Point]
    """Runs."""
    convention: str
    """What their N counts."""
    stem: Path
    """Where the figure goes, without ending."""
    experiments: list[str] = field(default_factory=list)
    """Where they are from; a fit of a file is not recorded."""
    excluded: list[dict[str, str]] = field(default_factory=list)
    """Runs left out, each with its reason."""
    curves: list[tuple[int, Any, Any]] = field(default_factory=list)
    """Depth, FLOPs and loss while training."""


def _of_experiment(experiment: str | None) -> _Runs:
    """The finished runs of an experiment in the store."""
    import store

    home = store.home()
    report_problems(store.ingest(home).problems)
    name = experiment or _only_experiment()
    frame = store.results(name, home=home)
    ladder, excluded = _ladder(frame[frame["status"] == "finished"])
    points = points_of(ladder)
    if not points:
        raise ValueError(f"experiment {name!r} has no finished run to fit: `slm status {name}` says why")
    curves = _curves(ladder, name, home)
    return _Runs(points, "matrices+head", home / "figures" / name, [name], excluded, curves)


def _of_file(file: Path, names: str | None) -> _Runs:
    """The runs of a CSV."""
    from slm.fits import read_points

    if not file.is_file():
        raise ValueError(f"--from {file}: no such file")
    pairs = [pair.partition("=") for pair in names.split(",")] if names else []
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"--map {names}: write name=column, as in loss=val_bpb")
    table = read_points(file, {name: column for name, _, column in pairs})
    outliers = [{"run_id": point.run_id, "reason": "marked as an outlier"} for point in table.outliers]
    return _Runs(list(table.points), "params as the file gives them", Path(file.stem), excluded=outliers)


def _ladder(finished: pandas.DataFrame) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    """The runs that a fit may use, and the others with the reason.

    Runs at FLOPs budgets, and one ladder: the compute-optimal runs, or those of the only ratio where there are none.
    """
    horizons = set(finished["horizon"])
    ratios = {horizon for horizon in horizons if horizon.startswith("ratio=")}
    ladder = ratios if len(ratios) == 1 and "compute-optimal" not in horizons else {"compute-optimal"}
    usable = finished["horizon"].isin(ladder) | finished["horizon"].str.startswith("flops=")
    others = finished[~usable].to_dict("records")
    reasons = [{"run_id": row["run_id"], "reason": f"{row['horizon']} is not compute-optimal"} for row in others]
    return finished[usable], reasons


def points_of(finished: pandas.DataFrame) -> list[Point]:
    """Finished runs of the view `results` as points. N is matrices and head."""
    from slm.fits import Point

    return [
        Point(
            run_id=row["run_id"],
            recipe=row["recipe"],
            depth=row["depth"],
            params=row["parameters_scaling"],
            tokens=row["tokens"],
            flops=row["flops"],
            loss=row["val_bpb"],
            seed=row["seed"],
            budget=_budget(row["horizon"]),
            comparison_key=row["comparison_key"],
        )
        for row in finished.to_dict("records")
    ]


def _budget(horizon: str) -> float | None:
    name, _, value = horizon.partition("=")
    return float(value) if name == "flops" else None


def _only_experiment() -> str:
    import store

    names = store.sql("select name from experiments order by name")["name"].tolist()
    if len(names) != 1:
        raise ValueError(f"name an experiment: there are {', '.join(names) or 'none'} in {store.home()}")
    return str(names[0])


def _curves(results: pandas.DataFrame, name: str, home: Path) -> list[tuple[int, Any, Any]]:
    """Depth, FLOPs and smoothed training loss of each run, for the figure's background.

    Nats a token become bits per byte by the run's own ratio of the two on the validation rows.
    """
    import store

    logged = dict(iter(store.curves(name, home=home).dropna(subset=["loss"]).groupby("run_id")))
    curves = []
    for row in results.to_dict("records"):
        run = logged.get(row["run_id"])
        if run is None:
            continue
        smooth = run["loss"].rolling(max(1, len(run) // SMOOTHING), min_periods=1).mean()
        curves.append((row["depth"], run["flops"].to_numpy(), smooth.to_numpy() * row["val_bpb"] / row["val_loss"]))
    return curves


def _hash(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "created"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _record(document: dict[str, Any]) -> None:
    """Keep the fit as a file and in the store."""
    import store
    from slm import events

    folder = store.home() / "fits"
    folder.mkdir(exist_ok=True)
    path = folder / f"{document['hash']}.json"
    if not path.exists():
        events.write_json(path, document)
    store.ingest(store.home())
