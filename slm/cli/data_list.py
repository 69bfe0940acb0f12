"""`slm data list`, `show`, `verify` and `remove`: what is prepared, whether it is whole, and who reads it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.data import left_out
from slm.cli.options import DEEPEST, Json, depths_of, print_json, print_table, table
from slm.monitor.progress import ProgressBars, report_line
from slm.recipe import RECIPES, Hyperparameters
from slm.text import count

if TYPE_CHECKING:
    from slm.data import Prepared
    from slm.data.inventory import Entry

Name = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A corpus, or the beginning of a folder's name.")
]


def list_data(as_json: Json = False) -> None:
    """List what is prepared, with sizes, fingerprints, and how many runs read it; unfinished preparations too."""
    from slm.data.inventory import entries
    from store import home

    found = entries(home())
    documents = [_summary(entry, home()) for entry in found]
    if as_json:
        print_json({"home": str(home()), "data": documents})
        return
    headers = (
        "folder",
        "tokens",
        "row",
        "vocab",
        "tokeniser",
        "validation",
        "on disk",
        "runs",
        "state",
    )
    print_table([_cells(document) for document in documents], headers)
    print(
        f"\n{len(found)} folders, {count(sum(entry.size for entry in found))}B in {home() / 'data'}"
    )


def _summary(entry: Entry, home: Path) -> dict[str, Any]:
    """What --json says of a folder."""
    from slm.data.inventory import plans_on

    own: dict[str, Any] = {"folder": str(entry.folder), "state": entry.state, "bytes": entry.size}
    if entry.prepared is None:
        return own
    manifest = entry.prepared.manifest
    own |= {"corpus": manifest["corpus"], "source": manifest["source"], "shape": manifest["shape"]}
    own |= {
        "tokenizer": manifest["tokenizer"],
        "given_tokenizer": manifest["given_tokenizer"] is not None,
    }
    for part in ("validation", "train"):
        rows = manifest[part]["rows"]
        own[part] = {
            "rows": rows,
            "tokens": rows * (manifest["row_tokens"] - 1),
            "files": len(manifest[part]["files"]),
        }
        own[part]["fingerprint"] = manifest[part]["fingerprint"]
    return own | {"runs": [plan.run_id for plan in plans_on(entry.prepared, home)]}


def _cells(own: dict[str, Any]) -> list[str | None]:
    name, size = Path(own["folder"]).name, f"{count(own['bytes'])}B"
    if "train" not in own:
        return [name, None, None, None, None, None, size, None, own["state"]]
    shape = own["shape"]
    cells = [
        name,
        count(own["train"]["tokens"]),
        f"{shape['sequence_length']:,}",
        f"{shape['vocab_size']:,}",
    ]
    return [
        *cells,
        own["tokenizer"],
        own["validation"]["fingerprint"],
        size,
        str(len(own["runs"])),
        own["state"],
    ]


def show(
    name: Name,
    depths: Annotated[
        str | None, typer.Option(help="Epochs that these depths would need: 2-8, or 4,8,12.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Other tokenisers to compare with: gpt2,cl100k_base,FILE.tiktoken."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a prepared corpus: what went into it, the depths it suffices for, its runs, how well it compresses."""
    from slm.data.inventory import named
    from store import home

    documents = []
    for entry in named(home(), name):
        document = _summary(entry, home())
        if entry.prepared:
            document["depths"] = [
                _depth(entry.prepared, given) for given in _asked(entry.prepared, depths)
            ]
            document["reach"] = _reach(entry.prepared)
            document["compression"] = _compression(
                entry.prepared, against.split(",") if against else []
            )
        documents.append(document)
    if as_json:
        print_json({"home": str(home()), "data": documents})
    else:
        print("\n\n".join("\n".join(_lines(document)) for document in documents))


def _asked(prepared: Prepared, depths: str | None) -> list[Hyperparameters]:
    """The models asked for. Raises ValueError where no recipe has rows of this shape."""
    from slm.data import recipe_for

    if depths is None:
        return []
    recipe = recipe_for(prepared.manifest["shape"])
    if recipe is None:
        raise ValueError(
            f"--depths {depths}: no recipe of slm has rows of this shape; `slm sweep FILE --dry-run` says"
        )
    return [RECIPES[recipe](depth) for depth in depths_of(depths)]


