"""The store in a DuckDB file: one writer, a snapshot for readers, versions, damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import duckdb
import pytest

import store
from tests.store.test_store import all_rows, append, event, metric_count, write_run


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLM_STORE", raising=False)


def test_an_open_reader_does_not_block_the_writer(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    program = f"""
import duckdb, sys
connection = duckdb.connect("{tmp_path}/results.duckdb", read_only=True)
print(connection.execute("select count(*) from metrics").fetchone()[0], flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        count = int(reader.stdout.readline())
        append(folder / "attempts" / "001", event(5))
        store.ingest(tmp_path)
        assert metric_count(tmp_path) == count + 6
        reader.communicate()


def test_no_function_leaves_a_connection_open(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    for function in (store.ingest, store.rebuild, lambda home: store.sql("select 1", home=home)):
        function(tmp_path)
        for name in ("slm.duckdb", "results.duckdb"):
            statement = "create or replace table t (a int)"
            program = f"import duckdb; duckdb.connect('{tmp_path / name}').execute({statement!r})"
            subprocess.run([sys.executable, "-c", program], check=True)


def test_a_writer_waits_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    program = f"""
import duckdb, sys
connection = duckdb.connect("{tmp_path}/slm.duckdb")
print("open", flush=True)
sys.stdin.read()
"""
    write_run(tmp_path, "bbb")
    messages = []
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()

        def wait(deadline: float, message: str) -> None:
            messages.append(message)
            other.communicate()

        monkeypatch.setattr(import_module("store.ingest"), "_wait", wait)
        assert store.ingest(tmp_path).runs == 1
    assert len(messages) == 1


def test_the_next_ingest_publishes_rows_that_a_killed_one_only_committed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    published = tmp_path / "results.duckdb"
    shutil.copy2(published, tmp_path / "kept")
    append(folder / "attempts" / "001", event(5))
    store.ingest(tmp_path)
    (tmp_path / "kept").replace(published)
    assert metric_count(tmp_path) == 24
    store.ingest(tmp_path)
    assert metric_count(tmp_path) == 30


def test_an_ingest_of_nothing_new_publishes_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa", done=False)
    append(folder / "attempts" / "001", event(5)[:9])
    store.ingest(tmp_path)
    before = (tmp_path / "results.duckdb").stat().st_ino
    store.ingest(tmp_path)
    assert (tmp_path / "results.duckdb").stat().st_ino == before


def test_a_full_disk_leaves_the_snapshot_and_loses_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    folder = write_run(tmp_path, "bbb", steps=1)
    append(folder / "attempts" / "001", *(event(step) for step in range(2, 30_001)))
    program = f"""
import resource, store
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
store.ingest(Path({str(tmp_path)!r}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "StoreError" in result.stderr.splitlines()[-1]
    assert metric_count(tmp_path) == 24
    store.ingest(tmp_path)
    assert metric_count(tmp_path) == 24 + 30_000 * 6


def test_queries_cannot_read_other_files(tmp_path: Path) -> None:
    store.ingest(tmp_path)
    with pytest.raises(store.QueryError, match="disabled"):
        store.sql("select * from read_csv('/etc/hosts')", home=tmp_path)


def test_importing_the_store_loads_nothing_heavy() -> None:
    program = "import sys, store; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "slm", "sqlalchemy", "duckdb", "pandas"} & set(result.stdout.split())


def change_database(home: Path, statement: str) -> None:
    program = f"import duckdb; duckdb.connect('{home}/slm.duckdb').execute({statement!r})"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("damage", ["database", "newer"])
def test_a_damaged_or_newer_database_names_rebuild_which_repairs_it(
    tmp_path: Path, damage: str
) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    before = all_rows(tmp_path)
    if damage == "database":
        (tmp_path / "slm.duckdb").write_bytes(b"no database" * 1000)
    else:
        change_database(tmp_path, "update schema_version set version = 99")
    with pytest.raises(store.StoreError, match="slm store rebuild"):
        store.ingest(tmp_path)
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == before


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """A home of the first version: its files, its database and its snapshot."""
    source = Path(__file__).parent / "home_v1"
    home = Path(shutil.copytree(source, tmp_path / "home"))
    for name in ("slm.duckdb", "results.duckdb"):
        with duckdb.connect(str(home / name)) as connection:
            connection.execute((home / "database.sql").read_text())
    return home


def test_an_ingest_upgrades_a_home_of_the_first_version_and_says_so_once(
    old_home: Path,
) -> None:
    with pytest.raises(
        store.StoreError, match=r"another version of the store.*`slm store rebuild`"
    ):
        store.results(home=old_home)
    [said] = store.ingest(old_home).problems
    assert "version 1 of the store" in said
    results = store.results("old", old_home)[["run_id", "depth", "status", "val_bpb", "tokens"]]
    assert results.to_numpy().tolist() == [
        ["9c5b8f99e240", 1, "finished", 4.447869734195452, 1280],
        ["0f61e2306968", 2, "finished", 4.445747696631848, 1280],
    ]
    assert len(store.curves("old", old_home)) == 2 * 10
    assert store.ingest(old_home) == store.Counts(0, 0, 0, 0, [])


def test_an_upgrade_gives_the_same_rows_as_a_fresh_ingest(old_home: Path, tmp_path: Path) -> None:
    store.ingest(old_home)
    fresh = Path(
        shutil.copytree(old_home, tmp_path / "fresh", ignore=shutil.ignore_patterns("*.duckdb*"))
    )
    store.ingest(fresh)
    tables = {name: rows for name, rows in all_rows(old_home).items() if name != "cursors"}
    assert tables == {name: rows for name, rows in all_rows(fresh).items() if name != "cursors"}


def test_a_home_without_home_json_gets_a_new_id_for_all_rows(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    before = store.home_id(tmp_path)
    (tmp_path / "home.json").unlink()
    [said] = store.ingest(tmp_path).problems
    assert "belonged to another home" in said
    after = store.home_id(tmp_path)
    assert after != before
    assert store.sql("select home from runs union select home from homes", home=tmp_path)[
        "home"
    ].tolist() == [after]


@pytest.mark.parametrize("content", ["", "{}", '{"id": "../../x"}', '{"id": 7}'])
def test_an_invalid_home_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "home.json").write_text(content)
    with pytest.raises(store.StoreError, match=r"home\.json: its id should be 8 hex digits"):
        store.ingest(tmp_path)
