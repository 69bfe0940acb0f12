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
        help="python, a folder of .txt, .md, .rst, .jsonl, .parquet, climbmix, fineweb-edu, or hf:OWNER/NAME.",
    ),
]
LEFT_OUT = {
    "duplicates": "duplicates",
    "empty": "empty",
    "null": "null",
    "invalid_utf8": "mended (no UTF-8)",
}
"""What is counted of documents that are not what they should be, in words."""


def prepare(
    name: CorpusName = "python",
    recipe: RecipeName = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            help="Of a hub's corpus, at least so many, else the reference depth's horizon."
        ),
    ] = None,
    tokenizer: TokenizerName = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="At work at once; else one a core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokenise a corpus and pack it into rows that every run shares; typed again, go on or add what is new."""
    from slm import data
    from store import home

    family = recipe_of(recipe)
    given = family(family.reference_depth)
    if tokens is not None:
        (tokens,) = numbers_of("--tokens", str(tokens))
        given = replace(given, steps=ceil(tokens / given.batch_tokens))
    own = data.tokenizer_of(tokenizer) if tokenizer else None
    prepared = data.prepare(name, given, home(), report_line, processes, own)
    manifest = prepared.manifest
    if as_json:
        print_json({"folder": str(prepared.folder), "manifest": manifest})
        return
    train, validation = manifest["train"], manifest["validation"]
    corpus, there = manifest["corpus"], train["rows"] * (manifest["row_tokens"] - 1)
    print(f"corpus {corpus['name']} for recipe {family.name}: {prepared.folder}")
    print(f"  {corpus['documents']:,} documents; left out: {left_out(corpus)}")
    lost = corpus["cropped_tokens"] + corpus["dropped_tokens"]
    print(
        f"  {train['rows']:,} training rows ({there:,} tokens), {lost / corpus['tokens']:.2%} of the tokens in none"
    )
    print(f"  {validation['rows']:,} validation rows, fingerprint {validation['fingerprint']}")
    if tokens and tokens > there:
        print(
            f"  all there is: {tokens:,.0f} tokens are {tokens / there:.2f} epochs (at most {data.MAX_EPOCHS} are read)"
        )


def left_out(corpus: dict[str, int]) -> str:
    """What was left out of a corpus, or mended, in words."""
    return (
        ", ".join(f"{corpus[name]:,} {word}" for name, word in LEFT_OUT.items() if corpus[name])
        or "none"
    )


def core(
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A zip or folder that is there; else nanochat's is downloaded."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Get the bundle of CORE's 22 tasks: checked, and kept under the hash of the files that CORE reads."""
    from slm.evaluate import bundle
    from slm.evaluate.download import download
    from store import home

    if source:
        got = bundle.install(source, home())
    else:
        with ProgressBars() as bars:
            fetched = download(CORE_URL, home() / "data" / "core", bars.add("bytes"))
        got = bundle.install(fetched, home())
        fetched.unlink()
    _print_bundle(got, as_json)


def pocket_core(
    corpus: CorpusName = "python", recipe: RecipeName = None, as_json: Json = False
) -> None:
    """Make the bundle of pocket-core of a corpus's held-out text: CORE's types of task for small models."""
    from slm import data
    from slm.evaluate import pocket_core as pocket
    from store import home

    family = recipe_of(recipe)
    prepared = data.prepare(corpus, family(family.reference_depth), home(), report_line)
    _print_bundle(pocket.bundle_of(prepared, home()), as_json)


def _print_bundle(got: Bundle, as_json: bool) -> None:
    from slm.evaluate.bundle import CORE

    counts = {task.label: len(got.examples(task)) for task in got.tasks}
    if as_json:
        print_json({"bundle": got.id, "name": got.name, "folder": str(got.folder), "tasks": counts})
        return
    named = f" ({got.name})" if got.name != CORE else ""
    print(
        f"bundle {got.id}{named}: {len(counts)} tasks, {sum(counts.values()):,} examples; {got.folder}"
    )