def _depth(prepared: Prepared, given: Hyperparameters) -> dict[str, Any]:
    """What a compute-optimal model would read."""
    return {
        "depth": given.depth,
        "tokens": given.tokens,
        "epochs": given.train_rows / prepared.train_rows,
    }


def _reach(prepared: Prepared) -> dict[str, Any] | None:
    """The deepest compute-optimal models that one epoch, and as many as are allowed, suffice for."""
    from slm.data import MAX_EPOCHS, recipe_for

    recipe = recipe_for(prepared.manifest["shape"])
    if recipe is None:
        return None
    needs = {
        depth: RECIPES[recipe](depth).train_rows / prepared.train_rows
        for depth in range(1, DEEPEST + 1)
    }
    deepest = {
        limit: max((d for d, need in needs.items() if need <= limit), default=None)
        for limit in (1, MAX_EPOCHS)
    }
    return {
        "recipe": recipe,
        "one_epoch": deepest[1],
        "most_epochs": MAX_EPOCHS,
        "at_most": deepest[MAX_EPOCHS],
    }


def _compression(prepared: Prepared, others: Sequence[str]) -> list[dict[str, Any]]:
    """Bytes a token on the validation text; of another tokeniser that is not at hand, why."""
    from slm.data import tokenizer_of
    from slm.data.inventory import bytes_per_token, validation_texts

    texts = validation_texts(prepared)
    rows = [
        _compressed(
            "its own", prepared.tokenizer.vocab_size, bytes_per_token(prepared.tokenizer, texts)
        )
    ]
    for name in others:
        try:
            other = tokenizer_of(name)
        except RuntimeError as error:
            rows.append(_compressed(name, None, None) | {"missing": str(error)})
        else:
            rows.append(_compressed(name, other.vocab_size, bytes_per_token(other, texts)))
    return rows


def _compressed(name: str, vocab_size: int | None, ratio: float | None) -> dict[str, Any]:
    return {"tokenizer": name, "vocab_size": vocab_size, "bytes_per_token": ratio}


def _lines(own: dict[str, Any]) -> list[str]:
    """A folder for people."""
    lines = [f"{own['folder']}: {own['state']}, {count(own['bytes'])}B"]
    if "train" not in own:
        way = {"of another version": "`slm data remove` frees its space"}
        return [*lines, f"  {way.get(own['state'], 'the same `slm data prepare` goes on with it')}"]
    corpus, train, validation, shape = own["corpus"], own["train"], own["validation"], own["shape"]
    lost = corpus["cropped_tokens"] + corpus["dropped_tokens"]
    lines += [
        f"  corpus {corpus['name']} from {own['source']}",
        f"  {corpus['documents']:,} documents of {corpus['tokens']:,} tokens; left out: {left_out(corpus)}",
        f"  {lost:,} tokens in no row ({lost / corpus['tokens']:.2%}): {corpus['cropped_tokens']:,} cropped, "
        f"{corpus['dropped_tokens']:,} dropped",
        f"  rows of {shape['sequence_length']:,} tokens, documents longer "
        f"{'cut into pieces' if shape['split_documents'] else 'cropped'}",
        f"  tokeniser {own['tokenizer']} of {shape['vocab_size']:,} tokens, "
        f"{'given' if own['given_tokenizer'] else 'trained on the corpus'}",
        f"  validation: {validation['rows']:,} rows, {validation['tokens']:,} tokens, {validation['fingerprint']}",
        f"  training: {train['rows']:,} rows, {train['tokens']:,} tokens in {train['files']:,} files, "
        f"{train['fingerprint']}",
        f"  read by {len(own['runs'])} runs of this home{': ' if own['runs'] else ''}{', '.join(own['runs'])}",
    ]
    return lines + _reach_lines(own) + _compression_lines(own["compression"])


