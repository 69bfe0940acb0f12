"""`slm data list`, `show`, `verify` and `remove`: prepared data, their state, and their runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import faults
from slm.cli.options import DEEPEST, Json, depths_of, print_json, print_table, table
from slm.monitor.progress import ProgressBars, report_line
from slm.recipe import RECIPES, Hyperparameters
from slm.text import count

if TYPE_CHECKING:
    from slm.data import PreparedDataset

Name = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A corpus, or the beginning of a folder's name.")
]
HEADERS = (
    *("folder", "tokens", "row", "vocab", "tokeniser", "validation"),
    *("on disk", "runs", "state"),
)


def list_data(as_json: Json = False) -> None:
    """List prepared and unfinished data with sizes, fingerprints, and the number of their runs."""
    from slm.data.inventory import entries, summary
    from store import home

    folders = entries(home())
    documents = [summary(entry, home()) for entry in folders]
    if as_json:
        print_json({"home": str(home()), "data": documents})
        return
    print_table([_cells(document) for document in documents], HEADERS)
    size = count(sum(entry.size for entry in folders))
    print(f"\n{len(folders)} folders, {size}B in {home() / 'data'}")


def _cells(document: dict[str, Any]) -> list[str | None]:
    name = Path(document["folder"]).name
    size = f"{count(document['bytes'])}B"
    if "train" not in document:
        return [name, None, None, None, None, None, size, None, document["state"]]
    shape = document["shape"]
    return [
        name,
        count(document["train"]["tokens"]),
        f"{shape['sequence_length']:,}",
        f"{shape['vocab_size']:,}",
        document["tokenizer"],
        document["validation"]["fingerprint"],
        size,
        str(len(document["runs"])),
        document["state"],
    ]


def show(
    name: Name,
    depths: Annotated[
        str | None, typer.Option(help="Show the epochs that these depths need: 2-8, or 4,8,12.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Other tokenisers to compare with: gpt2,cl100k_base,FILE.tiktoken."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a prepared corpus: its documents, the depths it suffices for, its runs, compression."""
    from slm.data import inventory
    from store import home

    documents = []
    for entry in inventory.find_entries(home(), name):
        document = inventory.summary(entry, home())
        if dataset := entry.dataset:
            models = _models(dataset, depths)
            document["depths"] = [inventory.epochs(dataset, hp) for hp in models]
            document["reach"] = inventory.reach(dataset, DEEPEST)
            names = against.split(",") if against else []
            document["compression"] = inventory.compression(dataset, names)
        documents.append(document)
    if as_json:
        print_json({"home": str(home()), "data": documents})
    else:
        print("\n\n".join("\n".join(_lines(document)) for document in documents))


def _models(dataset: PreparedDataset, depths: str | None) -> list[Hyperparameters]:
    """Return the compute-optimal models of --depths.

    Raises ValueError if no recipe has the rows.
    """
    from slm.data import recipe_for

    if depths is None:
        return []
    recipe = recipe_for(dataset.manifest["shape"])
    if recipe is None:
        raise ValueError(
            f"--depths {depths}: no recipe of slm has rows of this shape; "
            "`slm sweep FILE --dry-run` shows the epochs of a declared experiment"
        )
    return [RECIPES[recipe](depth) for depth in depths_of(depths)]


def _lines(document: dict[str, Any]) -> list[str]:
    """Return the description of a folder for people."""
    lines = [f"{document['folder']}: {document['state']}, {count(document['bytes'])}B"]
    if "train" not in document:
        hint = "`slm data prepare`, called again, resumes it"
        if document["state"] == "of another version":
            hint = "`slm data remove` frees its space"
        return [*lines, f"  {hint}"]
    corpus, shape = document["corpus"], document["shape"]
    train, validation = document["train"], document["validation"]
    cropped, dropped = corpus["cropped_tokens"], corpus["dropped_tokens"]
    lost = cropped + dropped
    long_documents = "split into pieces" if shape["split_documents"] else "cropped"
    origin = "given" if document["given_tokenizer"] else "trained on the corpus"
    runs = document["runs"]
    lines += [
        f"  corpus {corpus['name']} from {document['source']}",
        f"  {corpus['documents']:,} documents of {corpus['tokens']:,} tokens; "
        f"left out: {faults(corpus)}",
        f"  {lost:,} tokens in no row ({lost / corpus['tokens']:.2%}): "
        f"{cropped:,} cropped, {dropped:,} dropped",
        f"  rows of {shape['sequence_length']:,} tokens, longer documents {long_documents}",
        f"  tokeniser {document['tokenizer']} of {shape['vocab_size']:,} tokens, {origin}",
        f"  validation: {validation['rows']:,} rows, {validation['tokens']:,} tokens, "
        f"{validation['fingerprint']}",
        f"  training: {train['rows']:,} rows, {train['tokens']:,} tokens in "
        f"{train['files']:,} files, {train['fingerprint']}",
        f"  read by {len(runs)} runs of this home{': ' if runs else ''}{', '.join(runs)}",
    ]
    return lines + _depth_lines(document) + _compression_lines(document["compression"])


