"""`slm sample`: text from a trained model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from slm.cli.evaluate import RunOrFile, weights_of
from slm.cli.options import Json, print_json
from store import home

if TYPE_CHECKING:
    from slm.data.tokenizer import Tokenizer


def sample(
    run: RunOrFile,
    prompt: Annotated[str, Option(help="Beginning of the text; default a new document.")] = "",
    tokens: Annotated[
        int, Option(min=1, help="Maximum tokens; a full context ends a sample, too.")
    ] = 256,
    temperature: Annotated[
        float, Option(help="Divides the logits; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, Option(min=1, help="Draw from the K likeliest tokens; default all.")
    ] = None,
    seed: Annotated[
        int, Option(min=0, max=2**62, help="Seed of the first sample; the next adds one.")
    ] = 0,
    samples: Annotated[int, Option(min=1, max=1000, help="Number of samples.")] = 1,
    as_json: Json = False,
) -> None:
    """Continue a prompt with text from a model, token by token, until the document ends."""
    _check(prompt, temperature)
    from slm.model.sample import generate
    from slm.model.weights import default_device, find_dataset

    # 1) the prompt as tokens
    weights = weights_of(run, home())
    tokenizer = find_dataset(weights.plan, home()).tokenizer
    length = weights.plan.hyperparameters.sequence_length
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    if len(ids) >= length:
        raise ValueError(
            f"--prompt: its {len(ids):,} tokens fill the context of {length:,}: shorten it"
        )
    # 2) draw and print
    seeds = range(seed, seed + samples)
    drawn: list[list[int]] = [[] for _ in seeds]
    model = weights.model(default_device())
    steps = islice(generate(model, ids, tokenizer.bos, seeds, temperature, top_k), tokens)
    for piece in _pieces(prompt, seeds, drawn, steps, tokenizer):
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print_json(
            {
                "run_id": weights.plan.run_id,
                "step": weights.step,
                "prompt": prompt,
                "temperature": temperature,
                "top_k": top_k,
                "samples": [
                    _document(seed, ids, tokenizer, tokens)
                    for seed, ids in zip(seeds, drawn, strict=True)
                ],
            }
        )


def _check(prompt: str, temperature: float) -> None:
    """Raise ValueError for a temperature or prompt that no model can use."""
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"--temperature {temperature}: 0 for the likeliest token, or a positive number"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError("--prompt: not UTF-8")


def _pieces(
    prompt: str,
    seeds: Sequence[int],
    drawn: list[list[int]],
    steps: Iterator[list[int | None]],
    tokenizer: Tokenizer,
) -> Iterator[str]:
    """Yield the text to print: the first sample while `drawn` fills, then the others."""
    from slm.model.sample import TextStream

    headings = [f"--- seed {seed}\n" if len(seeds) > 1 else "" for seed in seeds]
    yield headings[0] + prompt
    text = TextStream(tokenizer)
    for tokens in steps:
        for ids, token in zip(drawn, tokens, strict=True):
            if token is not None:
                ids.append(token)
        yield text.add(tokens[0])
    yield text.close() + "\n"
    for heading, ids in zip(headings[1:], drawn[1:], strict=True):
        yield f"{heading}{prompt}{_text(ids, tokenizer)}\n"


def _text(drawn: list[int], tokenizer: Tokenizer) -> str:
    """Decode a sample without the token that ends it."""
    return tokenizer.decode([token for token in drawn if token != tokenizer.bos])


def _document(seed: int, drawn: list[int], tokenizer: Tokenizer, tokens: int) -> dict[str, Any]:
    """Return a sample as JSON; `ended` says what ended it: "document", "tokens" or "context"."""
    ended = "context"
    if drawn[-1] == tokenizer.bos:
        ended = "document"
    elif len(drawn) == tokens:
        ended = "tokens"
    return {"seed": seed, "text": _text(drawn, tokenizer), "ended": ended, "tokens": drawn}
