"""What the commands about curves share: finished runs as typed points, and fits as records."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.cli.options import report_problems
from slm.files import write_json

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
NAMED = 4
"""Runs named of those left out for one reason, or flagged."""
CORES = ("core", "core_error", "core_key")
"""Columns of `results` on CORE, or on what is measured in its place."""
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
    warnings: list[dict[str, str]] = field(default_factory=list)
    """What the rows say of themselves: flags of the runs that are used."""
    others: dict[str, list[float]] = field(default_factory=dict)
    """N of every run by the other conventions that all runs have."""
    speed: float | None = None
    """FLOPs a second of the largest run; None where it is not known."""
    ratio: float | None = None
    """Tokens a parameter of a ladder that is not the recipe's."""
    data: str = "python"
    """Corpus that the experiment names."""


def of_experiments(
    names: Sequence[str], counting: str = "matrices+head", metric: str = "val_bpb"
) -> Runs:
    """The finished runs of experiments in the store; of the only one there is when none is named.

    Raises ValueError for an experiment that is not there or has no finished run that a fit can use.
    """
    home = ingested()
    names = list(dict.fromkeys(names)) or [only_experiment(home)]
    finished = finished_of(names, home)
    complete, excluded = usable_of(finished, ("flops", METRICS[metric]))
    ladder, beside = ladder_of(complete)
    excluded += beside
    if ladder.empty:
        raise ValueError(_nothing_to_fit(names, complete, excluded))
    return Runs(
        points=points_of(ladder, COUNTS[counting][0], METRICS[metric]),
        convention=counting,
        stem=home / "figures" / "+".join(names),
        experiments=names,
        excluded=excluded,
        rows=ladder,
        warnings=flagged(ladder),
        others=_other_counts(ladder, counting),
        speed=_speed(ladder),
        ratio=next(
            (float(own[6:]) for own in ladder["horizon"].dropna() if own.startswith("ratio=")), None
        ),
        data=_data_of(names[0], home),
    )


def of_file(file: Path, columns: dict[str, str]) -> Runs:
    """The runs of a CSV. Raises ValueError as `fits.read_points` does."""
    from slm.fits import read_points

    budgets = columns.get("budget") != NONE
    named = {name: column for name, column in columns.items() if budgets or name != "budget"}
    table = read_points(file, named, budgets)
    outliers = [
        {"run_id": point.run_id, "reason": "marked as an outlier"} for point in table.outliers
    ]
    return Runs(
        list(table.points), "params as the file gives them", Path(file.stem), excluded=outliers
    )


def _nothing_to_fit(
    names: Sequence[str], complete: pandas.DataFrame, excluded: Sequence[dict[str, str]]
) -> str:
    """Why experiments have no run for a fit."""
    wanted = " and ".join(repr(name) for name in names)
    if not excluded:
        return f"experiment {wanted} has no finished run to fit: `slm status {names[0]}` says why"
    if complete.empty:
        way = (
            "; --metric loss takes nats a token"
            if any(run["reason"] == "no val_bpb" for run in excluded)
            else ""
        )
        return f"experiment {wanted} has no run to fit: {'; '.join(left_out(excluded))}{way}"
    horizons = ", ".join(sorted(set(complete["horizon"])))
    return f"experiment {wanted} has runs at {horizons}: a fit takes one ratio, or FLOPs budgets"


def _other_counts(ladder: pandas.DataFrame, counting: str) -> dict[str, list[float]]:
    columns = {name: ladder[column] for name, (column, _) in COUNTS.items() if name != counting}
    return {name: own.tolist() for name, own in columns.items() if own.notna().all()}


def _speed(ladder: pandas.DataFrame) -> float | None:
    """FLOPs a second of the largest run, where it is known."""
    import pandas

    speed = ladder.sort_values("flops")["flops_per_second"].iloc[-1]
    return None if pandas.isna(speed) else float(speed)


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


