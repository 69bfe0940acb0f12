"""A hub's corpus: as many files as a horizon needs, whole or not at all, the same whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from slm.data import hub as hubs
from tests.conftest import slm
from tests.hub import Hub, environment, serving

REPO = "someone/made-up-words"
FILES = 21
DOCUMENTS = 12
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
PREPARE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from slm.data import prepare
from slm.recipe import pocket

if __name__ == "__main__":
    home, steps, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    given = replace(pocket, validation_tokens=2**11)(2, steps=steps)
    report = lambda line: print(line, file=sys.stderr, flush=True)
    try:
        print(json.dumps(prepare(sys.argv[4], given, home, report, processes).manifest))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


EXPERIMENT = f"""
from dataclasses import replace
from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment("hub", (replace(pocket, validation_tokens=2**11),), (2,), steps=200, data="hf:{REPO}")
"""


def shard(number: int) -> bytes:
    """A Parquet file of DOCUMENTS of made-up words, an empty one, and one that is null."""
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


def prepare(
    hub: Hub, folder: Path, steps: int = 900, processes: int = 1, corpus: str = f"hf:{REPO}"
) -> subprocess.CompletedProcess[str]:
    """Prepare a corpus of a hub in a process of its own."""
    command = [
        sys.executable,
        "-c",
        PREPARE,
        str(folder / "home"),
        str(steps),
        str(processes),
        corpus,
    ]
    env = {**os.environ, **environment(hub, folder / "cache")}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False
    )


def manifest(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def decided(document: dict[str, Any]) -> tuple[str, str, str]:
    return (
        document["tokenizer"],
        document["validation"]["fingerprint"],
        document["train"]["fingerprint"],
    )


def test_a_horizon_fetches_what_it_needs_and_a_longer_one_adds_to_it(
    hub: Hub, tmp_path: Path
) -> None:
    short = manifest(prepare(hub, tmp_path, steps=20))
    fetched = {name for name, count in hub.asked.items() if count}
    used = len(short["train"]["files"])
    assert fetched == {
        *(f"shard_{number:05d}.parquet" for number in range(used)),
        "shard_00020.parquet",
    }
    assert used < FILES - 1
    hub.asked.clear()
    long = manifest(prepare(hub, tmp_path, steps=60))
    assert long["train"]["files"][:used] == short["train"]["files"]
    assert (long["tokenizer"], long["validation"]) == (short["tokenizer"], short["validation"])
    assert not {name for name, count in hub.asked.items() if count} & fetched
    hub.asked.clear()
    assert manifest(prepare(hub, tmp_path, steps=40)) == long
    assert not hub.asked


def test_faults_on_the_way_change_nothing(hub: Hub, tmp_path: Path) -> None:
    quiet = manifest(prepare(hub, tmp_path / "quiet", processes=1))
    assert len(quiet["train"]["files"]) == FILES - 1
    hub.asked.clear()
    hub.busy["shard_00003.parquet"] = 1
    hub.cut["shard_00005.parquet"] = 1
    hub.damaged["shard_00007.parquet"] = 1
    faulty = manifest(prepare(hub, tmp_path / "faulty", processes=2))
    assert decided(faulty) == decided(quiet)
    assert (
        hub.asked["shard_00003.parquet"]
        == hub.asked["shard_00005.parquet"]
        == hub.asked["shard_00007.parquet"]
        == 2
    )


def test_a_download_that_was_cut_goes_on_where_it_ended(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 * 2**23)
    with serving(Hub(REPO, {"a.parquet": content})) as hub:
        hub.cut["a.parquet"] = 1
        fetch = f"""
from slm.data.hub import Shard
print(Shard({REPO!r}, "main", "a.parquet", {len(content)}, {hub.listed["a.parquet"]!r}).fetched())
"""
        env = {**os.environ, **environment(hub, tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", fetch], capture_output=True, text=True, env=env, check=True
        )
        assert Path(done.stdout.strip()).read_bytes() == content
        assert hub.asked["a.parquet"] == 2
        assert hub.sent["a.parquet"] < 1.2 * len(content)


def test_what_is_not_as_listed_is_never_used(hub: Hub, tmp_path: Path) -> None:
    hub.damaged["shard_00002.parquet"] = 9
    done = prepare(hub, tmp_path, processes=1)
    assert done.returncode == 1
    assert (
        "shard_00002.parquet: what the hub sends is not what it lists"
        in done.stderr.splitlines()[-1]
    )
    hub.damaged.clear()
    hub.asked.clear()
    assert len(manifest(prepare(hub, tmp_path))["train"]["files"]) == FILES - 1
    assert not hub.asked["shard_00000.parquet"]


def test_what_a_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    for corpus, said in (
        ("hf:nobody/nothing", "ValueError: nobody/nothing: the hub has no such dataset"),
        ("hf:broken", "ValueError: corpus 'hf:broken': write hf:OWNER/NAME"),
        (f"hf:{REPO}:elsewhere", "0 .parquet or .jsonl files in it"),
    ):
        done = prepare(hub, tmp_path, corpus=corpus)
        assert said in done.stderr.splitlines()[-1], done.stderr


def test_a_hub_that_is_away_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    done = prepare(hub, tmp_path)
    assert done.stderr.splitlines()[-1].startswith(f"RuntimeError: {REPO}: ")
    assert len(done.stderr.splitlines()) == 1


def test_named_corpora_are_spelt_right() -> None:
    assert all(hubs.SPELLING.fullmatch(spelt) for spelt in hubs.NAMED.values())


def test_a_shard_that_is_no_parquet_is_named_and_costs_no_other(hub: Hub, tmp_path: Path) -> None:
    hub.put("shard_00006.parquet", b"no parquet" * 99)
    for _ in range(2):
        done = prepare(hub, tmp_path)
        assert done.returncode == 1
        assert "shard_00006.parquet: not readable as Parquet" in done.stderr.splitlines()[-1]
        (kept,) = (tmp_path / "home" / "data").iterdir()
        assert (kept / "train-00000.bin").stat().st_size
    assert hub.asked["shard_00000.parquet"] == 1


def test_a_plan_becomes_runs_without_another_step(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub.py").write_text(EXPERIMENT)
    hub.busy["shard_00001.parquet"] = hub.cut["shard_00005.parquet"] = hub.damaged[
        "shard_00009.parquet"
    ] = 1
    done = slm(
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
    (found,) = (tmp_path / "home" / "data").glob("*/manifest.json")
    assert len(json.loads(found.read_text())["train"]["files"]) == FILES - 1
