"""`slm data`: corpora, tokenisers and rows, and the bundle of CORE."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from slm.cli.options import Json, RecipeName, print_json, recipe_of

CORE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""nanochat's public bundle."""
PAUSE_SECONDS = 5.0
"""Between two lines on how far something is."""


def prepare(
    corpus: Annotated[str, typer.Argument(help="python, or a folder of .txt, .jsonl, .parquet.")] = "python",
    recipe: RecipeName = None,
    as_json: Json = False,
) -> None:
    """Tokenise a corpus and pack it into rows that every run shares."""
    from slm import data
    from store import home

    family = recipe_of(recipe)
    prepared = data.prepare(corpus, family(family.reference_depth), home(), report_line)
    manifest = prepared.manifest
    if as_json:
        print_json({"folder": str(prepared.folder), "manifest": manifest})
        return
    train, validation = manifest["train"], manifest["validation"]
    tokens = train["rows"] * (train["row_tokens"] - 1)
    print(f"corpus {manifest['corpus']['name']} for recipe {family.name}: {prepared.folder}")
    print(f"  {manifest['corpus']['documents']:,} documents, {manifest['corpus']['duplicates']} duplicates left out")
    print(f"  {train['rows']:,} training rows ({tokens:,} tokens), {train['cropped_tokens']:,} tokens cropped")
    print(f"  {validation['rows']:,} validation rows, fingerprint {validation['fingerprint']}")


def core(
    source: Annotated[
        Path | None, typer.Option("--from", help="A zip or folder that is there; else nanochat's is downloaded.")
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
        fetched = download(CORE_URL, home() / "data" / "core", progress("bytes"))
        got = bundle.install(fetched, home())
        fetched.unlink()
    counts = {task.label: len(got.examples(task)) for task in got.tasks}
    if as_json:
        print_json({"bundle": got.id, "folder": str(got.folder), "tasks": counts})
        return
    print(f"bundle {got.id}: {len(counts)} tasks, {sum(counts.values()):,} examples; {got.folder}")


def progress(unit: str) -> Callable[[int, int], None]:
    """Says now and then how much is done, and how long the rest will take."""
    from slm.progress import duration

    began = said = time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > PAUSE_SECONDS:
            said = now
            report_line(f"{done:,} of {of:,} {unit}, {duration((now - began) / done * (of - done))} left")

    return report


def report_line(line: str) -> None:
    """Progress on standard error."""
    print(line, file=sys.stderr, flush=True)
