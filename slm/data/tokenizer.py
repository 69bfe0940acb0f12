"""Byte-level BPE: trained by `tokenizers`, stored as JSON, encoded by `tiktoken`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slm.files import fingerprint

if TYPE_CHECKING:
    import tiktoken

TOKENIZER = "tokenizer.json"
"""File of a tokeniser in a prepared folder."""
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"  # noqa: E501
"""GPT-4's split pattern with numbers in groups of at most two digits."""
BOS = "<|bos|>"
SPECIAL = (BOS, *(f"<|reserved_{i}|>" for i in range(1, 9)))
"""Special tokens, with ids after the text tokens: `<|bos|>` starts every document, and eight are
reserved for later training stages."""
DOCUMENT_STARTS = (BOS, "<|endoftext|>")
"""Tokens that may start a document: the first one that a tokeniser has."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of byte strings in merge order, followed by the special tokens."""

    tokens: tuple[bytes, ...]
    """Bytes of each text token, by id."""
    pattern: str = PATTERN
    """Pattern that splits a text before merges."""
    special: tuple[tuple[str, int], ...] = ()
    """Names and ids of the special tokens; empty for SPECIAL, with ids after the text tokens."""

    @cached_property
    def specials(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return dict(self.special) or {name: len(self.tokens) + i for i, name in enumerate(SPECIAL)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused ones between text and special tokens included."""
        return max(len(self.tokens), max(self.specials.values()) + 1)

    @cached_property
    def bos(self) -> int:
        """Id of the token that starts every document: `<|bos|>`, else `<|endoftext|>`."""
        return next(self.specials[name] for name in DOCUMENT_STARTS if name in self.specials)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the encoding."""
        return fingerprint(json.dumps(self.document(), sort_keys=True))

    @property
    def token_bytes(self) -> list[int]:
        """UTF-8 bytes of every token; 0 for special ones, which bits per byte leave out."""
        return [len(token) for token in self.tokens] + [0] * (self.vocab_size - len(self.tokens))

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding."""
        import tiktoken

        return tiktoken.Encoding(
            name=f"slm-{self.fingerprint}",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens=self.specials,
        )

    def encode(self, text: str) -> list[int]:
        """Return token ids without `<|bos|>`; special tokens written in the text are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """Encode as `encode` does, without the GIL.

        A text that is too much for the split pattern (a million blanks) is encoded in halves.
        """
        try:
            ids: NDArray[np.uint32] = self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            if len(text) < 2:
                raise
            half = len(text) // 2
            halves = [text[:half], text[half:]]
            ids = np.concatenate([self.encode_to_numpy(part) for part in halves])
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.encoding.decode(ids)

    def document(self) -> dict[str, Any]:
        """Return the tokeniser as JSON."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        special = self.special or SPECIAL
        return {"pattern": self.pattern, "special": special, "tokens": tokens}

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """Read a JSON document of `document`. Raises ValueError if the file holds none."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            tokens = tuple(base64.b64decode(token, validate=True) for token in document["tokens"])
            pairs = [] if document["special"] == list(SPECIAL) else document["special"]
            special = tuple((name, number) for name, number in pairs)
            return _check(cls(tokens, document["pattern"], special), str(path))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no tokeniser: {error}") from None


def tokenizer_of(name: str) -> Tokenizer:
    """Load a tokeniser from a .json or .tiktoken file, or tiktoken's encoding of this name.

    Files of tiktoken have no split pattern and get PATTERN. Raises ValueError for anything else,
    RuntimeError if tiktoken cannot download the encoding.
    """
    path = Path(name)
    if path.suffix not in (".json", ".tiktoken"):
        return _load_encoding(name)
    if not path.is_file():
        raise ValueError(f"--tokenizer {path}: no such file")
    return Tokenizer.read(path) if path.suffix == ".json" else _read_ranks(path)


def _read_ranks(path: Path) -> Tokenizer:
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise ValueError(f"--tokenizer {path}: no lines of token and rank ({error})") from None
    return _from_ranks(ranks, str(path), PATTERN, ())


def _load_encoding(name: str) -> Tokenizer:
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(
            f"--tokenizer {name}: no file (.json, .tiktoken), and not one of tiktoken's: "
            f"{', '.join(names)}"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        reason = type(error).__name__
        raise RuntimeError(
            f"{name}: tiktoken could not download it ({reason}): give a .json or .tiktoken file"
        ) from None
    special = tuple(sorted(encoding._special_tokens.items(), key=lambda pair: pair[1]))
    return _from_ranks(encoding._mergeable_ranks, name, encoding._pat_str, special)


def _from_ranks(
    ranks: dict[bytes, int], source: str, pattern: str, special: tuple[tuple[str, int], ...]
) -> Tokenizer:
    """Return the tokeniser of merge ranks. Raises ValueError unless they count from 0."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{source}: its ranks do not count from 0 to {len(ranks) - 1}")
    tokens = tuple(sorted(ranks, key=ranks.__getitem__))
    return _check(Tokenizer(tokens, pattern, special), source)


def _check(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """Return a tokeniser. Raises ValueError unless it can encode and start any document."""
    missing = {bytes([value]) for value in range(256)} - {*tokenizer.tokens}
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} single bytes are no tokens, "
            "so some texts could not be encoded"
        )
    if not tokenizer.specials.keys() & DOCUMENT_STARTS:
        raise ValueError(
            f"{source}: it has none of {' and '.join(DOCUMENT_STARTS)}, "
            "one of which starts every document"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE of `vocab_size` tokens, special ones included.

    Raises ValueError if the texts hold too few merges.
    """
    from tokenizers import Regex
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer

    text_tokens = vocab_size - len(SPECIAL)
    if text_tokens < 256:
        raise ValueError(
            f"vocab_size {vocab_size}: 256 bytes and {len(SPECIAL)} special tokens do not fit"
        )
    trainable = Trainable(BPE())
    split = Split(Regex(PATTERN), behavior="isolated")
    trainable.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = ByteLevel.alphabet()
    trainable.train_from_iterator(
        texts, BpeTrainer(vocab_size=text_tokens, initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary = trainable.get_vocab()
    if len(vocabulary) < text_tokens:
        raise ValueError(
            f"vocab_size {vocab_size}: the text holds only {len(vocabulary) + len(SPECIAL)} tokens"
        )
    byte_of = _byte_by_character()
    tokens = [bytes([value]) for value in range(256)]
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        if len(token) > 1:
            tokens.append(bytes(byte_of[character] for character in token))
    return Tokenizer(tuple(tokens))


def _byte_by_character() -> dict[str, int]:
    """Return GPT-2's printable characters for bytes.

    Printable bytes are their own character, the others get characters from U+0100 on, in order.
    """
    characters: dict[str, int] = {}
    unprintable = []
    for value in range(256):
        if chr(value).isprintable() and chr(value) != " ":
            characters[chr(value)] = value
        else:
            unprintable.append(value)
    return characters | {chr(256 + i): value for i, value in enumerate(unprintable)}
