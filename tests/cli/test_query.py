"""`slm query`, `slm export` and `slm store` on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pyarrow import parquet

import store
from tests.commands import slm
from tests.store.test_store import dump, event, finished, write_run

QUERY = """select run_id, depth, val_bpb, core, sum(tokens) over () as total,
                  'nan'::double as x, 'a|b' as t, '' as e
           from results where depth = $depth and recipe = $recipe"""


@pytest.fixture(scope="module")
def queried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of two runs."""
    home = tmp_path_factory.mktemp("queried")
    for number in (2, 3):
        write_run(home, str(number) * 12, depth=number)
        dump(
            home / (str(number) * 12) / "done.json",
            finished(str(number) * 12, 4) | {"val_bpb": 0.1 + 0.2},
        )
    store.ingest(home)
    return home


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            "csv",
            'run_id,depth,val_bpb,core,total,x,t,e\n222222222222,2,0.30000000000000004,,64,nan,a|b,""\n',
        ),
        (
            "json",
            '[\n {"run_id": "222222222222", "depth": 2, "val_bpb": 0.30000000000000004, '
            '"core": null, "total": 64, "x": "NaN", "t": "a|b", "e": ""}\n]\n',
        ),
        (
            "markdown",
            "| run_id       |   depth |   val_bpb |   core |   total |   x | t    | e   |\n"
            "|--------------|---------|-----------|--------|---------|-----|------|-----|\n"
            "| 222222222222 |       2 |       0.3 |      - |      64 | nan | a\\|b |     |\n",
        ),
        (
            "table",
            "run_id          depth    val_bpb    core    total    x  t    e\n"
            "------------  -------  ---------  ------  -------  ---  ---  ---\n"
            "222222222222        2        0.3       -       64  nan  a|b\n",
        ),
    ],
)
def test_every_format_keeps_null_nan_and_all_digits(
    queried: Path, form: str, expected: str
) -> None:
    result = slm(
        "query",
        QUERY,
        "--format",
        form,
        "--param",
        "depth=2",
        "--param",
        "recipe=pocket",
        home=queried,
    )
    assert (result.stdout, result.stderr) == (expected, "")


def test_parquet_is_written_to_a_file_with_its_types(queried: Path, tmp_path: Path) -> None:
    arguments = (
        "--param",
        "depth=2",
        "--param",
        'recipe="pocket"',
        "--format",
        "parquet",
        "-o",
        str(tmp_path / "x"),
    )
    assert slm("query", QUERY, *arguments, home=queried).returncode == 0
    [row] = parquet.read_table(tmp_path / "x").to_pylist()
    assert (row["depth"], row["core"], row["total"], math.isnan(row["x"])) == (2, None, 64, True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_table_stops_after_a_thousand_rows_and_says_so(queried: Path) -> None:
    result = slm("query", "select * from range(1001)", home=queried)
    assert len(result.stdout.splitlines()) == 1002
    assert "only the first 1,000 rows" in result.stderr
    assert (
        len(slm("query", "from range(1001)", "--limit", "1001", home=queried).stdout.splitlines())
        == 1003
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("query", "select 1", "--param", "depth"), "--param depth: write NAME=VALUE"),
        (("query", "select $depth"), "depth"),
        (("query", "select 1 as a, 2 as a", "--format", "json"), "two columns are named a"),
        (("query", "select cast(run_id as date) from runs", "--format", "csv"), "222222222222"),
        (("query", "select 1", "-o", "/nowhere/at/all"), "/nowhere/at"),
        (("export", "tests", "nonesuch"), "not empty"),
    ],
)
def test_errors_are_one_line(queried: Path, arguments: tuple[str, ...], named: str) -> None:
    result = slm(*arguments, home=queried)
    assert result.returncode in (1, 2)
    [line] = result.stderr.splitlines()
    assert named in line
    assert result.stdout == ""


def test_an_export_can_be_rebuilt_and_merged_into_another_home(
    queried: Path, tmp_path: Path
) -> None:
    result = slm("export", str(tmp_path / "out"), "--json", home=queried)
    assert result.returncode == 0, result.stderr
    assert {row["name"] for row in json.loads(result.stdout)["files"]} > {
        "columns.json",
        "tables/results.parquet",
    }
    assert slm("store", "rebuild", home=tmp_path / "out" / "runs").returncode == 0
    assert store.results(home=tmp_path / "out" / "runs")["depth"].tolist() == [2, 3]
    refused = slm("import", str(tmp_path / "out"), "--dry-run", home=tmp_path / "two")
    assert (refused.returncode, "without --dry-run" in refused.stderr) == (2, True)
    assert not (tmp_path / "two").exists()
    merged = slm("import", str(tmp_path / "out"), home=tmp_path / "two")
    assert merged.stdout == "out: merged: 2 new runs\n"


def test_check_exits_with_1_for_a_damaged_file_and_vacuum_prints_what_it_freed(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path, "aaa")
    (folder / "attempts" / "001" / "events.jsonl").write_text(event(1) + "none\n")
    result = slm("store", "check", home=tmp_path)
    assert result.returncode == 1
    assert "1 of 2 new lines are not events: repair or remove it" in result.stdout
    assert "1 problems" in result.stdout
    assert "of leftovers" in slm("store", "vacuum", home=tmp_path).stdout
