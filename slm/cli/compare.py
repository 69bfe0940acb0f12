"""`slm compare`: whether a change pays at every depth, and how sure that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm import results as fitting
from slm.cli.options import Json, Mixed, print_json, print_table
from slm.evaluate.paired import Paired, paired, text

if TYPE_CHECKING:
    import pandas

    from slm.fits import AtDepth, Comparison, Trial

NAMES = "An experiment, a recipe, a version of the trainer's code, or several of them joined by /."
TIMES = {"wall_clock": "training time", "cost": "device time"}
"""What is compared beside compute, in words."""
UNEVEN = 1.1
"""How many times longer one seed may take than another without a word."""


def compare(
    base: Annotated[str | None, typer.Argument(help=NAMES)] = None,
    candidate: Annotated[
        str | None, typer.Argument(help="The same, for what is to be judged.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--from", help="Runs of a CSV: recipe, depth, flops, loss.")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--map", help="What columns are called there: loss=val_bpb.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where to draw, without ending; else by the names.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table that a pull request needs.")
    ] = False,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Price a change in compute: how much more the base would need for the candidate's loss, depth by depth."""
    import store
    from slm import figures, fits

    fitting.check_file(file, names, base)
    if markdown and as_json:
        raise ValueError("--markdown and --json: choose one")
    sides = _of_file(file, names) if file is not None else _of_store(base, candidate)
    found = fits.compare(sides.base, sides.candidate, sides.names, allow_mixed=allow_mixed)
    times, refused = _in_time(sides, allow_mixed)
    document = found.document() | {"excluded": sides.excluded}
    document |= {name: times[name].document() if name in times else None for name in TIMES}
    scores, unpaired = (
        paired(store.home(), sides.names, sides.frames) if sides.frames else (None, [])
    )
    document["core"] = scores.document() if scores else None
    document["warnings"] += [*_of_timings(sides, refused), *sides.warnings, *unpaired]
    document = fitting.recorded("compare", sides.experiments, document)
    stem = figure or sides.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_comparison(found, stem)
    if as_json:
        print_json(document | {"figures": [str(path) for path in drawn]})
    elif markdown:
        print(_markdown(found, times, scores, document, sides))
    else:
        _print(found, times, scores, document)
        print(f"\nfigure: {', '.join(str(path) for path in drawn)}")


@dataclass(frozen=True)
class _Sides:
    """What is to be compared."""

    names: tuple[str, str]
    """Base and candidate."""
    base: list[Trial]
    """Runs of the base."""
    candidate: list[Trial]
    """Runs of the candidate."""
    stem: Path
    """Where the figure goes, without ending."""
    experiments: list[str]
    """Where they are from; a comparison of a file is not recorded."""
    frames: tuple[pandas.DataFrame, pandas.DataFrame] | None = None
    """Rows of `results` of both, where they are from the store."""
    excluded: list[dict[str, str]] = field(default_factory=list)
    """Runs left out, each with its reason."""
    warnings: list[dict[str, str]] = field(default_factory=list)
    """What the rows say of themselves."""


def _of_file(file: Path, names: str | None) -> _Sides:
    """The two recipes of a CSV, base first."""
    from slm.fits import read_trials

    (base, own), (candidate, other) = read_trials(file, fitting.columns_of(names)).items()
    return _Sides((base, candidate), own, other, Path(f"{file.stem}-compared"), [])


def _of_store(base: str | None, candidate: str | None) -> _Sides:
    """Two sets of runs of the home, by what each is named by."""
    import store

    if base is None or candidate is None:
        raise ValueError("two names are needed: `slm compare BASE CANDIDATE`, or --from FILE.csv")
    home = fitting.ingested()
    query, own = "select experiment, run_id from memberships where home = ?", [store.home_id(home)]
    finished, members = store.results(home=home), store.sql(query, own, home=home)
    finished = finished[finished["status"] == "finished"]
    named = [_named(name, finished, members) for name in (base, candidate)]
    frames = named[0][0], named[1][0]
    excluded = [run for _, left in named for run in left]
    both = sorted(set(frames[0]["run_id"]) & set(frames[1]["run_id"]))
    if both:
        raise ValueError(
            f"{base} and {candidate} share run {both[0]} and {len(both) - 1} others: nothing to compare"
        )
    stem = home / "figures" / f"{base}-{candidate}".replace("/", ".")
    runs = {run_id for frame in frames for run_id in frame["run_id"]}
    experiments = sorted(set(members[members["run_id"].isin(runs)]["experiment"]))
    trials = _trials(frames[0], -1), _trials(frames[1], -2)
    warnings = [warning for frame in frames for warning in fitting.flagged(frame)]
    return _Sides((base, candidate), *trials, stem, experiments, frames, excluded, warnings)


