"""Text to rows: content decides identity and order; no partial files; errors name their value."""

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

from slm.data import PreparedDataset, external_sort, prepare, prepared_for, tokenizer_of
from slm.data.builder import DatasetBuilder
from slm.data.corpus import texts_of
from slm.data.loader import Order, Rows
from slm.data.packing import pack, shuffled, split
from slm.data.prepare import hold_folder
from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.model.ranks import Ranks
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


def rows_of(prepared: PreparedDataset, name: str) -> np.ndarray:
    dtype, length = prepared.manifest["dtype"], prepared.manifest["row_tokens"]
    files = [
        np.fromfile(prepared.folder / file["file"], dtype=dtype) for file in prepared.files(name)
    ]
    return np.concatenate(files).reshape(-1, length)


def fingerprints(prepared: PreparedDataset) -> tuple[str, str, str]:
    """Return the fingerprints of tokeniser and rows."""
    parts = prepared.manifest
    return parts["tokenizer"], parts["validation"]["fingerprint"], parts["train"]["fingerprint"]


def by_digest(texts: Iterable[str]) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def test_every_row_starts_with_bos_and_is_full(prepared: PreparedDataset) -> None:
    for name in ("train", "validation"):
        rows = rows_of(prepared, name)
        assert rows.shape == (prepared.manifest[name]["rows"], 129)
        assert (rows[:, 0] == prepared.tokenizer.bos).all()
        assert rows.max() < pocket.vocab_size


