"""Corpora on a hub with Hugging Face's protocol: as many of their files as a horizon needs.

The first preparation pins a commit. One file is validation and never trained on; the tokeniser
learns from the beginning of the first training file; the other files follow by name, one shard
each. `huggingface_hub` downloads files into its cache (HF_HOME, HF_ENDPOINT, HF_TOKEN), and only
files with the SHA-256 that the hub lists are used.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slm.data.builder import TOKENIZER_CHARACTERS, VALIDATION, DatasetBuilder, Report
from slm.data.corpus import unique_texts_of
from slm.data.dataset import FORMAT, DatasetRequest, PreparedDataset, row_shape
from slm.files import fingerprint, read_json, sha256_of, write_json

NAMED = {
    "climbmix": "hf:karpathy/climbmix-400b-shuffle",
    "fineweb-edu": "hf:karpathy/fineweb-edu-100b-shuffle",
}
"""Corpora by name. Their documents were shuffled before they were cut into files, so that the last
file is as good as any for validation."""
ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<folder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?"
)
ENDINGS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Shard:
    """A file of a hub's corpus."""

    repo: str
    """OWNER/NAME of the dataset."""
    revision: str
    """Commit."""
    path: str
    """Path in the dataset."""
    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of its content; empty if the hub lists none."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Download the file, and yield its texts without duplicates."""
        return unique_texts_of(self.download(), counts)

    def download(self) -> Path:
        """Return the complete file in the cache; a damaged one is downloaded once more.

        Raises RuntimeError, one line, if that fails.
        """
        from huggingface_hub import hf_hub_download

        for again in (False, True):
            with _translate_errors(f"{self.repo}/{self.path}"):
                file = hf_hub_download(
                    self.repo,
                    self.path,
                    repo_type="dataset",
                    revision=self.revision,
                    force_download=again,
                )
            path = Path(file)
            if path.stat().st_size == self.size and self.sha256 in ("", sha256_of(path)):
                return path
        raise RuntimeError(
            f"{self.repo}/{self.path}: the download does not have the SHA-256 that the hub lists "
            f"({self.sha256[:12]}…): try later"
        )


@dataclass(frozen=True)
class Source:
    """A hub's corpus at one commit."""

    name: str
    """Name of the corpus in results."""
    shards: tuple[Shard, ...]
    """Training files, in order."""
    validation: Shard
    """File of the validation rows."""


def is_hub(corpus: str) -> bool:
    """Whether a corpus is on a hub."""
    return corpus in NAMED or corpus.startswith("hf:")


class HubCorpus:
    """The corpus of a request on a hub. The hub is contacted only to prepare it."""

    def __init__(self, request: DatasetRequest) -> None:
        self._request = request
        self.source = request.corpus
        self.dataset: PreparedDataset | None = next(iter(request.datasets(self.source)), None)

    def is_complete(self, dataset: PreparedDataset) -> bool:
        """Whether a dataset has rows for the horizon, or all that the hub has."""
        if dataset.train_rows >= self._request.hp.train_rows:
            return True
        return len(dataset.files("train")) == len(_pinned(dataset).shards)

    @cached_property
    def files(self) -> Source:
        """The corpus as it was pinned, or as it is now.

        Raises ValueError for an invalid name, RuntimeError if the hub does not deliver it.
        """
        return _pinned(self.dataset) if self.dataset else _list_files(self.source)

    @property
    def name(self) -> str:
        """Name of the corpus in results."""
        return self.files.name

    def folder(self, report: Report) -> Path:
        """Return the folder to prepare."""
        validation = asdict(self.files.validation)
        return self._request.folder(self.name, self.source, validation, row_shape(self._request.hp))

    def fill(self, builder: DatasetBuilder) -> None:
        """Prepare files until there are rows for the horizon, or no more files."""
        pinned = self.files
        key = [FORMAT, pinned.validation.repo, pinned.validation.revision]
        of = fingerprint(json.dumps(key))
        validation = _first(builder, pinned)
        files = builder.previous.files("train") if builder.previous else []
        required = builder.hp.train_rows
        while len(files) < len(pinned.shards):
            rows = sum(file["rows"] for file in files)
            if rows >= required:
                break
            # The rows per file so far say how many more files are needed.
            more = math.ceil((required - rows) * len(files) / rows) if rows else 1
            shards = pinned.shards[len(files) : len(files) + more]
            size = sum(shard.size for shard in shards) / 1e9
            builder.report(f"fetching {len(shards):,} files of {builder.name}, {size:.3g} GB")
            files += builder.pack_shards(shards, len(files), of)
        builder.finish(validation, files, {}, of, asdict(pinned))


