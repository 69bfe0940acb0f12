"""Corpora on a hub that speaks Hugging Face's protocol, prepared: as many of their files as a horizon needs.

A commit is pinned at the first preparation. One file is validation and never trained on; the tokeniser learns from the
first characters of the first training file; the others follow in the order of their names, each a shard. Files come
through `huggingface_hub` into its cache (HF_HOME, HF_ENDPOINT, HF_TOKEN), and are used only when they have the SHA-256
that the hub lists.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.data.builder import VALIDATION, Work
from slm.data.dataset import FORMAT, Prepared, of_source, row_shape
from slm.data.shards import File, fingerprint
from slm.data.tokenizer import Tokenizer
from slm.files import read_json, write_json
from slm.recipe import Hyperparameters

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

NAMED = {
    "climbmix": "hf:karpathy/climbmix-400b-shuffle",
    "fineweb-edu": "hf:karpathy/fineweb-edu-100b-shuffle",
}
"""Corpora by name. Their documents were shuffled before they were cut into files, so that the last is as good as any
for validation."""
SPELLING = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<folder>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?"
)
TOKENIZER_CHARACTERS = 2**26
"""Of the first training file the tokeniser learns from at most so many."""
ENDINGS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Shard:
    """A file of a hub's corpus."""

    repo: str
    """OWNER/NAME of the dataset."""
    revision: str
    """Commit."""
    path: str
    """Name in it."""
    size: int
    """Bytes."""
    sha256: str
    """Of its content; empty where the hub lists none."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Its texts, each once; the file is fetched first."""
        return File(self.fetched()).documents(counts)

    def fetched(self) -> Path:
        """The file in the cache, whole; what is damaged there is fetched once more.

        Raises RuntimeError, one line, where it cannot be had.
        """
        for again in (False, True):
            path = _download(self, again)
            if self._is_whole(path):
                return path
        raise RuntimeError(
            f"{self.repo}/{self.path}: what the hub sends is not what it lists (SHA-256 {self.sha256[:12]}…): try later"
        )

    def _is_whole(self, path: Path) -> bool:
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return self.sha256 in ("", hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Source:
    """A hub's corpus at one commit."""

    name: str
    """What it is called in results."""
    shards: tuple[Shard, ...]
    """Training files, in order."""
    validation: Shard
    """The file that validation reads."""


def is_hub(corpus: str) -> bool:
    """Whether a corpus is named as one of a hub."""
    return corpus in NAMED or corpus.startswith("hf:")


def known(
    corpus: str, given: Hyperparameters, tokenizer: Tokenizer | None, home: Path
) -> Prepared | None:
    """What was prepared of a corpus for a shape."""
    return next(iter(of_source(home, corpus, given, tokenizer)), None)


def suffices(prepared: Prepared, given: Hyperparameters) -> bool:
    """Whether there are rows for a horizon, or all that the hub has."""
    return prepared.train_rows >= given.train_rows or len(prepared.files("train")) == len(
        _kept(prepared).shards
    )


def source(corpus: str, given: Hyperparameters, tokenizer: Tokenizer | None, home: Path) -> Source:
    """A corpus as it was pinned, or as the hub has it now.

    Raises ValueError for a name that is none, RuntimeError where the hub does not give it.
    """
    before = known(corpus, given, tokenizer, home)
    return _kept(before) if before else _listed(corpus)


def folder(
    corpus: str, found: Source, given: Hyperparameters, tokenizer: Tokenizer | None, home: Path
) -> Path:
    """Where a preparation goes."""
    own = [tokenizer.fingerprint] if tokenizer else []
    key = fingerprint(
        json.dumps([FORMAT, corpus, asdict(found.validation), row_shape(given), *own]).encode()
    )
    return home / "data" / f"{found.name}-{key}"


def fill(work: Work, found: Source) -> None:
    """Prepare as many files as the horizon needs, some more each time, until there are rows enough or no more files."""
    of = fingerprint(
        json.dumps([FORMAT, found.validation.repo, found.validation.revision]).encode()
    )
    write_json(work.folder / f"source-{of}.json", asdict(found))
    validation = _first(work, found)
    files = work.before.files("train") if work.before else []
    while (rows := sum(file["rows"] for file in files)) < work.given.train_rows and len(
        files
    ) < len(found.shards):
        more = math.ceil((work.given.train_rows - rows) * len(files) / rows) if rows else 1
        shards = found.shards[len(files) : len(files) + more]
        work.report(
            f"fetching {len(shards):,} files of {work.name}, {sum(own.size for own in shards) / 1e9:.3g} GB"
        )
        files = [*files, *work.pack(shards, len(files), of)]
    work.finish(validation, files, {}, of)


def _listed(corpus: str) -> Source:
    """What the hub has of a corpus now. Raises as `source` does."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repo, folder, revision = _spelt(corpus)
    with _asking(repo):
        api = HfApi()
        commit = str(api.dataset_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(
            repo, folder, recursive=True, revision=commit, repo_type="dataset"
        )
        files = sorted((own for own in tree if isinstance(own, RepoFile)), key=lambda own: own.path)
    found = [_shard(repo, commit, own) for own in files if own.path.endswith(ENDINGS)]
    if len(found) < 2:
        raise ValueError(
            f"corpus {corpus!r}: {len(found)} {' or '.join(ENDINGS)} files in it, and one is for validation: fetch "
            "them into a folder and prepare that, or name another folder of the dataset (hf:OWNER/NAME:FOLDER)"
        )
    return Source(
        corpus if corpus in NAMED else repo.partition("/")[2], tuple(found[:-1]), found[-1]
    )


def _spelt(corpus: str) -> tuple[str, str | None, str | None]:
    """Dataset, folder and revision of a name. Raises ValueError for one that is spelt otherwise."""
    found = SPELLING.fullmatch(NAMED.get(corpus, corpus))
    if not found:
        raise ValueError(
            f"corpus {corpus!r}: write hf:OWNER/NAME, hf:OWNER/NAME:FOLDER, and @REVISION behind it"
        )
    return found["repo"], found["folder"], found["revision"]


def _shard(repo: str, commit: str, file: RepoFile) -> Shard:
    return Shard(repo, commit, file.path, file.size, file.lfs.sha256 if file.lfs else "")


def _download(shard: Shard, again: bool) -> Path:
    """A file's place in the cache, fetched where it is not there; `again`: fetched in any case."""
    from huggingface_hub import hf_hub_download

    with _asking(f"{shard.repo}/{shard.path}"):
        return Path(
            hf_hub_download(
                shard.repo,
                shard.path,
                repo_type="dataset",
                revision=shard.revision,
                force_download=again,
            )
        )


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Make one line of what the hub answers. Raises ValueError where it does not know it, RuntimeError else."""
    from huggingface_hub import errors

    try:
        yield
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            why = str(error.__cause__ or error).splitlines()[0]
            raise RuntimeError(f"{what}: {why}; try again, what was fetched is kept") from None
        raise ValueError(
            f"{what}: the hub has no such dataset or revision, or HF_TOKEN may not read it"
        ) from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        why = str(error).strip().splitlines()[0]
        raise RuntimeError(f"{what}: {why}; try again, what was fetched is kept") from None


def _first(work: Work, found: Source) -> dict[str, Any]:
    """Tokeniser and validation rows, once."""
    if work.before:
        return work.before.files("validation")[0]
    kept = work.folder / VALIDATION
    if not kept.exists():
        work.report(
            f"fetching the first of {len(found.shards):,} files of {work.name}, and the one for validation"
        )
        if work.tokenizer:
            work.take(work.tokenizer)
        else:
            work.learn(list(_leading(found.shards[0])))
        counts: Counter[str] = Counter()
        write_json(kept, work.validate(found.validation.documents(counts), counts))
    return read_json(kept)


def _leading(shard: Shard) -> Iterator[str]:
    """The first texts of a file, as many as the tokeniser learns from."""
    left = TOKENIZER_CHARACTERS
    for text in shard.documents(Counter()):
        left -= len(text)
        if left < 0:
            return
        yield text


def _kept(prepared: Prepared) -> Source:
    """The source of a prepared corpus."""
    document = read_json(prepared.folder / f"source-{prepared.manifest['of']}.json")
    shards = tuple(Shard(**own) for own in document["shards"])
    return Source(document["name"], shards, Shard(**document["validation"]))
