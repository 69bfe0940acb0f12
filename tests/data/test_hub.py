"""Corpora on a hub: as many files as a horizon needs, verified, the same after any fault."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from slm import data
from slm.data import hub as hubs
from slm.recipe import pocket
from tests import forked
from tests.commands import run, slm
from tests.hub import Hub, environment, serving

REPO = "someone/made-up-words"
FILES = 21
DOCUMENTS = 12
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
EXPERIMENT = f"""
from dataclasses import replace
from slm.experiment import Experiment
from slm.recipe import pocket

recipe = replace(pocket, validation_tokens=2**11)
experiment = Experiment("hub", (recipe,), (2,), steps=200, data="hf:{REPO}")
"""


def shard(number: int) -> bytes:
    """Return a Parquet file of DOCUMENTS of made-up words, an empty text, and a null."""
    draw = random.Random(number)
    texts = [
        " ".join(draw.choice(WORDS) for _ in range(draw.randint(50, 300))) for _ in range(DOCUMENTS)
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [*texts, "", None]}), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {f"shard_{number:05d}.parquet": shard(number) for number in range(FILES)} | {
        "README.md": b"words"
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub(REPO, dict(files))) as hub:
        yield hub


def print_manifest(home: Path, steps: int, processes: int, corpus: str) -> None:
    """Prepare a corpus and print its manifest, or exit with an error."""
    hp = replace(pocket, validation_tokens=2**11)(2, steps=steps)
    try:
        prepared = data.prepare(corpus, hp, home, report, processes)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(prepared.manifest))  # noqa: T201


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def prepare(
    hub: Hub, folder: Path, steps: int = 900, processes: int = 1, corpus: str = f"hf:{REPO}"
) -> subprocess.CompletedProcess[str]:
    """Prepare a corpus of a hub in another process."""
    changes = environment(hub, folder / "cache")
    return run(print_manifest, folder / "home", steps, processes, corpus, **changes)


def manifest(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def fingerprints(document: dict[str, Any]) -> tuple[str, str, str]:
    return (
        document["tokenizer"],
        document["validation"]["fingerprint"],
        document["train"]["fingerprint"],
    )


def test_a_horizon_fetches_the_files_it_needs_and_a_longer_one_adds_some(
    hub: Hub, tmp_path: Path
) -> None:
    short = manifest(prepare(hub, tmp_path, steps=20))
    fetched = {name for name, count in hub.requests.items() if count}
    used = len(short["train"]["files"])
    assert fetched == {
        *(f"shard_{number:05d}.parquet" for number in range(used)),
        "shard_00020.parquet",
    }
    assert used < FILES - 1
    hub.requests.clear()
    long = manifest(prepare(hub, tmp_path, steps=60))
    assert long["train"]["files"][:used] == short["train"]["files"]
    assert (long["tokenizer"], long["validation"]) == (short["tokenizer"], short["validation"])
    assert not {name for name, count in hub.requests.items() if count} & fetched
    hub.requests.clear()
    assert manifest(prepare(hub, tmp_path, steps=40)) == long
    assert not hub.requests


def test_download_faults_do_not_change_the_rows(hub: Hub, tmp_path: Path) -> None:
    quiet = manifest(prepare(hub, tmp_path / "quiet", processes=1))
    assert len(quiet["train"]["files"]) == FILES - 1
    hub.requests.clear()
    hub.busy["shard_00003.parquet"] = 1
    hub.cut["shard_00005.parquet"] = 1
    hub.damaged["shard_00007.parquet"] = 1
    faulty = manifest(prepare(hub, tmp_path / "faulty", processes=2))
    assert fingerprints(faulty) == fingerprints(quiet)
    assert (
        hub.requests["shard_00003.parquet"]
        == hub.requests["shard_00005.parquet"]
        == hub.requests["shard_00007.parquet"]
        == 2
    )


def print_download(name: str, size: int, digest: str) -> None:
    """Download a file and print its path."""
    print(hubs.Shard(REPO, "main", name, size, digest).download())  # noqa: T201


def test_an_interrupted_download_resumes(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * 2**23)
    with serving(Hub(REPO, {"a.parquet": content})) as hub:
        hub.cut["a.parquet"] = 1
        size, digest = len(content), hub.listed["a.parquet"]
        done = run(print_download, "a.parquet", size, digest, **environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).read_bytes() == content
        assert hub.requests["a.parquet"] == 2
        assert hub.sent["a.parquet"] < 1.2 * len(content)


def test_files_with_another_hash_than_listed_are_never_used(hub: Hub, tmp_path: Path) -> None:
    hub.damaged["shard_00002.parquet"] = 9
    done = prepare(hub, tmp_path, processes=1)
    assert done.returncode == 1
    assert (
        "shard_00002.parquet: the download does not have the SHA-256"
        in done.stderr.splitlines()[-1]
    )
    hub.damaged.clear()
    hub.requests.clear()
    assert len(manifest(prepare(hub, tmp_path))["train"]["files"]) == FILES - 1
    assert not hub.requests["shard_00000.parquet"]


def test_unknown_datasets_and_folders_are_one_line(hub: Hub, tmp_path: Path) -> None:
    for corpus, message in (
        ("hf:nobody/nothing", "ValueError: nobody/nothing: the hub has no such dataset"),
        ("hf:broken", "ValueError: corpus 'hf:broken': write hf:OWNER/NAME"),
        (f"hf:{REPO}:elsewhere", "0 .parquet or .jsonl files in it"),
    ):
        done = prepare(hub, tmp_path, corpus=corpus)
        assert message in done.stderr.splitlines()[-1], done.stderr


def test_an_unreachable_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = prepare(hub, tmp_path)
    assert done.stderr.splitlines()[-1].startswith(f"RuntimeError: {REPO}: ")
    assert len(done.stderr.splitlines()) == 1


def test_addresses_of_named_corpora_are_valid() -> None:
    assert all(hubs.ADDRESS.fullmatch(address) for address in hubs.NAMED.values())


def test_an_invalid_shard_is_named_and_the_others_are_kept(hub: Hub, tmp_path: Path) -> None:
    hub.put("shard_00006.parquet", b"no parquet" * 99)
    for _ in range(2):
        done = prepare(hub, tmp_path)
        assert done.returncode == 1
        assert "shard_00006.parquet: not readable as Parquet" in done.stderr.splitlines()[-1]
        (folder,) = (tmp_path / "home" / "data").iterdir()
        assert (folder / "train-00000.bin").stat().st_size
    assert hub.requests["shard_00000.parquet"] == 1


@pytest.mark.soak
def test_a_sweep_prepares_a_hub_corpus_itself(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub.py").write_text(EXPERIMENT)
    hub.busy["shard_00001.parquet"] = hub.cut["shard_00005.parquet"] = hub.damaged[
        "shard_00009.parquet"
    ] = 1
    done = forked.slm(
        "sweep",
        str(tmp_path / "hub.py"),
        home=tmp_path / "home",
        **environment(hub, tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert "1 of them read rows of hf:someone/made-up-words more than once" in done.stderr
    query = "select corpus, val_bpb, epochs from results"
    [row] = json.loads(slm("query", query, "--format", "json", home=tmp_path / "home").stdout)
    assert (row["corpus"], row["val_bpb"] > 0) == ("made-up-words", True)
    assert 1 < row["epochs"] < 4
    (path,) = (tmp_path / "home" / "data").glob("*/manifest.json")
    assert len(json.loads(path.read_text())["train"]["files"]) == FILES - 1