def _pinned(dataset: PreparedDataset) -> Source:
    """Return the source that a dataset was prepared from."""
    document = dataset.source
    shards = tuple(Shard(**shard) for shard in document["shards"])
    return Source(document["name"], shards, Shard(**document["validation"]))


def _list_files(corpus: str) -> Source:
    """Return the files that the hub has now. Raises as `HubCorpus.files` does."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    match = ADDRESS.fullmatch(NAMED.get(corpus, corpus))
    if not match:
        raise ValueError(
            f"corpus {corpus!r}: write hf:OWNER/NAME, hf:OWNER/NAME:FOLDER, and @REVISION behind it"
        )
    repo, folder, revision = match["repo"], match["folder"], match["revision"]
    with _translate_errors(repo):
        api = HfApi()
        commit = str(api.dataset_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(
            repo, folder, recursive=True, revision=commit, repo_type="dataset"
        )
        files = [file for file in tree if isinstance(file, RepoFile)]
    shards = [
        Shard(repo, commit, file.path, file.size, file.lfs.sha256 if file.lfs else "")
        for file in sorted(files, key=lambda file: file.path)
        if file.path.endswith(ENDINGS)
    ]
    if len(shards) < 2:
        raise ValueError(
            f"corpus {corpus!r}: {len(shards)} {' or '.join(ENDINGS)} files in it, but it needs "
            "two, one of them for validation: download them into a folder and prepare that, or "
            "name another folder of the dataset (hf:OWNER/NAME:FOLDER)"
        )
    name = corpus if corpus in NAMED else repo.partition("/")[2]
    return Source(name, tuple(shards[:-1]), shards[-1])


@contextmanager
def _translate_errors(subject: str) -> Iterator[None]:
    """Raise the hub's errors in one line: ValueError for unknown names, RuntimeError otherwise."""
    from huggingface_hub import errors

    cause: BaseException
    try:
        yield
        return
    except errors.LocalEntryNotFoundError as error:  # offline, and an EntryNotFoundError too
        cause = error.__cause__ or error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ):
        raise ValueError(
            f"{subject}: the hub has no such dataset or revision, or HF_TOKEN may not read it"
        ) from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        cause = error
    reason = str(cause).strip().splitlines()[0]
    raise RuntimeError(
        f"{subject}: {reason}; try again, downloads resume where they stopped"
    ) from None


def _first(builder: DatasetBuilder, pinned: Source) -> dict[str, Any]:
    """Make tokeniser and validation rows if there are none yet; return the rows' entry."""
    if builder.previous:
        return builder.previous.files("validation")[0]
    entry = builder.folder / VALIDATION
    if not entry.exists():
        builder.report(
            f"fetching the first of {len(pinned.shards):,} files of {builder.name}, "
            "and the one for validation"
        )
        builder.make_tokenizer(_first_texts(pinned.shards[0]))
        counts: Counter[str] = Counter()
        texts = pinned.validation.documents(counts)
        write_json(entry, builder.write_validation(texts, counts))
    return read_json(entry)


def _first_texts(shard: Shard) -> Iterator[str]:
    """Yield the first texts of a file, as many as the tokeniser learns from."""
    remaining = TOKENIZER_CHARACTERS
    for text in shard.documents(Counter()):
        remaining -= len(text)
        if remaining < 0:
            return
        yield text
