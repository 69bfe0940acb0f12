"""`slm data`: prepare, show, verify and remove corpora, and get the bundles of CORE tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from slm.cli.control import refuse_active, without_sweep
from slm.cli.options import (
    Json,
    RecipeName,
    TokenizerName,
    confirm,
    depths_of,
    numbers_of,
    print_json,
    print_result,
    recipe_of,
    table,
)
from slm.monitor.progress import ProgressBars, report_line
from slm.recipe import RECIPES, Hyperparameters, Recipe
from slm.text import count
from store import home

if TYPE_CHECKING:
    from slm.evaluate import bundle as bundles

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""nanochat's public bundle."""
CorpusName = Annotated[
    str,
    Argument(
        metavar="CORPUS",
        help="python, a folder of .txt, .md, .rst, .jsonl, .parquet, climbmix, fineweb-edu, "
        "or hf:OWNER/NAME.",
    ),
]
FAULTS = {
    "duplicates": "duplicates",
    "empty": "empty",
    "null": "null",
    "invalid_utf8": "repaired (invalid UTF-8)",
}
"""Labels of a corpus's counts of faulty documents."""
Name = Annotated[
    str, Argument(metavar="CORPUS", help="A corpus, or the beginning of a folder's name.")
]
HEADERS = (
    *("folder", "tokens", "row", "vocab", "tokeniser", "validation"),
    *("on disk", "runs", "state"),
)


