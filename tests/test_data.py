"""From text to rows: content decides identity and order; nothing half-made is left; errors name their value."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from slm.data import Prepared, prepare, prepared_for
from slm.data.corpus import read_corpus
from slm.data.loader import Order, Rows, share
from slm.data.packing import pack, shuffled, split
from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.recipe import pocket

SMALL = replace(pocket, validation_tokens=2**11)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 documents of made-up words, as text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(300):
        draw = random.Random(number)
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 600)))
        (folder / f"{number}.txt").write_text(text)
    return folder


def rows_of(prepared: Prepared, name: str) -> np.ndarray:
    part = prepared.manifest[name]
    return np.fromfile(prepared.folder / f"{name}.bin", dtype=part["dtype"]).reshape(-1, part["row_tokens"])


def test_every_row_starts_with_bos_and_is_full(prepared: Prepared) -> None:
    for name in ("train", "validation"):
        rows = rows_of(prepared, name)
        assert rows.shape == (prepared.manifest[name]["rows"], 129)
        assert (rows[:, 0] == prepared.tokenizer.bos).all()
        assert rows.max() < pocket.vocab_size


def test_validation_text_is_never_trained_on(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    encode, bos = prepared.tokenizer.encode_batch, prepared.tokenizer.bos
    counted = prepared.manifest["corpus"]["validation_documents"]
    leading = read_corpus(str(folder)).documents[:counted]
    pieces = {piece.tobytes() for piece in split(encode(leading, 1), bos, 129, pieces=True) if len(piece) == 129}
    rows = rows_of(prepared, "train").astype(np.int64)
    assert len(pieces) > 5
    assert not pieces & {row.tobytes() for row in rows}


def test_file_names_and_order_do_not_matter(folder: Path, tmp_path: Path) -> None:
    first = prepare(str(folder), SMALL(2), tmp_path / "a").manifest
    for path in list(folder.iterdir()):
        path.rename(folder / f"renamed-{hash(path.name) % 1000}-{path.name}")
    second = prepare(str(folder), SMALL(2), tmp_path / "b").manifest
    for key in ("tokenizer", "train", "validation"):
        assert first[key] == second[key]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_format_gives_the_same_corpus(folder: Path, tmp_path: Path, suffix: str) -> None:
    texts = [path.read_text() for path in folder.iterdir()]
    other = tmp_path / "other"
    other.mkdir()
    if suffix == "jsonl":
        (other / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        parquet.write_table(pyarrow.table({"text": [*texts, None]}), other / "all.parquet")
    assert read_corpus(str(other)).fingerprint == read_corpus(str(folder)).fingerprint


def test_a_prepared_corpus_is_found_and_a_changed_one_is_not(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    again = prepared_for(str(folder), SMALL(3), tmp_path)
    assert again is not None
    assert again.folder == prepared.folder
    (folder / "0.txt").write_text("something else")
    assert prepared_for(str(folder), SMALL(2), tmp_path) is None


def test_an_interrupted_preparation_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dataclasses import replace; from slm.recipe import pocket;"
        "from slm.data import prepare;"
        "report = lambda line: (print(line, flush=True), line.startswith('packing') and time.sleep(60));"
        f"prepare({str(folder)!r}, replace(pocket, validation_tokens=2**11)(2), Path({str(tmp_path)!r}), report)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("packing") for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list((tmp_path / "data").glob("*/manifest.json"))
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [prepared.folder.name]


def test_an_interrupt_is_cleaned_up_at_once(folder: Path, tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("packing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), SMALL(2), tmp_path, interrupt)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no .txt"),
        ({"a.txt": " \n"}, "holds no text"),
        ({"a.txt": "some words only"}, "too few to hold some out"),
        ({"a.jsonl": "".join(f'{{"text": "word {n}"}}\n' for n in range(99))}, "holds only 3.. tokens"),
        ({"a.jsonl": '{"text": "x"}\nbroken\n'}, "a.jsonl, line 2"),
        ({"a.jsonl": '{"body": "x"}\n'}, "a.jsonl, line 1"),
        ({"a.parquet": "not parquet"}, "a.parquet: not readable"),
    ],
)
def test_what_is_no_corpus_is_one_error_that_names_it(tmp_path: Path, files: dict[str, str], named: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=named):
        prepare(str(folder), SMALL(2), tmp_path)


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        prepare("nowhere", SMALL(2), tmp_path)


def test_more_than_four_epochs_are_refused_with_both_numbers(prepared: Prepared) -> None:
    available = prepared.train_rows * 128
    with pytest.raises(ValueError, match=f"has {available:,}"):
        prepared.identity(pocket(2, ratio=4.5 * available / pocket(2).parameters.scaling))
    assert prepared.identity(pocket(2, ratio=3.5 * available / pocket(2).parameters.scaling)).epochs > 3


def test_only_the_blocks_that_a_horizon_reads_are_its_identity(prepared: Prepared) -> None:
    short = prepared.identity(pocket(2, steps=20))
    manifest = json.loads(json.dumps(prepared.manifest))
    manifest["train"]["blocks"][-1] = "changed"
    assert Prepared(prepared.folder, manifest).identity(pocket(2, steps=20)) == short
    manifest["train"]["blocks"][0] = "changed"
    assert Prepared(prepared.folder, manifest).identity(pocket(2, steps=20)) != short


documents = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=60)


@given(documents=documents, length=st.integers(2, 20), pieces=st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_but_what_it_counts(documents: list[list[int]], length: int, pieces: bool) -> None:
    split_up = list(split(documents, 0, length, pieces))
    rows = list(pack(split_up, length))
    assert all(len(row) == length and row[0] == 0 for row, _ in rows)
    kept = sum(len(row) for row, _ in rows) + sum(cropped for _, cropped in rows)
    left = sum(map(len, split_up)) - kept
    assert left >= 0
    assert not rows or left < length
    if pieces:
        assert all(len(piece) <= length for piece in split_up)


def test_pieces_of_a_long_document_do_not_follow_one_another() -> None:
    pieces = [np.full(5, number) for number in range(1000)]
    order = [int(piece[0]) for piece in shuffled(pieces)]
    assert sorted(order) == list(range(1000))
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 20
    assert order == [int(piece[0]) for piece in shuffled(pieces[::-1])]


def test_packing_prefers_the_longest_document_that_fits() -> None:
    lengths = [3, 5, 4, 8]
    rows = list(pack([np.full(size, size) for size in lengths], 8))
    assert [sorted(set(row.tolist())) for row, _ in rows] == [[8], [3, 5]]


def test_a_tokeniser_round_trips_any_text_and_is_stored_without_loss(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    text = "def f(x):\n\treturn 'naïve ☃ 12345' <|bos|>\r\n"
    ids = tokenizer.encode_batch([text], 1)[0]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos not in ids
    assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode())
    (tmp_path / "t.json").write_text(json.dumps(tokenizer.document()))
    assert Tokenizer.read(tmp_path / "t.json") == tokenizer


def test_training_the_tokeniser_twice_gives_the_same_one() -> None:
    texts = [Path(__file__).read_text()] * 2
    assert train_tokenizer(texts, 300).fingerprint == train_tokenizer(texts, 300).fingerprint


def test_the_order_is_a_permutation_of_each_block_and_of_each_epoch() -> None:
    order = Order(rows=1000, block_rows=256, seed=3)
    read = np.concatenate([order.step(step, 8) for step in range(250)])
    assert sorted(read[:256]) == list(range(256))
    assert sorted(read[:1000]) == sorted(read[1000:]) == list(range(1000))
    assert list(read[:1000]) != list(read[1000:])


def test_the_order_follows_from_seed_and_step_alone() -> None:
    forwards, backwards = Order(1000, 256, 3), Order(1000, 256, 3)
    steps = [forwards.step(step, 8).tolist() for step in range(200)]
    assert [backwards.step(step, 8).tolist() for step in reversed(range(200))] == steps[::-1]
    assert Order(5000, 256, 3).step(30, 8).tolist() == steps[30]
    assert Order(1000, 256, 4).step(30, 8).tolist() != steps[30]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_rows_of_a_step(ranks: int) -> None:
    rows = Order(1000, 256, 0).step(7, 8)
    shares = [share(rows, rank, ranks) for rank in range(ranks)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_targets_are_the_inputs_shifted_by_one(prepared: Prepared) -> None:
    rows = Rows(prepared.folder / "train.bin", 129, prepared.manifest["train"]["dtype"])
    ids, targets = rows.pair(np.array([0, 5]))
    assert ids.shape == targets.shape == (2, 128)
    assert (ids[:, 1:] == targets[:, :-1]).all()


def test_two_preparations_at_once_end_in_one_folder(folder: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from dataclasses import replace; from slm.recipe import pocket;"
        "from slm.data import prepare;"
        f"print(prepare({str(folder)!r}, replace(pocket, validation_tokens=2**11)(2), Path({str(tmp_path)!r})).folder)"
    )
    start = time.monotonic()
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(printed) == 1, time.monotonic() - start
    assert [str(path) for path in (tmp_path / "data").iterdir()] == list(printed)