def test_validation_text_is_never_trained_on(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    encode, bos = prepared.tokenizer.encode, prepared.tokenizer.bos
    counted = prepared.manifest["corpus"]["validation_documents"]
    leading = by_digest(path.read_text() for path in folder.iterdir())[:counted]
    tokens = (np.array(encode(text)) for text in leading)
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
    assert fingerprints(first) == fingerprints(second)


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
    assert fingerprints(prepare(str(other), SMALL(2), tmp_path)) == fingerprints(
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
    """Start a preparation, and kill it when it reports a line that starts with `line`."""
    program = (
        "import signal; from pathlib import Path; from dataclasses import replace;"
        "from slm.data import prepare; from slm.recipe import pocket;"
        "hp = replace(pocket, validation_tokens=2**11)(2);"
        f"pause = lambda line: line.startswith({line!r}) and signal.pause();"
        "report = lambda line: (print(line, flush=True), pause(line));"
        f"prepare({str(folder)!r}, hp, Path({str(home)!r}), report)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(report.startswith(line) for report in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("line", ["reading", "training", "packing"])
def test_a_resumed_preparation_gives_the_same_rows_as_an_uninterrupted_one(
    folder: Path, tmp_path: Path, line: str
) -> None:
    killed_when(line, folder, tmp_path)
    assert not list((tmp_path / "data").glob("*/manifest.json"))
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    assert fingerprints(prepared) == fingerprints(
        prepare(str(folder), SMALL(2), tmp_path / "uninterrupted")
    )
    assert [path.name for path in (tmp_path / "data").iterdir()] == [prepared.folder.name]
    assert not [
        path for path in prepared.folder.iterdir() if path.name.startswith((".", "buckets"))
    ]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets so small that corpora of a few hundred kilobytes have several shards."""
    monkeypatch.setattr(external_sort, "BUCKET_BYTES", 2**17)


@pytest.mark.usefixtures("small_buckets")
def test_two_processes_prepare_the_same_rows_as_one(folder: Path, tmp_path: Path) -> None:
    one, two = (prepare(str(folder), SMALL(2), tmp_path / str(n), processes=n) for n in (1, 2))
    assert len(one.files("train")) == 4
    assert fingerprints(one) == fingerprints(two)
    assert (rows_of(one, "train") == rows_of(two, "train")).all()


@pytest.mark.usefixtures("small_buckets")
def test_an_extended_corpus_keeps_its_rows_and_adds_new_ones(folder: Path, tmp_path: Path) -> None:
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


def test_a_plan_of_several_epochs_keeps_its_rows_after_an_extension(
    folder: Path, tmp_path: Path
) -> None:
    before = prepare(str(folder), SMALL(2), tmp_path)
    hp = SMALL(2, ratio=2.5 * before.train_rows * 128 / SMALL(2).parameters.scaling)
    plan = before.identity(hp)
    (folder / "new.txt").write_text("new words " * 2000)
    after = prepare(str(folder), SMALL(2), tmp_path)
    assert after.train_rows > before.train_rows
    assert plan.epochs > 2
    assert after.identity(hp, plan.rows) == plan
    assert after.identity(hp) != plan


def test_a_killed_extension_can_be_resumed(folder: Path, tmp_path: Path) -> None:
    before = prepare(str(folder), SMALL(2), tmp_path)
    (folder / "new.txt").write_text("new words " * 2000)
    killed_when("packing", folder, tmp_path)
    assert json.loads((before.folder / "manifest.json").read_text()) == before.manifest
    after = prepare(str(folder), SMALL(2), tmp_path)
    assert after.train_rows > before.train_rows
    assert not list(after.folder.glob("buckets-*"))


def test_faulty_texts_are_counted(folder: Path, tmp_path: Path) -> None:
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
def test_an_invalid_corpus_is_an_error_that_names_it(
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


def test_more_than_four_epochs_are_refused_with_both_numbers(prepared: PreparedDataset) -> None:
    available = prepared.train_rows * 128
    with pytest.raises(ValueError, match=f"has {available:,}"):
        prepared.identity(pocket(2, ratio=4.5 * available / pocket(2).parameters.scaling))
    assert (
        prepared.identity(pocket(2, ratio=3.5 * available / pocket(2).parameters.scaling)).epochs
        > 3
    )


def test_identity_covers_only_the_blocks_that_a_horizon_reads(prepared: PreparedDataset) -> None:
    short = prepared.identity(pocket(2, steps=20))
    manifest = json.loads(json.dumps(prepared.manifest))
    blocks = manifest["train"]["files"][0]["blocks"]
    blocks[-1] = "changed"
    assert PreparedDataset(prepared.folder, manifest).identity(pocket(2, steps=20)) == short
    blocks[0] = "changed"
    assert PreparedDataset(prepared.folder, manifest).identity(pocket(2, steps=20)) != short


documents = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=60)


@given(documents=documents, length=st.integers(2, 20), pieces=st.booleans())
@settings(max_examples=60)
def test_packing_counts_all_tokens_that_it_loses(
    documents: list[list[int]], length: int, pieces: bool
) -> None:
    counts: Counter[str] = Counter()
    split_up = list(split((np.array(ids, np.uint32) for ids in documents), 0, length, pieces))
    rows = list(pack(split_up, length, counts))
    assert all(len(row) == length and row[0] == 0 for row in rows)
    assert sum(map(len, split_up)) == sum(map(len, rows)) + counts.total()
    assert counts["dropped_tokens"] < length
    if pieces:
        assert all(len(piece) <= length for piece in split_up)


def test_shuffling_separates_the_pieces_of_a_long_document() -> None:
    pieces = [np.full(5, number) for number in range(1000)]
    order = [int(piece[0]) for piece in shuffled(pieces)]
    assert sorted(order) == list(range(1000))
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 20
    assert order == [int(piece[0]) for piece in shuffled(pieces[::-1])]


def test_a_row_is_not_dropped_if_the_caller_stops_after_it() -> None:
    counts: Counter[str] = Counter()
    rows = pack([np.full(4, number, np.uint32) for number in range(3)], 4, counts)
    next(rows)
    rows.close()
    assert counts["dropped_tokens"] == 8


def test_packing_prefers_the_longest_document_that_fits() -> None:
    lengths = [3, 5, 4, 8]
    rows = list(pack([np.full(size, size) for size in lengths], 8, Counter()))
    assert [sorted(set(row.tolist())) for row in rows] == [[8], [3, 5]]


def test_a_tokeniser_round_trips_any_text_and_is_stored_without_loss(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    text = "def f(x):\n\treturn 'naïve ☃ 12345' <|bos|>\r\n"
    ids = tokenizer.encode(text)
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
    shares = [Ranks(rank, ranks).share(rows) for rank in range(ranks)]
    assert np.concatenate(shares).tolist() == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_targets_are_the_inputs_shifted_by_one(prepared: PreparedDataset) -> None:
    rows = Rows.open(prepared, "train")
    ids, targets = rows.pair(np.array([0, 5]))
    assert ids.shape == targets.shape == (2, 128)
    assert (ids[:, 1:] == targets[:, :-1]).all()


def test_concurrent_preparations_give_one_folder(folder: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from dataclasses import replace; from slm.recipe import pocket;"
        "from slm.data import prepare; hp = replace(pocket, validation_tokens=2**11)(2);"
        f"print(prepare({str(folder)!r}, hp, Path({str(tmp_path)!r})).folder)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=120)[0].strip() for process in both}
    assert len(printed) == 1
    assert [str(path) for path in (tmp_path / "data").iterdir()] == list(printed)


def test_a_waiting_preparation_completes_one_that_is_killed(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace;"
        "from slm.data import prepare; from slm.recipe import pocket;"
        "hp = replace(pocket, validation_tokens=2**11)(2);"
        "report = lambda line: (print(line, flush=True), sys.argv[1:] and input());"
        f"prepare({str(folder)!r}, hp, Path({str(tmp_path)!r}), report)"
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
    assert "packing" in second.communicate(timeout=120)[0]
    (result,) = (tmp_path / "data").iterdir()
    PreparedDataset.read(result).verify_all(lambda done, of: None)
    assert fingerprints(PreparedDataset.read(result)) == fingerprints(
        prepare(str(folder), SMALL(2), tmp_path / "alone")
    )


def test_after_a_failed_preparation_the_waiting_one_tries_itself(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "corpus"
    with hold_folder(folder, print):
        waiting = ThreadPoolExecutor(1).submit(_locked_inode, folder)
        shutil.rmtree(folder)
    assert waiting.result(timeout=120) == (folder / "lock").stat().st_ino


def _locked_inode(folder: Path) -> int:
    with hold_folder(folder, lambda line: None):
        return (folder / "lock").stat().st_ino


def test_a_changed_number_of_rows_in_the_manifest_is_found(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    prepared.manifest["train"]["rows"] = 0
    with pytest.raises(ValueError, match="changed"):
        prepared.verify_all(lambda done, of: None)


def test_a_changed_file_is_named_and_the_old_rows_stay(folder: Path, tmp_path: Path) -> None:
    before, lines = prepare(str(folder), SMALL(2), tmp_path), list[str]()
    (folder / "0.txt").write_text("something else " * 40)
    (folder / "1.txt").unlink()
    after = prepare(str(folder), SMALL(2), tmp_path, lines.append)
    assert lines[0].startswith(
        f"{folder / '0.txt'} was changed since it was prepared, and 1 more: preparing"
    )
    assert str(before.folder) in lines[0]
    assert after.folder != before.folder
    before.verify_all(lambda done, of: None)


def test_a_long_text_is_split_into_documents(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.data.corpus.MAX_CHARACTERS", 2**12)
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


def test_a_killed_packing_process_is_one_line(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(str(folder), SMALL(2), tmp_path)
    work = DatasetBuilder(prepared.folder, "corpus", "", SMALL(2), None, print, processes=2)
    with pytest.raises(
        RuntimeError, match="was killed, perhaps for lack of memory: run the same command again"
    ):
        work.pack_shards([Deadly(), Deadly()], 1, "of")


def test_tokens_that_validation_leaves_over_are_counted(prepared: PreparedDataset) -> None:
    manifest, corpus = prepared.manifest, prepared.manifest["corpus"]
    in_rows = sum(manifest[part]["rows"] for part in ("train", "validation")) * 129
    lost = corpus["cropped_tokens"] + corpus["dropped_tokens"]
    assert 0 <= in_rows + lost - corpus["tokens"] < in_rows / 128  # the <|bos|> of pieces


def test_a_given_tokeniser_makes_another_dataset_and_must_fit_the_vocabulary(
    folder: Path, tmp_path: Path
) -> None:
    trained = prepare(str(folder), SMALL(2), tmp_path)
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    other = prepare(str(folder), SMALL(2), tmp_path, tokenizer=tokenizer)
    assert (other.tokenizer, other.manifest["given_tokenizer"]) == (
        tokenizer,
        tokenizer.fingerprint,
    )
    assert trained.manifest["given_tokenizer"] is None
    assert (
        prepared_for(str(folder), SMALL(2), tmp_path, tokenizer).folder
        == other.folder
        != trained.folder
    )
    assert prepared_for(str(folder), SMALL(2), tmp_path).folder == trained.folder
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


def test_tokenisers_are_read_from_json_and_tiktoken_files(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Path(__file__).read_text()] * 3, 400)
    (tmp_path / "own.json").write_text(json.dumps(tokenizer.document()))
    lines = [
        f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokenizer.tokens)
    ]
    (tmp_path / "own.tiktoken").write_text("\n".join(lines) + "\n")
    assert (
        tokenizer_of(str(tmp_path / "own.json"))
        == tokenizer_of(str(tmp_path / "own.tiktoken"))
        == tokenizer
    )
    (tmp_path / "short.tiktoken").write_text("\n".join(lines[9:]) + "\n")
    (tmp_path / "gap.tiktoken").write_text("\n".join(lines[:300] + lines[301:]) + "\n")
    (tmp_path / "none.tiktoken").write_text("words\n")
    for name, message in (
        ("short.tiktoken", "do not count from 0"),
        ("gap.tiktoken", "do not count from 0"),
        ("none.tiktoken", "no lines of token and rank"),
        ("missing.json", "missing.json"),
        ("nothing", "not one of tiktoken's: gpt2"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer_of(str(tmp_path / name))


def test_rows_of_more_files_than_are_mapped_at_once_are_read(tmp_path: Path) -> None:
    content = np.arange(40 * 5, dtype="<u2").reshape(40, 5)
    for number in range(40):
        content[number].tofile(tmp_path / f"{number:02d}.bin")
    rows = Rows(sorted(tmp_path.glob("*.bin")), 5, "<u2")
    order = np.random.default_rng(0).permutation(40)
    ids, targets = rows.pair(order)
    assert len(rows) == 40
    assert (ids.numpy() == content[order, :-1]).all()
    assert (targets.numpy() == content[order, 1:]).all()
