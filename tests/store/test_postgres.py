"""PostgreSQL for several homes: each writes its own rows, the same as in a file; all are
readable."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas
import pytest

import store
from store import schema
from tests.commands import slm
from tests.store.test_evaluations import write_core
from tests.store.test_imports import row, write_import
from tests.store.test_store import all_rows, append, dump, event, write_run


def write_home(home: Path, *runs: str, experiment: str = "one") -> Path:
    for run_id in runs:
        write_run(home, run_id)
    document = {
        "name": experiment,
        "question": "",
        "recipe": "pocket",
        "declared": {},
        "created": 1.0,
    }
    dump(home / "experiments" / f"{experiment}.json", document | {"runs": list(runs)})
    return home


def rows_of(home: Path, home_id: str) -> dict[str, list[list[str]]]:
    """Return the rows of one home, by table."""
    tables = [name for name, table in schema.Base.metadata.tables.items() if "home" in table.c]
    frames = {
        name: store.sql(f"select * from {name} where home = ?", [home_id], home) for name in tables
    }
    return {name: sorted(map(str, frame.to_numpy().tolist())) for name, frame in frames.items()}


def test_a_home_gives_the_same_tables_and_views_in_both_databases(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = write_home(tmp_path, "aaa", "bbb")
    append(
        home / "aaa" / "attempts" / "001",
        event(5, 0.1 + 0.2),
        event(6, float("nan")),
        event(7, float("inf")),
    )
    write_core(home, 0.1)
    write_import(
        home,
        row(1, depth=3, original={"text": 'say "so", 1\n2'}),
        row(2, status="failed", val_bpb=None),
    )
    names = [
        "results",
        "curves",
        "status",
        "noise",
        "latest_attempts",
        "metrics_latest",
        "micro_batches",
    ]
    names += [name for name in schema.Base.metadata.tables if name != "schema_version"]

    def frames() -> dict[str, pandas.DataFrame]:
        assert store.ingest(home).problems == []
        frames = {name: store.sql(f"select * from {name}", home=home) for name in names}
        return {
            name: frame.sort_values(list(frame.columns), key=lambda values: values.astype(str))
            for name, frame in frames.items()
        }

    on_server = frames()
    monkeypatch.delenv("SLM_STORE")
    in_file = frames()
    for name, frame in in_file.items():
        for column in (
            "declared",
            "versions",
            "plan",
            "document",
            "original",
            "mapping",
            "defects",
            "experiments",
        ):
            if column in frame:
                frame[column] = frame[column].astype(object)
                on_server[name][column] = on_server[name][column].astype(object)
        ignored = {"check_index_type": False, "check_column_type": False}
        pandas.testing.assert_frame_equal(
            frame.reset_index(drop=True),
            on_server[name].reset_index(drop=True),
            obj=name,
            check_exact=True,
            **ignored,
        )


def test_a_rebuild_touches_only_its_own_home(tmp_path: Path, postgresql: str) -> None:
    first, second = (
        write_home(tmp_path / "first", "aaa"),
        write_home(tmp_path / "second", "aaa", "bbb"),
    )
    for home in (first, second):
        write_core(home, 0.1)
        store.ingest(home)
    first_id, second_id = (store.home_id(home) or "" for home in (first, second))
    before, rows = rows_of(first, second_id), rows_of(first, first_id)
    assert len(before["runs"]) == 2
    for folder in first.iterdir():
        if folder.name == "aaa":
            folder.rename(tmp_path / "away")
    store.rebuild(first)
    assert rows_of(first, second_id) == before
    assert rows_of(first, first_id)["runs"] == []
    (tmp_path / "away").rename(first / "aaa")
    store.rebuild(first)
    assert {k: v for k, v in rows_of(first, first_id).items() if k != "cursors"} == {
        k: v for k, v in rows.items() if k != "cursors"
    }


def test_an_experiment_is_looked_up_in_the_own_home_first(tmp_path: Path, postgresql: str) -> None:
    first = write_home(tmp_path / "first", "aaa")
    other = write_home(tmp_path / "other", "bbb")
    third = write_home(tmp_path / "third", "ccc", experiment="third")
    for home in (first, other, third):
        store.ingest(home)
    assert store.results("one", first)["run_id"].tolist() == ["aaa"]
    assert store.results("one", other)["run_id"].tolist() == ["bbb"]
    assert store.results("third", first)["run_id"].tolist() == ["ccc"]
    assert store.curves("third", first)["run_id"].unique().tolist() == ["ccc"]
    assert store.experiment_home("third", first) == store.home_id(third)
    with pytest.raises(store.QueryError, match=rf"{tmp_path}/first.*{tmp_path}/other|other.*first"):
        store.results("one", third)
    with pytest.raises(store.QueryError, match="there are one, third"):
        store.results("none", first)
    assert store.results(home=first)["run_id"].tolist() == ["aaa"]
    assert store.curves(home=first)["run_id"].unique().tolist() == ["aaa"]
    assert len(store.sql("select * from results", home=first)) == 3


def test_a_reader_without_a_home_sees_every_home(tmp_path: Path, postgresql: str) -> None:
    for name in ("one", "two"):
        store.ingest(write_home(tmp_path / name, name, experiment=name))
    nowhere = tmp_path / "nowhere"
    assert store.results(home=nowhere)["run_id"].tolist() == ["one", "two"]
    assert store.results("two", nowhere)["run_id"].tolist() == ["two"]


def test_first_ingests_of_several_homes_at_once_make_one_set_of_tables(
    tmp_path: Path, postgresql: str
) -> None:
    homes = [write_home(tmp_path / f"home{number}", "aaa", "bbb") for number in range(4)]
    program = (
        "import store, sys; from pathlib import Path; "
        "print(store.ingest(Path(sys.argv[1])).problems)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True
        )
        for home in homes
    ]
    assert [process.communicate()[0] for process in processes] == ["[]\n"] * 4
    counts = store.sql("select count(*) as n from metrics group by home", home=homes[0])[
        "n"
    ].tolist()
    assert counts == [48] * 4


def test_two_copies_of_a_home_never_write_at_once(tmp_path: Path, postgresql: str) -> None:
    from store import server

    home = write_home(tmp_path, "aaa")
    store.ingest(home)
    append(home / "aaa" / "attempts" / "001", event(5))
    with server.open_for_writing(postgresql, store.home_id(home) or ""):
        with pytest.raises(store.StoreError, match="another process writes home"):
            store.ingest(home, patience=0.1)
        waiting = threading.Thread(target=store.ingest, args=(home,))
        waiting.start()
    waiting.join()
    assert store.curves(home=home)["step"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("query", "params", "value"),
    [
        ("select ? as v", ["x"], "x"),
        (
            "select cast($b as integer) - cast($a as integer) + cast($b as integer) as v",
            {"a": 1, "b": 5},
            9,
        ),
        ("select '?' || $a || '$a' as v -- $b ?", {"a": "x"}, "?x$a"),
        ("""select ? || '%s' || '%' as v /* ? */""", ["100%"], "100%%s%"),
        ("select v as \"?\", v from (select 'it''s ?' || ? as v) s", ["!"], "it's ?!"),
        ("select $1 || $2 || $1 as v", ["a", "b"], "aba"),
        ("select 'a' as v where ? = ?", [1.5, 1.5], "a"),
    ],
)
@pytest.mark.usefixtures("database")
def test_parameters_are_the_same_in_both_databases(
    tmp_path: Path, query: str, params: list[object] | dict[str, object], value: object
) -> None:
    store.ingest(tmp_path)
    assert store.sql(query, params, tmp_path)["v"].tolist() == [value]


@pytest.mark.parametrize(
    ("query", "params"),
    [
        ("select ? as v", None),
        ("select ? as v", []),
        ("select ? as v", [1, 2]),
        ("select $a as v", {"b": 1}),
        ("select $a as v", {"a": 1, "b": 1}),
    ],
)
@pytest.mark.usefixtures("database")
def test_parameters_that_do_not_fit_the_query_are_refused(
    tmp_path: Path, query: str, params: list[object] | dict[str, object] | None
) -> None:
    store.ingest(tmp_path)
    with pytest.raises(store.QueryError) as caught:
        store.sql(query, params, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_query_that_would_write_leaves_everything(tmp_path: Path, postgresql: str) -> None:
    store.ingest(write_home(tmp_path, "aaa"))
    before = all_rows(tmp_path)
    for query in (
        "commit",
        "set transaction read write",
        "select set_config('transaction_read_only', 'off', false)",
        "rollback; delete from slm_v3.runs; commit",
        "explain analyze delete from runs",
        "do $$ begin delete from runs; end $$",
        "drop schema slm_v3 cascade",
        "copy runs to program 'touch /tmp/x'",
    ):
        with pytest.raises(store.QueryError):
            store.sql(query, home=tmp_path)
    assert all_rows(tmp_path) == before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg://u:secret@/d?host=/nowhere", "cannot connect.*No such file"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/d", "Connection refused"),
        ("postgresql+psycopg://u:secret@h:port/d", "is not an address"),
        (
            "mysql://u:secret@h/d",
            r"SLM_STORE=mysql:.*write postgresql\+psycopg://USER@HOST/DATABASE",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_one_line_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, said: str
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("SLM_STORE", url)
    for action in (lambda: store.ingest(tmp_path), lambda: store.sql("select 1", home=tmp_path)):
        with pytest.raises(store.StoreError, match=said) as caught:
            action()
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_empty_server_says_what_to_do(tmp_path: Path, postgresql: str) -> None:
    with pytest.raises(store.StoreError, match="slm sweep"):
        store.results(home=tmp_path)


def test_versions_of_the_store_use_separate_schemas(tmp_path: Path, postgresql: str) -> None:
    import psycopg

    address = postgresql.replace("+psycopg", "")
    with psycopg.connect(address) as connection:
        connection.execute(
            "create schema slm_v2; create table slm_v2.runs (run_id text); "
            "create table runs (a int)"
        )
    store.ingest(write_home(tmp_path, "aaa"))
    assert store.sql("select run_id from runs", home=tmp_path)["run_id"].tolist() == ["aaa"]
    with psycopg.connect(address) as connection:
        assert connection.execute("select count(*) from slm_v2.runs").fetchone() == (0,)


def test_a_lost_connection_during_an_ingest_loses_nothing(
    tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    home = write_home(tmp_path, "aaa")
    store.ingest(home)
    append(home / "aaa" / "attempts" / "001", event(5))
    from store import server

    send = server.copy_file

    def cut(*arguments: Any) -> None:
        with psycopg.connect(postgresql.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where pid <> pg_backend_pid() and datname = current_database()"
            )
        send(*arguments)

    monkeypatch.setattr(server, "copy_file", cut)
    with pytest.raises(store.StoreError, match="could not be written"):
        store.ingest(home)
    monkeypatch.setattr(server, "copy_file", send)
    assert len(store.curves(home=home)) == 4
    store.ingest(home)
    assert len(store.curves(home=home)) == 5


def test_the_command_line_works_on_the_server(tmp_path: Path, postgresql: str) -> None:
    home = write_home(tmp_path, "aaa", "bbb")
    done = slm("store", "rebuild", home=home, SLM_STORE=postgresql)
    assert done.returncode == 0, done.stderr
    assert not list(home.glob("*.duckdb"))
    queried = slm(
        "query",
        "select run_id from results order by 1",
        "--format",
        "csv",
        home=home,
        SLM_STORE=postgresql,
    )
    assert queried.stdout.split() == ["run_id", "aaa", "bbb"]
    environment = {"SLM_STORE": "postgresql+psycopg://slm@/nowhere?host=/nowhere"}
    refused = slm("query", "select 1", home=home, **environment)
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1


def test_the_password_of_the_store_is_in_no_file(tmp_path: Path, postgresql: str) -> None:
    os.environ["SLM_STORE"] = postgresql.replace("slm@", "slm:hidden@")
    store.ingest(write_home(tmp_path, "aaa"))
    assert not any(b"hidden" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
