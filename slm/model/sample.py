"""Sampling: text from a model, token by token, with a key-value cache."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slm.data.tokenizer import Tokenizer
from slm.model.attention import masked
from slm.model.gpt import GPT


class KVCache:
    """Keys and values of the tokens that a model has read so far, in rows of equal length.

    Every layer stores all T positions; short windows read their share of them.
    """

    def __init__(self, model: GPT, rows: int) -> None:
        hp = model.hp
        self.length = 0
        """Tokens of each row."""
        self._model = model
        shape = (hp.depth, rows, hp.heads, hp.sequence_length, hp.head_dim)
        self._keys = model.wte.new_zeros(shape, dtype=model.dtype)
        self._values = torch.zeros_like(self._keys)
        self._last = model.wte.new_zeros((rows, 1, hp.width), dtype=model.dtype)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Read the token ids (B, n); return the soft-capped logits (B, V) of the next token."""
        return self._model.capped(self.read(ids)[:, -1])

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Read the token ids (B, n); return the stream (B, n, d) that the head reads."""
        model = self._model
        positions = slice(self.length, self.length + ids.size(1))
        assert positions.stop <= model.hp.sequence_length
        embedded = torch.cat([self._last, model.embedded(ids)], dim=1)
        x0 = model.smeared(embedded)[:, 1:]
        stream = model.stream(ids, x0, positions, self._attended)
        self._last = embedded[:, -1:]
        self.length = positions.stop
        return stream

    def _attended(self, layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        """Return attention (B, n, d) of new tokens over all tokens within the layer's window."""
        window = self._model.hp.windows[layer]
        start = self.length
        stop = start + query_key.size(1)
        first = max(0, start - window)
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        all_keys = self._keys[layer, :, :, :stop]
        all_values = self._values[layer, :, :, :stop]
        all_keys[:, :, start:] = key
        all_values[:, :, start:] = values.transpose(1, 2)
        attended = masked(query, all_keys[:, :, first:], all_values[:, :, first:], window)
        return attended.transpose(1, 2).flatten(2)


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Sequence[int],
    end: int,
    seeds: Sequence[int],
    temperature: float,
    top_k: int | None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every sample, one sample a seed; None for a sample that has ended.

    `draw` picks an id up to `end`, the token that ends a sample. A seed gives the same sample
    whatever the other seeds are. Generation stops when all samples have ended, or when prompt and
    sample fill the context.
    """
    cache = KVCache(model, len(seeds))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    ended = [False] * len(seeds)
    prompts = torch.tensor([prompt] * len(seeds), device=model.wte.device)
    logits = cache.logits(prompts)
    while cache.length < model.hp.sequence_length:
        chances = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        choices = logits[:, : end + 1].cpu()
        ids = draw(choices, chances, temperature, top_k)
        tokens = ids.tolist()
        yield [None if over else token for token, over in zip(tokens, ended, strict=True)]
        ended = [over or token == end for token, over in zip(tokens, ended, strict=True)]
        if all(ended):
            return
        logits = cache.logits(ids[:, None].to(logits.device))


def draw(logits: Tensor, chances: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Draw an id (B,) from each row of logits (B, V) by its chance (B,), float32 in [0, 1).

    The probabilities are softmax(logits / temperature) over the top_k greatest logits; temperature
    0 takes the greatest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(logits < least, -torch.inf)
    sums = scores.softmax(-1).cumsum(-1)
    # A float32 below 1 is so far below it that the product stays below the last sum: a probability
    # of zero is never drawn.
    targets = chances.double()[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(-1)


class TextStream:
    """Decodes tokens as they come: a character appears with the token that completes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int | None) -> str:
        """Return the characters that a token completes; none for special tokens and None."""
        if token is None or token >= self._tokenizer.bos:
            return ""
        return self._decoder.decode(self._tokenizer.tokens[token])

    def close(self) -> str:
        """Return the replacement of a character that was begun and never completed."""
        return self._decoder.decode(b"", final=True)
