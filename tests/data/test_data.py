"""From text to rows: content decides identity and order; nothing half-made is left; errors name their value."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from slm.data import Prepared, prepare, prepared_for, tokenizer_of
from slm.data import external_sort as buckets
from slm.data.builder import Work
from slm.data.corpus import texts_of
from slm.data.loader import Order, Rows, share
from slm.data.packing import pack, shuffled, split
from slm.data.prepare import alone
from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.recipe import pocket
from tests.deadly import Deadly

SMALL = replace(pocket, validation_tokens=2**11)
BLOCKS = [256, 256, 256, 232]
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
    dtype, length = prepared.manifest["dtype"], prepared.manifest["row_tokens"]
    files = [
        np.fromfile(prepared.folder / file["file"], dtype=dtype) for file in prepared.files(name)
    ]
    return np.concatenate(files).reshape(-1, length)


def decided(prepared: Prepared) -> tuple[str, str, str]:
    """Fingerprints of tokeniser and rows."""
    parts = prepared.manifest
    return parts["tokenizer"], parts["validation"]["fingerprint"], parts["train"]["fingerprint"]


def by_digest(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


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
    leading = by_digest(path.read_text() for path in folder.iterdir())[:counted]
    tokens = map(np.array, encode(leading, 1))
    pieces = {
        piece.tobytes() for piece in split(tokens, bos, 129, pieces=True) if len(piece) == 129
    }
    rows = rows_of(prepared, "train").astype(np.uint32)
    assert len(pieces) > 5
    assert not pieces & {row.tobytes() for row in rows}


def test_file_names_and_order_do_not_matter(folder: Path, tmp_path: Path) -> None:
    first = prepare(str(folder), SMALL(2), tmp_path / "a")
    for path in list(folder.iterdir()):
        path.rename(folder / f"renamed-{hash(path.name) % 1000}-{path.name}")
    second = prepare(str(folder), SMALL(2), tmp_path / "b")
    assert decided(first) == decided(second)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_format_gives_the_same_corpus(folder: Path, tmp_path: Path, suffix: str) -> None:
    texts = [path.read_text() for path in folder.iterdir()]
    other = tmp_path / "other"
    other.mkdir()
    if suffix == "jsonl":
        (other / "all.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    else:
        parquet.write_table(pyarrow.table({"text": [*texts, None]}), other / "all.parquet")
    assert decided(prepare(str(other), SMALL(2), tmp_path)) == decided(
        prepare(str(folder), SMALL(2), tmp_path)
    )


def test_a_prepared_corpus_is_found_and_a_changed_one_is_not(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    again = prepared_for(str(folder), SMALL(3), tmp_path)
    assert again is not None
    assert again.folder == prepared.folder
    (folder / "0.txt").write_text("something else")
    assert prepared_for(str(folder), SMALL(2), tmp_path) is None


def killed_when(line: str, folder: Path, home: Path) -> None:
    """A preparation that is killed when it says so."""
    program = (
        "import sys, time; from pathlib import Path; from dataclasses import replace; from slm.recipe import pocket;"
        "from slm.data import prepare;"
        f"report = lambda line: (print(line, flush=True), line.startswith({line!r}) and time.sleep(60));"
        f"prepare({str(folder)!r}, replace(pocket, validation_tokens=2**11)(2), Path({str(home)!r}), report)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(said.startswith(line) for said in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("line", ["reading", "training", "packing"])
def test_a_killed_preparation_goes_on_and_ends_as_an_undisturbed_one(
    folder: Path, tmp_path: Path, line: str
) -> None:
    killed_when(line, folder, tmp_path)
    assert not list((tmp_path / "data").glob("*/manifest.json"))
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    assert decided(prepared) == decided(prepare(str(folder), SMALL(2), tmp_path / "undisturbed"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [prepared.folder.name]
    assert not [
        path for path in prepared.folder.iterdir() if path.name.startswith((".", "buckets"))
    ]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora of a few hundred kilobytes have several shards."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 2**17)


@pytest.mark.usefixtures("small_buckets")
def test_two_processes_prepare_what_one_does(folder: Path, tmp_path: Path) -> None:
    one, two = (prepare(str(folder), SMALL(2), tmp_path / str(n), processes=n) for n in (1, 2))
    assert len(one.files("train")) == 4
    assert decided(one) == decided(two)
    assert (rows_of(one, "train") == rows_of(two, "train")).all()


@pytest.mark.usefixtures("small_buckets")
def test_an_extended_corpus_keeps_its_rows_and_adds_what_is_new(
    folder: Path, tmp_path: Path
) -> None:
    added = sorted(folder.iterdir())[100:]
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in added:
        path.rename(aside / path.name)
    before = prepare(str(folder), SMALL(2), tmp_path)
    plan, rows = before.identity(SMALL(2, steps=9)), rows_of(before, "train")
    for path in aside.iterdir():
        path.rename(folder / path.name)
    (folder / "again.txt").write_text((folder / added[0].name).read_text())
    after = prepare(str(folder), SMALL(2), tmp_path)
    assert (after.folder, after.manifest["tokenizer"]) == (
        before.folder,
        before.manifest["tokenizer"],
    )
    assert after.manifest["validation"] == before.manifest["validation"]
    assert (rows_of(after, "train")[: len(rows)] == rows).all()
    assert len(rows_of(after, "train")) > 2.5 * len(rows)
    assert after.manifest["corpus"]["documents"] == len(list(folder.iterdir())) - 1
    assert after.manifest["corpus"]["duplicates"] == 1
    assert after.identity(SMALL(2, steps=9)) == replace(
        plan, rows=after.train_rows, epochs=plan.epochs * plan.rows / after.train_rows
    )
    after.verify_blocks(after.blocks("train"))


def test_a_plan_that_wraps_reads_the_rows_there_were(folder: Path, tmp_path: Path) -> None:
    before = prepare(str(folder), SMALL(2), tmp_path)
    given = SMALL(2, ratio=2.5 * before.train_rows * 128 / SMALL(2).parameters.scaling)
    plan = before.identity(given)
    (folder / "new.txt").write_text("new words " * 2000)
    after = prepare(str(folder), SMALL(2), tmp_path)
    assert after.train_rows > before.train_rows
    assert plan.epochs > 2
    assert after.identity(given, plan.rows) == plan
    assert after.identity(given) != plan


def test_an_extension_that_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    before = prepare(str(folder), SMALL(2), tmp_path)
    (folder / "new.txt").write_text("new words " * 2000)
    killed_when("packing", folder, tmp_path)
    assert json.loads((before.folder / "manifest.json").read_text()) == before.manifest
    after = prepare(str(folder), SMALL(2), tmp_path)
    assert after.train_rows > before.train_rows
    assert not list(after.folder.glob("buckets-*"))


def test_what_texts_lack_is_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("na\u00efve caf\u00e9 ".encode("latin-1") * 40)
    table = pyarrow.table({"text": ["a text of its own " * 9, None, None, ""]})
    parquet.write_table(table, folder / "some.parquet")
    corpus = prepare(str(folder), SMALL(2), tmp_path).manifest["corpus"]
    assert (corpus["empty"], corpus["null"], corpus["invalid_utf8"], corpus["documents"]) == (
        2,
        2,
        1,
        302,
    )


@pytest.mark.parametrize("kind", ["dictionary", "large_string", "nulls"])
def test_every_kind_of_string_column_is_read(tmp_path: Path, kind: str) -> None:
    texts = pyarrow.array(["one", "two", "one"])
    columns = {
        "dictionary": texts.dictionary_encode(),
        "large_string": texts.cast(pyarrow.large_string()),
    }
    column = columns.get(kind, pyarrow.nulls(3))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    counts: Counter[str] = Counter()
    expected = [] if kind == "nulls" else ["one", "two", "one"]
    assert list(texts_of(tmp_path / "a.parquet", counts)) == expected
    assert counts["null"] == 3 - len(expected)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no .txt"),
        ({"a.txt": " \n"}, "holds no text"),
        ({"a.txt": "some words only"}, "too few to hold some out"),
        (
            {"a.jsonl": "".join(f'{{"text": "word {n}"}}\n' for n in range(99))},
            "holds only 3.. tokens",
        ),
        ({"a.jsonl": '{"text": "x"}\nbroken\n'}, "a.jsonl, line 2"),
        ({"a.jsonl": '{"body": "x"}\n'}, "a.jsonl, line 1"),
        ({"a.parquet": "not parquet"}, "a.parquet: not readable"),
        ({"a.jsonl": '{"text": 3}\n'}, "a.jsonl, line 1"),
    ],
)
def test_what_is_no_corpus_is_one_error_that_names_it(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=named):
        prepare(str(folder), SMALL(2), tmp_path)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        prepare("nowhere", SMALL(2), tmp_path)


def test_more_than_four_epochs_are_refused_with_both_numbers(prepared: Prepared) -> None:
    available = prepared.train_rows * 128
    with pytest.raises(ValueError, match=f"has {available:,}"):
        prepared.identity(pocket(2, ratio=4.5 * available / pocket(2).parameters.scaling))
    assert (
        prepared.identity(pocket(2, ratio=3.5 * available / pocket(2).parameters.scaling)).epochs
        > 3
    )


def test_only_the_blocks_that_a_horizon_reads_are_its_identity(prepared: Prepared) -> None:
    short = prepared.identity(pocket(2, steps=20))
    manifest = json.loads(json.dumps(prepared.manifest))
    blocks = manifest["train"]["files"][0]["blocks"]
    blocks[-1] = "changed"
    assert Prepared(prepared.folder, manifest).identity(pocket(2, steps=20)) == short
    blocks[0] = "changed"
    assert Prepared(prepared.folder, manifest).identity(pocket(2, steps=20)) != short


documents = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=60)


@given(documents=documents, length=st.integers(2, 20), pieces=st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_but_what_it_counts(
    documents: list[list[int]], length: int, pieces: bool
) -> None:
    counts: Counter[str] = Counter()
    split_up = list(split((np.array(own, np.uint32) for own in documents), 0, length, pieces))
    rows = list(pack(split_up, length, counts))
    assert all(len(row) == length and row[0] == 0 for row in rows)
    assert sum(map(len, split_up)) == sum(map(len, rows)) + counts.total()
    assert counts["dropped_tokens"] < length
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
    rows = list(pack([np.full(size, size) for size in lengths], 8, Counter()))
    assert [sorted(set(row.tolist())) for row in rows] == [[8], [3, 5]]


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
    order = Order(BLOCKS, seed=3)
    read = np.concatenate([order.step(step, 8) for step in range(250)])
    assert sorted(read[:256]) == list(range(256))
    assert sorted(read[:1000]) == sorted(read[1000:]) == list(range(1000))
    assert list(read[:1000]) != list(read[1000:])


def test_the_order_follows_from_seed_and_step_alone() -> None:
    forwards, backwards = Order(BLOCKS, 3), Order(BLOCKS, 3)
    steps = [forwards.step(step, 8).tolist() for step in range(200)]
    assert [backwards.step(step, 8).tolist() for step in reversed(range(200))] == steps[::-1]
    assert Order([256] * 20, 3).step(30, 8).tolist() == steps[30]
    assert Order(BLOCKS, 4).step(30, 8).tolist() != steps[30]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_rows_of_a_step(ranks: int) -> None:
    rows = Order(BLOCKS, 0).step(7, 8)
    shares = [share(rows, rank, ranks) for rank in range(ranks)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_targets_are_the_inputs_shifted_by_one(prepared: Prepared) -> None:
    rows = Rows.of(prepared, "train")
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
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(printed) == 1, time.monotonic() - start
    assert [str(path) for path in (tmp_path / "data").iterdir()] == list(printed)


def test_two_preparations_of_which_one_is_killed_give_one_result_that_is_whole(
    folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace; from slm.recipe import pocket;"
        "from slm.data import prepare;"
        f"given, home = replace(pocket, validation_tokens=2**11)(2), Path({str(tmp_path)!r});"
        f"prepare({str(folder)!r}, given, home, lambda line: (print(line, flush=True), sys.argv[1:] and input()))"
    )
    command = [sys.executable, "-c", program]
    first = subprocess.Popen(
        [*command, "stays"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline().startswith("reading")
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert second.stdout is not None
    assert second.stdout.readline() == f"waiting for process {first.pid}, which prepares the same\n"
    first.kill()
    first.communicate()
    assert "packing" in second.communicate(timeout=60)[0]
    (found,) = (tmp_path / "data").iterdir()
    Prepared.read(found).verify_all(lambda done, of: None)
    assert decided(Prepared.read(found)) == decided(
        prepare(str(folder), SMALL(2), tmp_path / "alone")
    )


def test_who_waited_for_a_preparation_that_failed_tries_for_itself(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "corpus"
    with alone(folder, print):
        waiting = ThreadPoolExecutor(1).submit(_locked_inode, folder)
        shutil.rmtree(folder)
    assert waiting.result(timeout=10) == (folder / "lock").stat().st_ino


def _locked_inode(folder: Path) -> int:
    with alone(folder, lambda line: None):
        return (folder / "lock").stat().st_ino


def test_a_file_that_changed_or_went_is_named_and_the_rows_of_before_stay(
    folder: Path, tmp_path: Path
) -> None:
    before, lines = prepare(str(folder), SMALL(2), tmp_path), list[str]()
    (folder / "0.txt").write_text("something else " * 40)
    (folder / "1.txt").unlink()
    after = prepare(str(folder), SMALL(2), tmp_path, lines.append)
    assert lines[0].startswith(
        f"{folder / '0.txt'} was changed since it was prepared, and 1 more: prepared anew"
    )
    assert str(before.folder) in lines[0]
    assert after.folder != before.folder
    before.verify_all(lambda done, of: None)


def test_a_text_of_any_length_becomes_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.data.corpus.LONGEST", 2**12)
    (folder / "long.txt").write_text("".join(f"{number} lines\n" for number in range(10**4)))
    (folder / "blank.txt").write_text("x" + " " * 2**13)
    corpus = prepare(str(folder), SMALL(2), tmp_path).manifest["corpus"]
    written = len((folder / "long.txt").read_text())
    assert corpus["documents"] == 300 + -(-written // 2**12) + 1
    assert corpus["empty"] == 2


def test_a_million_blanks_are_encoded_without_loss() -> None:
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 300)
    text = "a" + " " * 2**21 + "b"
    assert tokenizer.decode(tokenizer.encode_to_numpy(text).tolist()) == text


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"body": ["x"]}, r"b.parquet: no column 'text' \(it has body\)"),
        ({"text": [1]}, "b.parquet: its column 'text' holds int64, not strings"),
    ],
)
def test_a_file_of_another_schema_is_named(
    folder: Path, tmp_path: Path, columns: dict[str, list], named: str
) -> None:
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "a.parquet"
    )
    parquet.write_table(pyarrow.table(columns), folder / "b.parquet")
    with pytest.raises(ValueError, match=named):
        prepare(str(folder), SMALL(2), tmp_path)
    (folder / "b.parquet").unlink()
    assert prepare(str(folder), SMALL(2), tmp_path).manifest["corpus"]["documents"] == 300


def test_a_killed_process_of_a_preparation_is_one_line(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    work = Work(prepared.folder, "corpus", "", SMALL(2), None, print, processes=2)
    with pytest.raises(
        RuntimeError, match="was killed, for want of memory maybe: the same command goes on"
    ):
        work.pack([Deadly(), Deadly()], 1, "of")


def test_what_validation_leaves_in_its_buffer_is_counted(prepared: Prepared) -> None:
    manifest, corpus = prepared.manifest, prepared.manifest["corpus"]
    in_rows = sum(manifest[part]["rows"] for part in ("train", "validation")) * 129
    lost = corpus["cropped_tokens"] + corpus["dropped_tokens"]
    assert 0 <= in_rows + lost - corpus["tokens"] < in_rows / 128  # the pieces' own <|bos|>


def test_a_given_tokeniser_is_another_preparation_and_its_tokens_must_fit(
    folder: Path, tmp_path: Path
) -> None:
    own = prepare(str(folder), SMALL(2), tmp_path)
    given = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    other = prepare(str(folder), SMALL(2), tmp_path, tokenizer=given)
    assert (other.tokenizer, other.manifest["given_tokenizer"]) == (given, given.fingerprint)
    assert own.manifest["given_tokenizer"] is None
    assert prepared_for(str(folder), SMALL(2), tmp_path, given).folder == other.folder != own.folder
    assert prepared_for(str(folder), SMALL(2), tmp_path).folder == own.folder
    with pytest.raises(
        ValueError,
        match=r"600 tokens, the recipe's vocabulary 512: declare one with vocab_size=600",
    ):
        prepare(
            str(folder),
            SMALL(2),
            tmp_path,
            tokenizer=train_tokenizer([Path(__file__).read_text()] * 9, 600),
        )


def test_a_tokeniser_is_read_from_either_kind_of_file(tmp_path: Path) -> None:
    own = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    (tmp_path / "own.json").write_text(json.dumps(own.document()))
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(own.tokens)]
    (tmp_path / "own.tiktoken").write_text("\n".join(lines) + "\n")
    assert (
        tokenizer_of(str(tmp_path / "own.json"))
        == tokenizer_of(str(tmp_path / "own.tiktoken"))
        == own
    )
    (tmp_path / "short.tiktoken").write_text("\n".join(lines[9:]) + "\n")
    (tmp_path / "gap.tiktoken").write_text("\n".join(lines[:300] + lines[301:]) + "\n")
    (tmp_path / "none.tiktoken").write_text("words\n")
    for name, said in (
        ("short.tiktoken", "do not count from 0"),
        ("gap.tiktoken", "do not count from 0"),
        ("none.tiktoken", "no lines of token and rank"),
        ("gone.json", "gone.json"),
        ("nothing", "not one of tiktoken's: gpt2"),
    ):
        with pytest.raises(ValueError, match=said):
            tokenizer_of(str(tmp_path / name))


def test_rows_of_more_files_than_are_held_open_are_read(tmp_path: Path) -> None:
    content = np.arange(40 * 5, dtype="<u2").reshape(40, 5)
    for number in range(40):
        content[number].tofile(tmp_path / f"{number:02d}.bin")
    rows = Rows(sorted(tmp_path.glob("*.bin")), 5, "<u2")
    order = np.random.default_rng(0).permutation(40)
    ids, targets = rows.pair(order)
    assert len(rows) == 40
    assert (ids.numpy() == content[order, :-1]).all()
    assert (targets.numpy() == content[order, 1:]).all()