def prepare(
    name: CorpusName = "python",
    recipe: RecipeName = None,
    tokens: Annotated[
        float | None,
        Option(help="Minimum tokens of a hub's corpus; default: horizon of the reference depth."),
    ] = None,
    tokenizer: TokenizerName = None,
    processes: Annotated[
        int | None, Option(min=1, help="Maximum processes; default: one per core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenise a corpus and pack it into rows for all runs; called again, resume or extend it."""
    from slm import data

    family = recipe_of(recipe)
    hp = family(family.reference_depth)
    if tokens is not None:
        (tokens,) = numbers_of("--tokens", str(tokens))
        hp = replace(hp, steps=ceil(tokens / hp.batch_tokens))
    given_tokenizer = data.tokenizer_of(tokenizer) if tokenizer else None
    dataset = data.prepare(name, hp, home(), report_line, processes, given_tokenizer)
    manifest = dataset.manifest
    if as_json:
        print_json({"folder": dataset.folder, "manifest": manifest})
        return
    train, validation = manifest["train"], manifest["validation"]
    corpus = manifest["corpus"]
    available = train["rows"] * (manifest["row_tokens"] - 1)
    lost = (corpus["cropped_tokens"] + corpus["dropped_tokens"]) / corpus["tokens"]
    print(f"corpus {dataset.name} for recipe {family.name}: {dataset.folder}")
    print(f"  {corpus['documents']:,} documents; left out: {faults(corpus)}")
    print(
        f"  {train['rows']:,} training rows ({available:,} tokens), "
        f"{lost:.2%} of the tokens in no row"
    )
    print(f"  {validation['rows']:,} validation rows, fingerprint {validation['fingerprint']}")
    if tokens and tokens > available:
        print(
            f"  the corpus has no more: {tokens:,.0f} tokens are {tokens / available:.2f} epochs "
            f"(at most {data.MAX_EPOCHS})"
        )


def faults(corpus: dict[str, int]) -> str:
    """Return the documents of a corpus that were left out or repaired, as text."""
    parts = [f"{corpus[name]:,} {label}" for name, label in FAULTS.items() if corpus[name]]
    return ", ".join(parts) or "none"


def core(
    source: Annotated[
        Path | None, Option("--from", help="A zip or folder; default: download nanochat's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Get the bundle of CORE's 22 tasks, check it, and store it under the hash of its files."""
    from slm.evaluate import bundle as bundles
    from slm.evaluate.download import download

    if source:
        bundle = bundles.install(source, home())
    else:
        with ProgressBars() as bars:
            archive = download(CORE_URL, home() / "data" / "core", bars.add("bytes"))
        bundle = bundles.install(archive, home())
        archive.unlink()
    _print_bundle(bundle, as_json)


def pocket_core(
    corpus: CorpusName = "python", recipe: RecipeName = None, as_json: Json = False
) -> None:
    """Make the pocket-core bundle from a corpus's held-out text: CORE tasks for small models."""
    from slm import data
    from slm.evaluate.pocket_core import bundle_of

    family = recipe_of(recipe)
    dataset = data.prepare(corpus, family(family.reference_depth), home(), report_line)
    _print_bundle(bundle_of(dataset, home()), as_json)


def _print_bundle(bundle: bundles.Bundle, as_json: bool) -> None:
    from slm.evaluate import bundle as bundles

    counts = {task.label: len(bundle.examples(task)) for task in bundle.tasks}
    name = f" ({bundle.name})" if bundle.name != bundles.CORE else ""
    print_result(
        as_json,
        {"bundle": bundle.id, "name": bundle.name, "folder": bundle.folder, "tasks": counts},
        f"bundle {bundle.id}{name}: {len(counts)} tasks, {sum(counts.values()):,} examples; "
        f"{bundle.folder}",
    )


def list_data(as_json: Json = False) -> None:
    """List prepared and unfinished data with sizes, fingerprints, and the number of their runs."""
    from slm.data.inventory import entries, summary

    folders = entries(home())
    documents = [summary(entry, home()) for entry in folders]
    if as_json:
        print_json({"home": home(), "data": documents})
        return
    print(table([_cells(document) for document in documents], HEADERS))
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
        str | None, Option(help="Show the epochs that these depths need: 2-8, or 4,8,12.")
    ] = None,
    against: Annotated[
        str | None, Option(help="Other tokenisers to compare with: gpt2,cl100k_base,FILE.tiktoken.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a prepared corpus: its documents, the depths it suffices for, its runs, compression."""
    from slm.candidates import MAX_DEPTH
    from slm.data import epochs, inventory, recipe_for

    documents = []
    for entry in inventory.find_entries(home(), name):
        document = inventory.summary(entry, home())
        if dataset := entry.dataset:
            name_of_recipe = recipe_for(dataset.manifest["shape"])
            recipe = RECIPES[name_of_recipe] if name_of_recipe else None
            rows = dataset.train_rows
            document["depths"] = [epochs.epochs(hp, rows) for hp in _models(recipe, depths)]
            document["reach"] = epochs.reach(recipe, rows, MAX_DEPTH) if recipe else None
            names = against.split(",") if against else []
            document["compression"] = inventory.compression(dataset, names)
        documents.append(document)
    text = "\n\n".join("\n".join(_lines(document)) for document in documents)
    print_result(as_json, {"home": home(), "data": documents}, text)


def _models(recipe: Recipe | None, depths: str | None) -> list[Hyperparameters]:
    """Return the compute-optimal models of --depths.

    Raises ValueError without a recipe.
    """
    if depths is None:
        return []
    if recipe is None:
        raise ValueError(
            f"--depths {depths}: no recipe of slm has rows of this shape; "
            "`slm sweep FILE --dry-run` shows the epochs of a declared experiment"
        )
    return [recipe(depth) for depth in depths_of(depths)]


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
    cells: list[dict[str, str | None]] = []
    missing = []
    for row in rows:
        ratio = row["bytes_per_token"]
        if not ratio:
            missing.append(f"not available: {row['missing']}")
        cells.append(
            {
                "tokeniser": row["tokenizer"],
                "vocab": f"{row['vocab_size']:,}" if ratio else None,
                "bytes per token": f"{ratio:.3f}" if ratio else None,
                "relative tokens": f"{reference / ratio:.2f}" if ratio else None,
            }
        )
    return ["", table(cells), *missing]


def verify(
    name: Annotated[
        str | None, Argument(metavar="[CORPUS]", help="A corpus or folder; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every row of prepared data with its manifest; exit code 1 if one was changed."""
    from slm.data.inventory import entries, find_entries

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
    lines = [f"{folder}: {problem or 'unchanged'}" for folder, problem in problems.items()]
    text = "\n".join(lines) or "no prepared data"
    print_result(as_json, {"home": home(), "problems": problems}, text)
    if any(problems.values()):
        raise Exit(1)


def remove(
    name: Name,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Remove prepared or unfinished data, after showing what that frees and which runs read it."""
    from slm.data import inventory

    matches = inventory.find_entries(home(), name)
    if len(matches) > 1:
        names = ", ".join(entry.folder.name for entry in matches)
        raise ValueError(f"{name} matches {len(matches)} folders: name one of {names}")
    (entry,) = matches
    runs = []
    if entry.dataset:
        runs = [plan.run_id for plan in inventory.plans_on(entry.dataset, home())]
    with without_sweep():
        refuse_active([home() / run_id for run_id in runs], "reads it and ")
        remark = ""
        if runs:
            remark = f"; {len(runs)} runs read it, and need it prepared again to be evaluated"
        size = count(entry.size)
        report_line(f"{entry.folder} ({entry.state}): {size}B{remark}")
        confirm(f"remove {entry.folder.name}?", yes)
        inventory.remove(entry)
    document = {"home": home(), "folder": entry.folder, "bytes": entry.size}
    print_result(as_json, document, f"freed {size}B")