def _reach_lines(own: dict[str, Any]) -> list[str]:
    reach, lines = own["reach"], []
    if reach:
        one, most = (
            f"depth {reach[key]}" if reach[key] else "no depth" for key in ("one_epoch", "at_most")
        )
        lines.append(
            f"  recipe {reach['recipe']}, compute-optimal: to {one} in one epoch, to {most} in {reach['most_epochs']}, "
            "the most that are read"
        )
    for row in own["depths"]:
        lines.append(
            f"    depth {row['depth']}: {count(row['tokens'])} tokens, {row['epochs']:.2f} epochs"
        )
    return lines


def _compression_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    if len(rows) == 1:
        return [f"  {rows[0]['bytes_per_token']:.3f} bytes a token on the validation text"]
    own = rows[0]["bytes_per_token"]
    cells: list[list[str | None]] = []
    for row in rows:
        ratio = row["bytes_per_token"]
        known = (
            [f"{row['vocab_size']:,}", f"{ratio:.3f}", f"{own / ratio:.2f}"]
            if ratio
            else [None] * 3
        )
        cells.append([row["tokenizer"], *known])
    drawn = table(cells, ("tokeniser", "vocab", "bytes a token", "tokens of its own"))
    return ["", drawn, *(f"not at hand: {row['missing']}" for row in rows if "missing" in row)]


def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="[CORPUS]", help="A corpus or folder; else all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash every row of what is prepared against its manifest; exit code 1 where something was changed."""
    from slm.data.inventory import entries, named
    from store import home

    found: dict[str, str | None] = {}
    for entry in named(home(), name) if name else entries(home()):
        if entry.prepared:
            report_line(f"verifying {entry.folder}")
            try:
                with ProgressBars() as bars:
                    entry.prepared.verify_all(bars.add("rows"))
            except (ValueError, OSError) as error:
                found[str(entry.folder)] = str(error)
            else:
                found[str(entry.folder)] = None
    if as_json:
        print_json({"home": str(home()), "problems": found})
    else:
        print(
            "\n".join(f"{folder}: {problem or 'whole'}" for folder, problem in found.items())
            or "nothing is prepared"
        )
    if any(found.values()):
        raise typer.Exit(1)


def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a prepared corpus, or what is left of a preparation; says first what that frees, and who read it."""
    import store
    from slm.data.inventory import named, plans_on
    from slm.data.inventory import remove as removed
    from slm.sweep import orchestrator as conduct

    home = store.home()
    found = named(home, name)
    if len(found) > 1:
        names = ", ".join(entry.folder.name for entry in found)
        raise ValueError(f"{name} is {len(found)} folders: name one of {names}")
    (entry,) = found
    runs = [plan.run_id for plan in plans_on(entry.prepared, home)] if entry.prepared else []
    with conduct.sweep_lock(home) as ours:
        if not ours:
            raise ValueError(
                f"{home} is being swept by process {conduct.sweep_process(home)}: `slm stop` first"
            )
        _refuse_read(home, runs)
        said = (
            f"; {len(runs)} runs read it, and can be evaluated again once it is prepared anew"
            if runs
            else ""
        )
        print(f"{entry.folder} ({entry.state}): {count(entry.size)}B{said}", file=sys.stderr)
        if not yes and not sys.stdin.isatty():
            raise ValueError("there is nobody to ask: --yes removes without asking")
        if not yes:
            typer.confirm(f"remove {entry.folder.name}?", abort=True, err=True)
        removed(entry)
    if as_json:
        print_json({"home": str(home), "folder": str(entry.folder), "bytes": entry.size})
    else:
        print(f"freed {count(entry.size)}B")


def _refuse_read(home: Path, runs: Sequence[str]) -> None:
    """Raise ValueError while a run at work reads the data."""
    from slm.monitor.status import run_states
    from slm.run import run_holder

    for folder, state in run_states([home / run_id for run_id in runs]).items():
        if run_holder(folder) or state.status in ("running", "queued"):
            raise ValueError(
                f"run {folder.name} is at work on it ({state.status}): `slm stop {folder.name}` first"
            )
