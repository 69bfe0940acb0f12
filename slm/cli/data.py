"""`slm data`: corpora, tokenisers and rows, and the bundles of CORE and pocket-core."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.options import Json, RecipeName, TokenizerName, numbers_of, print_json, recipe_of
from slm.monitor.progress import ProgressBars, report_line

if TYPE_CHECKING:
    from slm.evaluate.bundle import Bundle

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""nanochat's public bundle."""
CorpusName = Annotated[
    str,
    typer.Argument(
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


def prepare(
    name: CorpusName = "python",
    recipe: RecipeName = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            help="Minimum tokens of a hub's corpus; default: horizon of the reference depth."
        ),
    ] = None,
    tokenizer: TokenizerName = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Maximum processes; default: one per core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenise a corpus and pack it into rows for all runs; called again, resume or extend it."""
    from slm import data
    from store import home

    family = recipe_of(recipe)
    hp = family(family.reference_depth)
    if tokens is not None:
        (tokens,) = numbers_of("--tokens", str(tokens))
        hp = replace(hp, steps=ceil(tokens / hp.batch_tokens))
    given_tokenizer = data.tokenizer_of(tokenizer) if tokenizer else None
    dataset = data.prepare(name, hp, home(), report_line, processes, given_tokenizer)
    manifest = dataset.manifest
    if as_json:
        print_json({"folder": str(dataset.folder), "manifest": manifest})
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
        Path | None,
        typer.Option("--from", help="A zip or folder; default: download nanochat's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Get the bundle of CORE's 22 tasks, check it, and store it under the hash of its files."""
    from slm.evaluate.bundle import install
    from slm.evaluate.download import download
    from store import home

    if source:
        bundle = install(source, home())
    else:
        with ProgressBars() as bars:
            archive = download(CORE_URL, home() / "data" / "core", bars.add("bytes"))
        bundle = install(archive, home())
        archive.unlink()
    _print_bundle(bundle, as_json)


def pocket_core(
    corpus: CorpusName = "python", recipe: RecipeName = None, as_json: Json = False
) -> None:
    """Make the pocket-core bundle from a corpus's held-out text: CORE tasks for small models."""
    from slm import data
    from slm.evaluate.pocket_core import bundle_of
    from store import home

    family = recipe_of(recipe)
    dataset = data.prepare(corpus, family(family.reference_depth), home(), report_line)
    _print_bundle(bundle_of(dataset, home()), as_json)


def _print_bundle(bundle: Bundle, as_json: bool) -> None:
    from slm.evaluate.bundle import CORE

    counts = {task.label: len(bundle.examples(task)) for task in bundle.tasks}
    if as_json:
        print_json(
            {
                "bundle": bundle.id,
                "name": bundle.name,
                "folder": str(bundle.folder),
                "tasks": counts,
            }
        )
        return
    name = f" ({bundle.name})" if bundle.name != CORE else ""
    print(
        f"bundle {bundle.id}{name}: {len(counts)} tasks, {sum(counts.values()):,} examples; "
        f"{bundle.folder}"
    )