def left_out(excluded: Sequence[dict[str, str]]) -> list[str]:
    """Runs left out, a line for each reason, the first of them named."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for run in excluded:
        reasons[run["reason"]].append(run["run_id"])
    return [
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {reason}: {_listed(runs)}"
        for reason, runs in reasons.items()
    ]


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:NAMED]) + (", …" if len(words) > NAMED else "")


def columns_of(text: str | None) -> dict[str, str]:
    """`loss=val_bpb,params=n` as a dictionary. Raises ValueError for what is not name=column."""
    columns = {}
    for pair in text.split(",") if text else ():
        name, _, column = (part.strip() for part in pair.partition("="))
        if not (name and column):
            raise ValueError(f"--map {text}: write name=column, as in loss=val_bpb")
        columns[name] = column.strip("'\"")
    return columns


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


def usable_of(
    finished: pandas.DataFrame, needed: Sequence[str]
) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    """The runs that no flag forbids and that have the columns needed, and the others with the reason."""
    from slm.exchange.importers.checks import weighing

    allowed, excluded = finished["usable"].astype(bool), []
    for row in finished[~allowed].to_dict("records"):
        excluded.append(
            {"run_id": row["run_id"], "reason": f"flagged {weighing(row['flags'], 'forbids')}"}
        )
    left = finished[allowed]
    for column in needed:
        excluded += [
            {"run_id": run, "reason": f"no {column}"} for run in left[left[column].isna()]["run_id"]
        ]
        left = left[left[column].notna()]
    return left, excluded


def flagged(used: pandas.DataFrame) -> list[dict[str, str]]:
    """A warning that lists the runs used although something is known against them; none without any."""
    from slm.exchange.importers.checks import weighing

    known = {
        run: weighing(flags, "warns")
        for run, flags in zip(used["run_id"], used["flags"])
        if isinstance(flags, str)
    }
    found = [f"{run} ({flags})" for run, flags in known.items() if flags]
    if not found:
        return []
    message = f"{len(found)} of {len(used)} runs are used although they are flagged: {_listed(found)}; look at their source"
    return [{"code": "flagged_runs", "message": message}]


def ladder_of(finished: pandas.DataFrame) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    """The runs that a fit may use, and the others with the reason.

    Runs at FLOPs budgets, and one ladder: the compute-optimal runs, or those of the only ratio where there are none.
    An imported run whose horizon nobody wrote down is one of the ladder.
    """
    horizons = set(finished["horizon"].dropna())
    ratios = {horizon for horizon in horizons if horizon.startswith("ratio=")}
    ladder = (
        ratios if len(ratios) == 1 and "compute-optimal" not in horizons else {"compute-optimal"}
    )
    usable = (
        finished["horizon"].isin(ladder)
        | finished["horizon"].map(budget_of).notna()
        | finished["horizon"].isna()
    )
    others = finished[~usable].to_dict("records")
    reasons = [
        {"run_id": row["run_id"], "reason": f"{row['horizon']} is not compute-optimal"}
        for row in others
    ]
    return finished[usable], reasons


def points_of(
    finished: pandas.DataFrame, params: str = "parameters_scaling", loss: str = "val_bpb"
) -> list[Point]:
    """Finished runs of the view `results` as points; `params` and `loss` are columns of it.

    An imported run without a depth has depth 1, one without a seed has seed 0, as in a file.
    """
    from slm.fits import Point

    told = finished[[name for name in CORES if name in finished]]
    measured: list[dict[Any, Any]] = (
        told.astype(object).where(told.notna(), None).to_dict("records")
    )
    return [
        Point(
            run_id=row["run_id"],
            recipe=row["recipe"],
            depth=int(known(row["depth"], 1)),
            params=float(known(row[params], math.nan)),
            tokens=float(known(row["tokens"], math.nan)),
            flops=row["flops"],
            loss=row[loss],
            seed=int(known(row["seed"], 0)),
            budget=budget_of(row["horizon"]),
            comparison_key=row["comparison_key"],
            **cores,
        )
        for row, cores in zip(finished.to_dict("records"), measured)
    ]


def known(value: Any, otherwise: Any) -> Any:
    """A cell of a DataFrame, something else where it is missing."""
    import pandas

    return otherwise if pandas.isna(value) else value


def budget_of(horizon: Any) -> float | None:
    """FLOPs of `flops=1e12`; None for another horizon, and for none."""
    name, _, value = str(horizon).partition("=")
    return float(value) if name == "flops" else None


def family_of(points: Sequence[Point], option: str) -> str:
    """The one recipe of runs. Raises ValueError, naming the option that needs it, where there are several."""
    names = sorted({point.recipe for point in points})
    if len(names) > 1:
        raise ValueError(
            f"{option}: the runs are of recipes {' and '.join(names)}; it takes those of one"
        )
    return names[0]


def _data_of(experiment: str, home: Path) -> str:
    """Corpus as the experiment was asked for."""
    import store

    named = [store.home_of(experiment, home), experiment]
    frame = store.sql(
        "select declared from experiments where home = ? and name = ?", named, home=home
    )
    declared = frame["declared"].iloc[0]
    return str(
        (json.loads(declared) if isinstance(declared, str) else declared or {}).get(
            "data", "python"
        )
    )


def only_experiment(home: Path) -> str:
    """Its name. Raises ValueError where there are several, or none."""
    import store

    own = [store.identity(home)]
    names = store.sql("select name from experiments where home = ? order by name", own, home=home)[
        "name"
    ].tolist()
    if len(names) != 1:
        raise ValueError(f"name an experiment: there are {', '.join(names) or 'none'} in {home}")
    return str(names[0])


def training_curves(runs: Runs, metric: str) -> list[tuple[int, Any, Any]]:
    """Depth, FLOPs and smoothed training loss of each run that has them, for the figure's background; a file has none.

    Nats a token become the loss's unit by the run's own ratio of the two on the validation rows.
    """
    import store

    if runs.rows is None:
        return []
    loss: str = METRICS[metric]
    logged: dict[Any, pandas.DataFrame] = {}
    for name in runs.experiments:
        logged |= dict(iter(store.curves(name).dropna(subset=["loss", "flops"]).groupby("run_id")))
    curves = []
    for row in runs.rows.to_dict("records"):
        run = logged.get(row["run_id"])
        if run is None or known(row["val_loss"], None) is None:
            continue
        smooth = run["loss"].rolling(max(1, len(run) // SMOOTHING), min_periods=1).mean()
        curves.append(
            (
                int(known(row["depth"], 1)),
                run["flops"].to_numpy(),
                smooth.to_numpy() * row[loss] / row["val_loss"],
            )
        )
    return curves


def recorded(kind: str, experiments: Sequence[str], document: dict[str, Any]) -> dict[str, Any]:
    """A fit with its kind, hash, time and versions; of experiments of the home, kept as a file and in the store."""
    import store

    versions = {name: metadata.version(name) for name in ("slm", "numpy", "scipy")}
    content = {"kind": kind, "experiments": list(experiments), "versions": versions, **document}
    digest = hashlib.sha256(
        json.dumps(content, sort_keys=True, allow_nan=False).encode()
    ).hexdigest()[:12]
    record = {"hash": digest, "created": time.time(), **content}
    if not experiments:
        return record
    home = store.home()
    (home / "fits").mkdir(exist_ok=True)
    path = home / "fits" / f"{digest}.json"
    if not path.exists():
        write_json(path, record)
    store.ingest(home)
    return record
