"""`slm sample`: text from a model of the family."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.evaluate import RunOrFile, weights_of
from slm.cli.options import Json, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from slm.data.tokenizer import Tokenizer


def sample(
    run: RunOrFile,
    prompt: Annotated[
        str, typer.Option(help="How the text begins; else a document of its own.")
    ] = "",
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens at most; it also ends where the context is full.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="Logits are divided by it; 0: always the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from so many likeliest tokens; else all.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Of the first sample; the others have the next.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Samples of the same prompt.")] = 1,
    as_json: Json = False,
) -> None:
    """Write text as a model goes on with it, token by token, until its document ends."""
    _check(prompt, temperature)
    from slm.model.sample import follow
    from slm.model.weights import device_at_hand, prepared_of
    from store import home

    weights = weights_of(run, home())
    tokenizer, length = (
        prepared_of(weights.plan, home()).tokenizer,
        weights.plan.hyperparameters.sequence_length,
    )
    read = [tokenizer.bos, *tokenizer.encode_batch([prompt], 1)[0]]
    if len(read) >= length:
        raise ValueError(
            f"--prompt: its {len(read):,} tokens fill the context of {length:,}: shorten it"
        )
    seeds: range = range(seed, seed + samples)
    made: list[list[int]] = [[] for _ in seeds]
    steps = islice(
        follow(weights.model(device_at_hand()), read, tokenizer.bos, seeds, temperature, top_k),
        tokens,
    )
    for piece in _pieces(prompt, seed, made, steps, tokenizer):
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        asked = {"prompt": prompt, "temperature": temperature, "top_k": top_k}
        rows = [_document(*own, tokenizer, tokens) for own in zip(seeds, made, strict=True)]
        print_json({"run_id": weights.plan.run_id, "step": weights.step, **asked, "samples": rows})


def _check(prompt: str, temperature: float) -> None:
    """Raise ValueError for what no model can be asked."""
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"--temperature {temperature}: 0 for the likeliest token, or a positive number"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("--prompt: it is not UTF-8")


def _pieces(
    prompt: str,
    seed: int,
    made: list[list[int]],
    steps: Iterator[list[int | None]],
    tokenizer: Tokenizer,
) -> Iterator[str]:
    """What is printed, while `made` fills: the first sample as it comes, the others after it."""
    from slm.model.sample import Text

    heading = "--- seed {}\n" if len(made) > 1 else ""
    yield heading.format(seed) + prompt
    text = Text(tokenizer)
    for drawn in steps:
        for own, token in zip(made, drawn, strict=True):
            own += [] if token is None else [token]
        yield text.add(drawn[0])
    yield text.close() + "\n"
    for number, own in enumerate(made[1:], 1):
        yield f"{heading.format(seed + number)}{prompt}{_text(own, tokenizer)}\n"


def _text(drawn: list[int], tokenizer: Tokenizer) -> str:
    """Text of a sample, without the token that ends it."""
    return tokenizer.decode([token for token in drawn if token != tokenizer.bos])


def _document(seed: int, drawn: list[int], tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """A sample, ended by its "document", by as many "tokens" as were asked for, or by the "context", which is full."""
    ended = (
        "document"
        if drawn[-1] == tokenizer.bos
        else "tokens"
        if len(drawn) == tokens
        else "context"
    )
    return {"seed": seed, "text": _text(drawn, tokenizer), "ended": ended, "tokens": drawn}
