"""Runs read from tables become typed points; a defect of the file is reported with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm.exchange.point_files import read_points

HEADER = "name,n,tokens,flops,val_bpb,outlier\n"
NAMES = {"run": "name", "params": "n", "loss": "val_bpb"}


def test_a_file_with_only_outliers_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "a,1e6,1e8,6e14,1.2,1")
    with pytest.raises(ValueError, match="every run is marked"):
        read_points(path, NAMES)


def table(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(header + "\n".join(lines))
    return path


def test_runs_of_near_equal_flops_share_a_budget(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "a,1e6,1e8,6.00e14,1.2,",
        "b,2e6,5e7,6.12e14,1.1,0",
        "c,3e6,1e9,2e16,1.0,no",
        "d,4e6,1e9,1e17,9,1",
    )
    result = read_points(path, NAMES)
    assert [point.run_id for point in result.points] == ["a", "b", "c"]
    assert [point.run_id for point in result.outliers] == ["d"]
    assert result.points[0].budget == result.points[1].budget == pytest.approx(6.06e14, rel=1e-3)
    assert result.points[2].budget is None
    assert {point.budget for point in read_points(path, NAMES, budgets=False).points} == {None}


def test_optional_columns_are_read_or_defaulted(tmp_path: Path) -> None:
    header = "params,tokens,flops,loss,budget,core,depth,seed,recipe,weight\n"
    path = table(
        tmp_path,
        "1e6,1e8,6e14,1.2,6e14,0.1,4,7,wide,2.5",
        "",
        "1e7,1e8,6e15,1.1,,,5.0,,,",
        header=header,
    )
    first, second = read_points(path).points
    assert (first.budget, first.depth, first.seed, first.recipe, first.weight) == (
        6e14,
        4,
        7,
        "wide",
        2.5,
    )
    assert (second.budget, second.depth, second.seed, second.recipe, second.weight) == (
        None,
        5,
        0,
        "runs",
        1.0,
    )
    assert (first.core, second.core) == (0.1, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,1e6,1e8,6e14,low,", "line 2: loss is 'low', not a number"),
        ("a,1e6,1e8,6e14,,", "line 2: loss is empty"),
        ("a,1e6,-1,6e14,1.2,", "line 2: run a: tokens is -1.0"),
        ("a,1e6,1e8,6e14,nan,", "line 2: run a: loss is nan"),
        ("a,1e6,1e8,6e14,1.2,perhaps", "line 2: outlier is 'perhaps'"),
        ("a,1e6,1e8,6e14,1.2", "line 2: more or fewer cells than the header"),
        ("", "a header and no rows"),
        ("a,1e6,1e8,1e14,1,\nb,2e6,1e8,1.02e14,1,\nc,3e6,1e8,1.04e14,1,", "budgets are not clear"),
    ],
)
def test_a_defect_is_reported_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_points(table(tmp_path, line), NAMES)


def test_a_missing_or_repeated_column_is_reported(tmp_path: Path) -> None:
    path = table(tmp_path, "a,1e6,1e8,6e14,1.2,")
    with pytest.raises(ValueError, match="no column 'params'; there are name, n,"):
        read_points(path)
    with pytest.raises(ValueError, match=r"no column 'bpb' \(for loss\)"):
        read_points(path, NAMES | {"loss": "bpb"})
    with pytest.raises(ValueError, match="no column is called 'bits'"):
        read_points(path, {"bits": "val_bpb"})
    with pytest.raises(ValueError, match="column 'loss' appears twice"):
        read_points(table(tmp_path, "1,1,1,1,1", header="params,tokens,flops,loss,loss\n"))