def _named(
    name: str, finished: pandas.DataFrame, members: pandas.DataFrame
) -> tuple[pandas.DataFrame, list[dict[str, str]]]:
    """The ladder of the finished runs that every part of a name holds: experiment, recipe, code; and those left out.

    Raises ValueError for a part that names nothing, for no run, and for several recipes or versions of the code.
    """
    for part in name.split("/"):
        finished = finished[_holds(part, finished, members)]
    complete, excluded = fitting.usable_of(finished, ("depth", "flops", "val_bpb"))
    ladder, _ = fitting.ladder_of(complete)
    ladder = ladder[ladder["horizon"].map(fitting.budget_of).isna()]
    if ladder.empty:
        why = f" ({'; '.join(fitting.left_out(excluded))})" if excluded else ""
        raise ValueError(
            f"{name}: no finished compute-optimal run is all of that{why}; `slm status` shows what there is"
        )
    for column, word in (("recipe", "recipes"), ("code", "versions of the trainer's code")):
        values = sorted(set(ladder[column].dropna()))
        if len(values) > 1:
            choices = ", ".join(f"{name}/{value}" for value in values)
            raise ValueError(f"{name} has runs of {len(values)} {word}: name one, as in {choices}")
    return ladder, excluded


def _holds(part: str, frame: pandas.DataFrame, members: pandas.DataFrame) -> pandas.Series[bool]:
    """Which rows an experiment's, a recipe's or a code's name means."""
    experiments = set(members["experiment"])
    if part in experiments:
        return frame["run_id"].isin(members[members["experiment"] == part]["run_id"])
    if part in set(frame["recipe"]):
        return frame["recipe"] == part
    codes = frame["code"].fillna("").str.startswith(part) & (len(part) >= 4)
    if not codes.any():
        there = (
            ", ".join(
                sorted(experiments | set(frame["recipe"].dropna()) | set(frame["code"].dropna()))
            )
            or "none"
        )
        raise ValueError(f"{part}: no such experiment, recipe or code; there are {there}")
    return codes


def _trials(frame: pandas.DataFrame, seedless: int) -> list[Trial]:
    """`seedless` is the seed of runs of which nobody wrote it down: it makes no pair with a run of the other side."""
    from slm.fits import Trial

    return [
        Trial(
            run_id=row["run_id"],
            depth=row["depth"],
            seed=int(fitting.known(row["seed"], seedless)),
            flops=row["flops"],
            loss=row["val_bpb"],
            seconds=fitting.known(row["train_seconds"], None),
            comparison_key=row["comparison_key"],
        )
        for row in frame.to_dict("records")
    ]


def _in_time(sides: _Sides, mixed: bool) -> tuple[dict[str, Comparison], str | None]:
    """The same question of TIMES, where both sides have them on devices of one kind, and why it cannot be answered."""
    from slm import fits

    if any(trial.seconds is None for trial in (*sides.base, *sides.candidate)):
        return {}, None
    asked = {"wall_clock": (sides.base, sides.candidate)}
    if sides.frames is not None:
        devices = {
            (name, ranks)
            for frame in sides.frames
            for name, ranks in zip(frame["device_name"], frame["ranks"])
        }
        if len({name for name, _ in devices}) > 1 or any(
            fitting.known(ranks, None) is None for _, ranks in devices
        ):
            return {}, None
        asked["cost"] = (
            _costed(sides.base, sides.frames[0]),
            _costed(sides.candidate, sides.frames[1]),
        )
    try:
        return {
            name: fits.compare(*own, sides.names, "seconds", mixed) for name, own in asked.items()
        }, None
    except fits.NotComparable as error:
        return {}, str(error)


def _of_timings(sides: _Sides, refused: str | None) -> list[dict[str, str]]:
    """Warnings where times are not compared, and where the same work took unequal times: the machine was not quiet."""
    found = [{"code": "times_not_compared", "message": refused}] if refused else []
    times = defaultdict(list)
    for side, trials in enumerate((sides.base, sides.candidate)):
        for trial in trials:
            if trial.seconds is not None:
                times[side, trial.depth].append(trial.seconds)
    worst = max((max(own) / min(own) for own in times.values()), default=1.0)
    if worst > UNEVEN:
        message = f"training times of one depth and recipe differ up to {worst:.3g} times: the machine was not quiet"
        found.append({"code": "timings_scatter", "message": message})
    return found


def _costed(trials: Sequence[Trial], frame: pandas.DataFrame) -> list[Trial]:
    """Trials whose seconds are those of all their devices together."""
    from dataclasses import replace

    ranks = dict(zip(frame["run_id"], frame["ranks"]))
    return [
        replace(trial, seconds=(trial.seconds or 0.0) * float(ranks[trial.run_id]))
        for trial in trials
    ]


def _print(
    found: Comparison, times: dict[str, Comparison], scores: Paired | None, document: dict[str, Any]
) -> None:
    from slm import fits

    print(f"{found.verdict.sentence}\n")
    headers, rows = fits.comparison_table(found)
    print_table(rows, headers)
    for name, own in times.items():
        print(f"\nin {TIMES[name]}: {own.multiplier.text()}")
    if scores:
        print(f"\n{scores.name} on the same examples, ± standard error over them; seeds add to it:")
        headers, rows = scores.table((found.base, found.candidate))
        print_table(rows, headers)
    fitting.print_warnings(document)
    for line in fitting.left_out(document["excluded"]):
        print(f"\nleft out: {line}")


