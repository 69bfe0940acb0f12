"""What the commands about curves share: finished runs as typed points, and fits as records."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.cli.options import report_problems

if TYPE_CHECKING:
    import pandas

    from slm.fits import Point

SMOOTHING = 12
"""A training curve is averaged over this share of its logged steps."""
COUNTS = {
    "matrices+head": ("parameters_scaling", "scaling"),
    "total": ("parameters_total", "total"),
    "matrices": ("parameters_matrices", "transformer_matrices"),
}
"""What N may count, the column of `results` that has it, and its name among a recipe's parameters."""
METRICS = {"val_bpb": "val_bpb", "loss": "val_loss", "core": "val_bpb"}
"""What a fit may be of, and the column of `results` that is its loss; CORE is read through the loss."""
NONE = "none"
"""`--map budget=none`: the runs of a file have no budgets."""


@dataclass(frozen=True)
class Runs:
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
    rows: pandas.DataFrame | None = None
    """Rows of `results` that they are, where they are from the store."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """N of every run by the other conventions."""
    speed: float | None = None
    """FLOPs a second of the largest run; None where it is not known."""
    ratio: float | None = None
    """Tokens a parameter of a ladder that is not the recipe's."""
    data: str = "python"
    """Corpus that the experiment names."""


def of_experiments(names: Sequence[str], counting: str = "matrices+head", metric: str = "val_bpb") -> Runs:
    """The finished runs of experiments in the store; of the only one there is when none is named.

    Raises ValueError for an experiment that is not there or has no finished run.
    """

    home = ingested()
    names = list(dict.fromkeys(names)) or [_only_experiment(home)]
    frame = finished_of(names, home)
    ladder, excluded = ladder_of(frame)
    if ladder.empty:
        wanted = " and ".join(repr(name) for name in names)
        if excluded:
            horizons = ", ".join(sorted(set(frame["horizon"])))
            raise ValueError(f"experiment {wanted} has runs at {horizons}: a fit takes one ratio, or FLOPs budgets")
        raise ValueError(f"experiment {wanted} has no finished run to fit: `slm status {names[0]}` says why")
    title = "+".join(names)
    points = points_of(ladder, COUNTS[counting][0], METRICS[metric])
    others = {name: ladder[column].tolist() for name, (column, _) in COUNTS.items() if name != counting}
    speed = float(ladder.sort_values("flops")["flops_per_second"].iloc[-1])
    ratios = {float(own.removeprefix("ratio=")) for own in ladder["horizon"] if own.startswith("ratio=")}
    where = home / "figures" / title
    data = _data_of(names[0], home)
    return Runs(points, counting, where, names, excluded, ladder, others, speed, next(iter(ratios), None), data)


def of_file(file: Path, columns: dict[str, str]) -> Runs:
    """The runs of a CSV. Raises ValueError as `fits.read_points` does."""
    from slm.fits import read_points

    budgets = columns.get("budget") != NONE
    named = {name: column for name, column in columns.items() if budgets or name != "budget"}
    table = read_points(file, named, budgets)
    outliers = [{"run_id": point.run_id, "reason": "marked as an outlier"} for point in table.outliers]
    return Runs(list(table.points), "params as the file gives them", Path(file.stem), excluded=outliers)


def check_file(file: Path | None, names: str | None, other: str | None) -> None:
    """Refuse --from beside names of the store or where there is no such file, and --map without it."""
    if file is not None and other is not None:
        raise ValueError(f"{other} and --from {file}: read one or the other")
    if names is not None and file is None:
        raise ValueError(f"--map {names}: it goes with --from")
    if file is not None and not file.is_file():
        raise ValueError(f"--from {file}: no such file")


def print_warnings(document: dict[str, Any]) -> None:
    """A paragraph each."""
    for warning in document["warnings"]:
        print(f"\n{warning['code']}: {warning['message']}")


