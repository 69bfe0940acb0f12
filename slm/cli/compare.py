"""`slm compare`: whether a change pays at every depth, and how sure that is."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from slm.cli.fit_curves import CsvFile, Figure, check_file, columns_of, print_notes
from slm.cli.options import Json, Mixed, print_json, table

if TYPE_CHECKING:
    import pandas

    from slm import results
    from slm.fits import DepthEffect


def compare(
    base: Annotated[
        str | None,
        Argument(
            help="An experiment, a recipe, a version of the trainer's code, or several of them "
            "joined by /."
        ),
    ] = None,
    candidate: Annotated[str | None, Argument(help="The same, for the change.")] = None,
    file: CsvFile = None,
    names: Annotated[str | None, Option("--map", help="Columns of the CSV: loss=val_bpb.")] = None,
    figure: Figure = None,
    markdown: Annotated[
        bool, Option("--markdown", help="The table that a pull request needs.")
    ] = False,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Price a change in compute: how much more the base would need for the candidate's loss, depth
    by depth."""
    from slm import results

    check_file(file, names, base)
    if markdown and as_json:
        raise ValueError("--markdown and --json: choose one")
    record = results.compare(
        base, candidate, file=file, columns=columns_of(names), allow_mixed=allow_mixed
    )
    record.save(figure)
    if as_json:
        print_json(record.to_json())
    elif markdown:
        print(_markdown(record))
    else:
        _print(record)


def _print(record: results.ComparisonRecord) -> None:
    from slm import results

    print(f"{record.comparison.decision.sentence}\n")
    (headers, rows), *core_tables = record.tables()
    print(table(rows, headers))
    for name, comparison in record.times.items():
        print(f"\nin {results.TIMES[name]}: {comparison.multiplier.text()}")
    for headers, rows in core_tables:
        print(f"\n{headers[0]} on the same examples, ± standard error over them; seeds add to it:")
        print(table(rows, headers))
    print_notes(record.document["warnings"], record.document["excluded"])
    print(f"\nfigure: {', '.join(map(str, record.figures))}")


def _markdown(record: results.ComparisonRecord) -> str:
    """Return the table that a pull request needs: every depth of both sides, the evidence, the
    provenance."""
    from tabulate import tabulate

    from slm import fits, results
    from slm.selection import describe_excluded

    comparison = record.comparison
    core_name = record.core.name if record.core else "CORE"
    headers = ["depth", "", "seeds", "training time (s)", "val_bpb", core_name]
    headers += ["tokens/s", "MFU", "multiplier", "evidence"]
    rows = [row for depth in comparison.per_depth for row in _depth_rows(depth, record)]
    lines = [
        f"**{comparison.decision.sentence}**",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        "",
        f"Compute multiplier over all depths: {comparison.multiplier.text()} "
        f"(95 % interval of one look). Evidence {comparison.evidence.combined:.2g}; a claim needs "
        f"{fits.CLAIM_THRESHOLD:g}, which holds under any number of looks.",
    ]
    for name, timed in record.times.items():
        lines.append(f"The same in {results.TIMES[name]}: {timed.multiplier.text()}.")
    lines += _core_lines(record)
    lines += [f"- {note['code']}: {note['message']}" for note in record.document["warnings"]]
    lines += [f"- left out: {line}" for line in describe_excluded(record.document["excluded"])]
    return "\n".join([*lines, "", *_provenance(record)])


def _core_lines(record: results.ComparisonRecord) -> list[str]:
    from slm.evaluate.paired import difference_text

    core = record.core
    if core is None:
        return []
    depths = ", ".join(f"d{row.depth} {difference_text(row.difference)}" for row in core.per_depth)
    return [
        f"{core.name} on the same examples, candidate minus base: "
        f"{difference_text(core.difference)} over all depths ({depths}); "
        "± is the standard error over examples, to which seeds add."
    ]


def _depth_rows(effect: DepthEffect, record: results.ComparisonRecord) -> list[list[str]]:
    """Return two rows: the base's runs and the candidate's."""
    rows = []
    paired = record.core.per_depth if record.core else ()
    scores = {row.depth: (row.base, row.candidate) for row in paired}
    for k, side in enumerate(record.sides):
        means = side.at_depth(effect.depth)
        core = means.core
        if record.core:
            core = scores[effect.depth][k] if effect.depth in scores else None
        spread = f" ± {stdev(means.losses):.4f}" if len(means.losses) > 1 else ""
        rows.append(
            [
                f"d{effect.depth}",
                side.name,
                str(len(means.losses)),
                _cell(means.train_seconds, ".1f"),
                f"{mean(means.losses):.4f}{spread}",
                _cell(core, ".4f"),
                _cell(means.tokens_per_second, ",.0f"),
                _cell(means.mfu, ".1%"),
                effect.multiplier.text() if k else "1",
                f"{effect.e_value:.2g}" if k else "",
            ]
        )
    return rows


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _provenance(record: results.ComparisonRecord) -> list[str]:
    """Return the command, and code, data and devices of each side."""
    names = " ".join(side.name for side in record.sides)
    version = record.document["versions"]["slm"]
    command = f"`slm compare {names} --markdown`"
    lines = [f"Made by {command}, slm {version}, record {record.document['hash']}."]
    for side in record.sides:
        rows = side.rows
        if rows is None:
            return [f"Made by slm {version} from a file with recipes {names}."]
        commits = _values(rows["commit"], "none")
        if rows["modified"].any():
            commits += " with uncommitted changes"
        slots = rows[["ranks", "device_name"]].dropna()
        devices = {f"{int(ranks)} x {name}" for ranks, name in slots.itertuples(index=False)}
        lines.append(
            f"- {side.name}: trainer {_values(rows['code'])}, commit {commits}, "
            f"data {_values(rows['corpus'])}, on {', '.join(sorted(devices)) or 'unknown'}."
        )
    return lines


def _values(column: pandas.Series[str], otherwise: str = "unknown") -> str:
    return ", ".join(sorted({str(value) for value in column.dropna()})) or otherwise