def _markdown(
    found: Comparison,
    times: dict[str, Comparison],
    scores: Paired | None,
    document: dict[str, Any],
    sides: _Sides,
) -> str:
    """The table that a pull request needs: every depth of both, the multiplier, the evidence and how it was made."""
    from tabulate import tabulate

    from slm import fits

    headers = [
        "depth",
        "",
        "seeds",
        "training time (s)",
        "val_bpb",
        scores.name if scores else "CORE",
        "tokens/s",
    ]
    headers += ["MFU", "multiplier", "evidence"]
    rows = [row for depth in found.per_depth for row in _depth_rows(depth, sides, scores)]
    lines = [
        f"**{found.verdict.sentence}**",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
        f"Compute multiplier over all depths: {found.multiplier.text()} (95 % of one look). Evidence "
        f"{found.evidence.any:.2g}; a claim takes {fits.ENOUGH:g} and so holds however often one looks.",
    ]
    lines += [f"The same in {TIMES[name]}: {own.multiplier.text()}." for name, own in times.items()]
    if scores:
        each = ", ".join(f"d{own.depth} {text(own.difference)}" for own in scores.per_depth)
        lines.append(
            f"{scores.name} on the same examples, candidate minus base: {text(scores.difference)} over all depths "
            f"({each}); ± is the standard error over examples, to which seeds add."
        )
    lines += [f"- {warning['code']}: {warning['message']}" for warning in document["warnings"]]
    lines += [f"- left out: {line}" for line in fitting.left_out(sides.excluded)]
    return "\n".join([*lines, "", *_made(document, sides)])


def _depth_rows(depth: AtDepth, sides: _Sides, scores: Paired | None) -> list[list[str]]:
    """Two rows: the base's runs and the candidate's."""
    rows: list[list[str]] = []
    reached = {own.depth: own.means for own in scores.per_depth} if scores else {}
    for k, (name, trials) in enumerate(zip(sides.names, (sides.base, sides.candidate))):
        own = [trial for trial in trials if trial.depth == depth.depth]
        seconds = [trial.seconds for trial in own if trial.seconds is not None]
        losses = [trial.loss for trial in own]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        measured = _measured(sides.frames[k], depth.depth) if sides.frames else ["-", "-", "-"]
        if scores:
            measured[0] = f"{reached[depth.depth][k]:.4f}" if depth.depth in reached else "-"
        rows.append(
            [
                f"d{depth.depth}",
                name,
                str(len(own)),
                f"{mean(seconds):.1f}" if seconds else "-",
                f"{mean(losses):.4f}{spread}",
                *measured,
                depth.multiplier.text() if k else "1",
                f"{depth.evidence:.2g}" if k else "",
            ]
        )
    return rows


def _measured(frame: pandas.DataFrame, depth: int) -> list[str]:
    """Means of CORE, tokens a second and MFU over the runs of a depth; a dash for what is not known."""
    from slm.hardware import devices

    own = frame[frame["depth"] == depth]
    shares = [
        devices.mfu(speed, fitting.known(name, ""), ranks)
        for speed, name, ranks in zip(own["flops_per_second"], own["device_name"], own["ranks"])
    ]
    used = [share for share in shares if fitting.known(share, None) is not None]
    return [
        f"{own['core'].mean():.4f}" if own["core"].notna().all() else "-",
        f"{own['tokens_per_second'].mean():,.0f}"
        if own["tokens_per_second"].notna().all()
        else "-",
        f"{mean(used):.1%}" if len(used) == len(own) else "-",
    ]


def _made(document: dict[str, Any], sides: _Sides) -> list[str]:
    """How the numbers came about: command, record, code, data, devices."""
    names = " ".join(sides.names)
    if sides.frames is None:
        return [f"Made by slm {document['versions']['slm']} from a file with recipes {names}."]
    lines = [
        f"Made by `slm compare {names} --markdown`, slm {document['versions']['slm']}, record {document['hash']}."
    ]
    for name, frame in zip(sides.names, sides.frames):
        commits = ", ".join(sorted({str(own) for own in frame["commit"].dropna()})) or "none"
        changed = " with uncommitted changes" if frame["modified"].any() else ""
        slots = frame[["ranks", "device_name"]].dropna().astype({"ranks": int})
        where = (
            ", ".join(sorted({f"{ranks} x {device}" for ranks, device in zip(*slots.T.to_numpy())}))
            or "unknown"
        )
        code, corpus = (
            ", ".join(sorted(set(frame[own].dropna()))) or "unknown" for own in ("code", "corpus")
        )
        lines.append(
            f"- {name}: trainer {code}, commit {commits}{changed}, data {corpus}, on {where}."
        )
    return lines