def columns_of(text: str | None) -> dict[str, str]:
    """`loss=val_bpb,params=n` as a dictionary. Raises ValueError for what is not name=column."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"--map {text}: write name=column, as in loss=val_bpb")
    return {name: column for name, _, column in pairs}


def ingested() -> Path:
    """The home, its database up to date with its files."""
    import store

    home = store.home()
    report_problems(store.ingest(home).problems)
    return home


def finished_of(names: Sequence[str], home: Path) -> pandas.DataFrame:
    """Finished runs of experiments, each once."""
    import pandas

    import store

    frames = [store.results(name, home=home) for name in names]
    frame = pandas.concat(frames).drop_duplicates("run_id", ignore_index=True)
    return frame[frame["status"] == "finished"]


def ladder_of(finished: pandas.DataFrame) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
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


def points_of(finished: pandas.DataFrame, params: str = "parameters_scaling", loss: str = "val_bpb") -> list[Point]:
    """Finished runs of the view `results` as points; `params` and `loss` are columns of it."""
    import pandas

    from slm.fits import Point

    return [
        Point(
            run_id=row["run_id"],
            recipe=row["recipe"],
            depth=row["depth"],
            params=row[params],
            tokens=row["tokens"],
            flops=row["flops"],
            loss=row[loss],
            seed=row["seed"],
            budget=budget_of(row["horizon"]),
            comparison_key=row["comparison_key"],
            core=None if pandas.isna(row["core"]) else row["core"],
        )
        for row in finished.to_dict("records")
    ]


def budget_of(horizon: str) -> float | None:
    """FLOPs of `flops=1e12`; None for another horizon."""
    name, _, value = horizon.partition("=")
    return float(value) if name == "flops" else None


def _data_of(experiment: str, home: Path) -> str:
    """Corpus as the experiment was asked for."""
    import store

    frame = store.sql("select declared from experiments where name = ?", [experiment], home=home)
    declared = frame["declared"].iloc[0]
    return str((json.loads(declared) if isinstance(declared, str) else declared or {}).get("data", "python"))


def _only_experiment(home: Path) -> str:
    import store

    names = store.sql("select name from experiments order by name", home=home)["name"].tolist()
    if len(names) != 1:
        raise ValueError(f"name an experiment: there are {', '.join(names) or 'none'} in {home}")
    return str(names[0])


def training_curves(runs: Runs, metric: str) -> list[tuple[int, Any, Any]]:
    """Depth, FLOPs and smoothed training loss of each run, for the figure's background; none for runs of a file.

    Nats a token become the loss's unit by the run's own ratio of the two on the validation rows.
    """
    import store

    if runs.rows is None:
        return []
    loss: str = METRICS[metric]
    logged: dict[Any, pandas.DataFrame] = {}
    for name in runs.experiments:
        logged |= dict(iter(store.curves(name).dropna(subset=["loss"]).groupby("run_id")))
    curves = []
    for row in runs.rows.to_dict("records"):
        run = logged.get(row["run_id"])
        if run is None:
            continue
        smooth = run["loss"].rolling(max(1, len(run) // SMOOTHING), min_periods=1).mean()
        curves.append((row["depth"], run["flops"].to_numpy(), smooth.to_numpy() * row[loss] / row["val_loss"]))
    return curves


def recorded(kind: str, experiments: Sequence[str], document: dict[str, Any]) -> dict[str, Any]:
    """A fit with its kind, hash, time and versions; of experiments of the home, kept as a file and in the store."""
    import store
    from slm import events

    versions = {name: metadata.version(name) for name in ("slm", "numpy", "scipy")}
    content = {"kind": kind, "experiments": list(experiments), "versions": versions, **document}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]
    record = {"hash": digest, "created": time.time(), **content}
    if not experiments:
        return record
    home = store.home()
    (home / "fits").mkdir(exist_ok=True)
    path = home / "fits" / f"{digest}.json"
    if not path.exists():
        events.write_json(path, record)
    store.ingest(home)
    return record