def _depth_lines(document: dict[str, Any]) -> list[str]:
    lines = []
    if reach := document["reach"]:
        one_epoch, at_most = (
            f"depth {reach[key]}" if reach[key] else "no depth" for key in ("one_epoch", "at_most")
        )
        lines.append(
            f"  recipe {reach['recipe']}, compute-optimal: up to {one_epoch} in one epoch, "
            f"up to {at_most} in {reach['most_epochs']}, the maximum"
        )
    for row in document["depths"]:
        lines.append(
            f"    depth {row['depth']}: {count(row['tokens'])} tokens, {row['epochs']:.2f} epochs"
        )
    return lines


def _compression_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    reference = rows[0]["bytes_per_token"]
    if len(rows) == 1:
        return [f"  {reference:.3f} bytes per token on the validation text"]
    cells: list[list[str | None]] = []
    missing = []
    for row in rows:
        ratio = row["bytes_per_token"]
        if ratio:
            values = [f"{row['vocab_size']:,}", f"{ratio:.3f}", f"{reference / ratio:.2f}"]
            cells.append([row["tokenizer"], *values])
        else:
            cells.append([row["tokenizer"], None, None, None])
            missing.append(f"not available: {row['missing']}")
    headers = ("tokeniser", "vocab", "bytes per token", "relative tokens")
    return ["", table(cells, headers), *missing]


def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="[CORPUS]", help="A corpus or folder; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every row of prepared data with its manifest; exit code 1 if one was changed."""
    from slm.data.inventory import entries, find_entries
    from store import home

    problems: dict[str, str | None] = {}
    for entry in find_entries(home(), name) if name else entries(home()):
        if entry.dataset is None:
            continue
        report_line(f"verifying {entry.folder}")
        problem = None
        try:
            with ProgressBars() as bars:
                entry.dataset.verify_all(bars.add("rows"))
        except (ValueError, OSError) as error:
            problem = str(error)
        problems[str(entry.folder)] = problem
    if as_json:
        print_json({"home": str(home()), "problems": problems})
    else:
        lines = [f"{folder}: {problem or 'unchanged'}" for folder, problem in problems.items()]
        print("\n".join(lines) or "no prepared data")
    if any(problems.values()):
        raise typer.Exit(1)


def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Remove prepared or unfinished data, after showing what that frees and which runs read it."""
    import store
    from slm.data import inventory
    from slm.sweep import orchestrator

    home = store.home()
    matches = inventory.find_entries(home, name)
    if len(matches) > 1:
        names = ", ".join(entry.folder.name for entry in matches)
        raise ValueError(f"{name} matches {len(matches)} folders: name one of {names}")
    (entry,) = matches
    runs = []
    if entry.dataset:
        runs = [plan.run_id for plan in inventory.plans_on(entry.dataset, home)]
    with orchestrator.sweep_lock(home) as acquired:
        if not acquired:
            process = orchestrator.sweep_process(home)
            raise ValueError(f"{home} is being swept by process {process}: `slm stop` first")
        _check_not_in_use(home, runs)
        remark = ""
        if runs:
            remark = f"; {len(runs)} runs read it, and need it prepared again to be evaluated"
        size = count(entry.size)
        report_line(f"{entry.folder} ({entry.state}): {size}B{remark}")
        if not yes and not sys.stdin.isatty():
            raise ValueError("cannot ask for confirmation without a terminal: use --yes")
        if not yes:
            typer.confirm(f"remove {entry.folder.name}?", abort=True, err=True)
        inventory.remove(entry)
    if as_json:
        print_json({"home": str(home), "folder": str(entry.folder), "bytes": entry.size})
    else:
        print(f"freed {size}B")


def _check_not_in_use(home: Path, runs: Sequence[str]) -> None:
    """Raise ValueError while a run that reads the data is running or queued."""
    from slm.monitor.status import run_states
    from slm.run import run_holder

    for folder, state in run_states([home / run_id for run_id in runs]).items():
        if run_holder(folder) or state.status in ("running", "queued"):
            raise ValueError(
                f"run {folder.name} reads it ({state.status}): `slm stop {folder.name}` first"
            )
