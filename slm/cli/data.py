"""`slm data`: corpora, tokenisers and rows."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slm.cli.options import Json, RecipeName, print_json, recipe_of


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


def report_line(line: str) -> None:
    """Progress on standard error."""
    print(line, file=sys.stderr, flush=True)
