"""Byte-level BPE: trained by `tokenizers`, stored as JSON, encoded by `tiktoken`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's split pattern with numbers in groups of at most two digits."""

BOS = "<|bos|>"
SPECIAL = (BOS, *(f"<|reserved_{i}|>" for i in range(1, 9)))
"""`<|bos|>` starts every document; eight are kept for later training stages. Their ids follow the text tokens'."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of byte strings in merge order, then the special tokens."""

    tokens: tuple[bytes, ...]
    """The bytes of each text token; a token's place is its id."""

    @property
    def vocab_size(self) -> int:
        """Text and special tokens."""
        return len(self.tokens) + len(SPECIAL)

    @property
    def bos(self) -> int:
        """Id of `<|bos|>`."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the encoding."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def token_bytes(self) -> list[int]:
        """UTF-8 bytes of every token; 0 for the special ones, which bits per byte leave out."""
        return [len(token) for token in self.tokens] + [0] * len(SPECIAL)

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding."""
        import tiktoken

        return tiktoken.Encoding(
            name=f"slm-{self.fingerprint}",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={name: self.bos + i for i, name in enumerate(SPECIAL)},
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without `<|bos|>`; special tokens written in it are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Token ids of each text, without `<|bos|>`; special tokens written in a text are plain text."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self.encoding.decode(list(ids))

    def document(self) -> dict[str, Any]:
        """The tokeniser as JSON."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return {"pattern": PATTERN, "special": list(SPECIAL), "tokens": tokens}

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """The tokeniser in a file that `document` filled. Raises ValueError for another pattern."""
        document = json.loads(path.read_text())
        if document["pattern"] != PATTERN or document["special"] != list(SPECIAL):
            raise ValueError(f"{path}: a tokeniser with another split pattern or other special tokens")
        return cls(tuple(base64.b64decode(token) for token in document["tokens"]))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE of `vocab_size` tokens, special ones included. Raises ValueError when the texts hold too few merges."""
    from tokenizers import Regex
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    text_tokens = vocab_size - len(SPECIAL)
    if text_tokens < 256:
        raise ValueError(f"vocab_size {vocab_size}: 256 bytes and {len(SPECIAL)} special tokens do not fit")
    trainable = Trainable(BPE())
    split = Split(Regex(PATTERN), behavior="isolated")
    trainable.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = ByteLevel.alphabet()
    trainable.train_from_iterator(
        texts, BpeTrainer(vocab_size=text_tokens, initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary = trainable.get_vocab()
    if len(vocabulary) < text_tokens:
        raise ValueError(f"vocab_size {vocab_size}: the text holds only {len(vocabulary) + len(SPECIAL)} tokens")
    characters = _byte_of_character()
    learned = sorted((rank, token) for token, rank in vocabulary.items() if len(token) > 1)
    merged = [bytes(characters[character] for character in token) for _, token in learned]
    return Tokenizer((*(bytes([value]) for value in range(256)), *merged))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable bytes stand for themselves, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}
