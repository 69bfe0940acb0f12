"""Text from a model, token by token: what was read stays as keys and values, so that a token costs one token's work."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.data.tokenizer import Tokenizer
from slm.model.gpt import GPT


class Context:
    """Rows of tokens that a model has read so far, of one length for all, as far as later tokens look back on them.

    Every layer keeps all T places, and short windows look at their share of them.
    """

    def __init__(self, model: GPT, rows: int) -> None:
        given, dtype = model.given, model.dtype
        self.length = 0
        """Tokens that each row holds."""
        self._model = model
        places = (given.depth, rows, given.heads, given.sequence_length, given.head_dim)
        self._keys, self._values = (model.wte.new_zeros(places, dtype=dtype) for _ in range(2))
        self._last = model.wte.new_zeros((rows, 1, given.width), dtype=dtype)

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V), soft-capped, of what follows the token ids (B, n), which are read first."""
        return self._model.capped(self.read(ids)[:, -1])

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """The stream (B, n, d) that the head reads, of token ids (B, n) after those that were read before."""
        model = self._model
        assert self.length + ids.size(1) <= model.given.sequence_length
        places = slice(self.length, self.length + ids.size(1))
        embedded = torch.cat([self._last, model.embedded(ids)], dim=1)
        stream = model.stream(ids, model.smeared(embedded)[:, 1:], places, self._attended)
        self._last = embedded[:, -1:]
        self.length += ids.size(1)
        return stream

    def _attended(self, layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        """Attention (B, n, d) of new tokens over themselves and those before, within the layer's window."""
        window, start, stop = (
            self._model.given.windows[layer],
            self.length,
            self.length + query_key.size(1),
        )
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        self._keys[layer, :, :, start:stop] = key
        self._values[layer, :, :, start:stop] = values.transpose(1, 2)
        first = max(0, start - window)
        place = torch.arange(first, stop, device=query.device)
        before = place[start - first :, None] - place
        attended = F.scaled_dot_product_attention(
            query,
            self._keys[layer, :, :, first:stop],
            self._values[layer, :, :, first:stop],
            attn_mask=(before >= 0) & (before <= window),
        )
        return attended.transpose(1, 2).flatten(2)


@torch.inference_mode()
def follow(
    model: GPT,
    prompt: Sequence[int],
    end: int,
    seeds: Sequence[int],
    temperature: float,
    top_k: int | None,
) -> Iterator[list[int | None]]:
    """The next token of every sample, one a seed, again and again; None for a sample that has ended.

    Drawn are the ids up to `end`, the token that ends a sample, by `draw`; the same seed gives the same sample whatever
    the others are. It stops when all have ended, or when prompt and sample fill the context.
    """
    context, draws = (
        Context(model, len(seeds)),
        [torch.Generator().manual_seed(seed) for seed in seeds],
    )
    ended = [False] * len(seeds)
    logits = context.logits(torch.tensor([prompt] * len(seeds), device=model.wte.device))
    while context.length < model.given.sequence_length:
        chances = torch.cat([torch.rand(1, generator=own) for own in draws])
        drawn = draw(logits[:, : end + 1].cpu(), chances, temperature, top_k)
        yield [None if over else token for token, over in zip(drawn.tolist(), ended, strict=True)]
        ended = [over or token == end for token, over in zip(drawn.tolist(), ended, strict=True)]
        if all(ended):
            return
        logits = context.logits(drawn[:, None].to(logits.device))


def draw(logits: Tensor, chances: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """An id (B,) for each row of logits (B, V), by its chance (B,), float32 in [0, 1).

    Shares are softmax(logits / temperature) over the top_k greatest logits; temperature 0 takes the greatest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    least = logits.topk(min(top_k or logits.size(-1), logits.size(-1))).values[:, -1:]
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature
    sums = scores.masked_fill(logits < least, -torch.inf).softmax(-1).cumsum(-1)
    # A float32 below 1 is so far below it that the product stays below the last sum: a share of zero is never hit.
    return torch.searchsorted(sums, chances.double()[:, None] * sums[:, -1:], right=True).squeeze(
        -1
    )


class Text:
    """Tokens as text while they come: a character appears with the token that completes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int | None) -> str:
        """The characters that a token completes; special tokens and None have none."""
        if token is None or token >= self._tokenizer.bos:
            return ""
        return self._decoder.decode(self._tokenizer.tokens[token])

    def close(self) -> str:
        """What stands for a character that was begun and never completed."""
        return self._decoder.decode(b"", final=True)
