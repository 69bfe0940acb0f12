"""Importers: every published file, every defect, and how imports are stored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import store
from slm.exchange.importers import (
    Import,
    imported_experiments,
    read_import,
    remove_import,
    write_import,
)
from slm.exchange.importers.architectures import known_architectures
from slm.exchange.importers.checks import CODES
from slm.exchange.importers.numbers import number, seconds
from slm.exchange.importers.storage import import_document
from slm.exchange.importers.types import COLUMNS
from slm.recipe import nanochat
from tests.commands import slm
from tests.imports_table import lines

Write = Callable[..., Path]

BUDGETS = (
    "flops_budget,depth,model_dim,params_wte,params_value_embeds,params_lm_head,params_transformer,params_scalars,"
    "params_total,num_iterations,tokens_trained,val_bpb,core_score,train_time_sec"
)
SERIES = (
    "depth,model_dim,num_params,num_scaling_params,num_iterations,tokens_trained,param_data_ratio,val_bpb,core_score,"
    "train_time_sec"
)
TSV = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(name: str, *rows: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n")
        return path

    return file


def codes(found: Import) -> dict[str, list[int | None]]:
    """Rows of each code."""
    told: dict[str, list[int | None]] = {}
    for defect in found.defects:
        told.setdefault(defect.code, []).append(defect.row)
    return told


def test_every_published_file_has_the_recorded_outcome(reference: Path) -> None:
    expected = (Path(__file__).parent / "imports_table.txt").read_text().splitlines()
    assert list(lines(reference / "data" / "nanochat")) == expected


def test_the_log_of_a_real_run_gives_its_row_its_curve_and_its_tasks(reference: Path) -> None:
    found = read_import(reference / "data/nanochat/logs/pr492_base_train_d24_thinned.log")
    (row,) = found.rows
    assert (row.get("val_bpb"), row.get("core"), row.get("steps")) == (0.753336, 0.2633, 16704)
    assert row.get("tokens") == row.get("steps") * row.get("batch_tokens") == 8_757_706_752
    assert (row.get("train_seconds"), row.get("ranks"), row.get("horizon")) == (
        10766.4,
        8,
        "ratio=12",
    )
    assert len(row.original["tasks"]) == 22
    assert row.original["tasks"]["boolq"]["centred"] == -0.0945
    evals = [event for event in row.curve if event["event"] == "eval"]
    assert (len(evals), evals[0]["val_bpb"], evals[-1]["val_bpb"]) == (68, 3.167584, 0.753336)
    assert evals[-1]["tokens"] == 8_757_706_752
    first = next(event for event in row.curve if event["event"] == "train")
    assert (first["loss"], first["tokens_per_second"], first["time"]) == (10.397165, 29001, None)


def test_the_same_run_gives_the_same_curve_from_its_log_and_from_its_table(reference: Path) -> None:
    folder = reference / "data/nanochat/logs"
    logged, tabled = (
        [
            (event["step"], event["val_bpb"])
            for event in read_import(folder / name).rows[0].curve
            if event["event"] == "eval"
        ]
        for name in ("pr492_base_train_d24_thinned.log", "pr492_d24_val_bpb_curve.csv")
    )
    assert logged == tabled


def test_rounded_sizes_name_their_family_and_the_exact_counts_follow(reference: Path) -> None:
    """91M parameters at depth 10 fit nanochat of 2025 only; later embeddings alone are larger."""
    found = read_import(reference / "data/nanochat/karpathy/miniseries_v1_2026-01-07.csv")
    for row in found.rows:
        width = 64 * row.get("depth")
        assert row.get("parameters_scaling") == 12 * width**2 * row.get("depth") + 32768 * width
        assert row.get("flops") == row.get("flops_per_token") * row.get("tokens")
        assert row.get("parameters_total") % 10**6 == 0, "what was read stays"


def test_flops_a_token_name_vocabulary_and_context_exactly(reference: Path) -> None:
    found = read_import(reference / "data/nanochat/pulls/pr376_wandb_overall.csv")
    for row in found.rows:
        assert row.get("parameters_total") == 560_988_160
        assert row.get("flops") == 74_454_529_386_479_620_000
        assert float(row.get("flops_per_token") * row.get("tokens")) == float(row.get("flops"))


def test_the_recipe_is_the_newest_known_architecture() -> None:
    newest = list(known_architectures(12, None))[-1]
    assert newest.parameters == nanochat(12).parameters
    assert newest.flops_per_token == nanochat(12).flops_per_token


def budget_row(
    depth: int, budget: float, printed: str, factor: int = 1, empty: bool = False, core: str = "0.1"
) -> str:
    """A line of scaling_laws.sh as today's recipe would train it, with tokens off by a factor."""
    given = nanochat(depth, flops=budget)
    groups = given.parameters
    counts = (
        groups.wte,
        groups.value_embeds,
        groups.lm_head,
        groups.transformer_matrices,
        groups.scalars,
        groups.total,
    )
    told = ",".join("" if empty else str(count) for count in counts)
    tokens = given.tokens * factor
    return f"{printed},{depth},{given.width},{told},{given.steps},{tokens},0.9{depth},{core},100"


def test_consistent_budget_rows_have_no_defect(write: Write) -> None:
    rows = [budget_row(depth, 2.15e18, "2.15e18") for depth in (10, 12, 14)]
    found = read_import(write("results.csv", BUDGETS, *rows))
    assert found.format == "nanochat-csv"
    assert found.faults() == []
    assert [row.get("horizon") for row in found.rows] == ["flops=2.15e+18"] * 3
    assert [row.get("flops") for row in found.rows] == [
        nanochat(depth, flops=2.15e18).flops for depth in (10, 12, 14)
    ]


def test_empty_parameters_are_inferred_from_budget_and_tokens(
    write: Write,
) -> None:
    found = read_import(write("results.csv", BUDGETS, budget_row(12, 1e18, "1e18", empty=True)))
    assert codes(found)["parameters-empty"] == [2]
    assert found.rows[0].get("parameters_scaling") == nanochat(12).parameters.scaling
    assert found.rows[0].original["params_total"] == ""


def test_empty_parameters_stay_empty_if_no_architecture_matches(write: Write) -> None:
    found = read_import(
        write("results.csv", BUDGETS, budget_row(12, 1e18, "1e18", factor=3, empty=True))
    )
    (row,) = found.rows
    assert row.get("parameters_scaling") is None
    assert "no known family" in found.defects[0].message


def test_tokens_that_exceed_the_budget_make_a_row_unusable(write: Write) -> None:
    rows = (budget_row(12, 1e18, "1e18", factor=2), budget_row(14, 1e18, "1e18"))
    found = read_import(write("results.csv", BUDGETS, *rows))
    assert codes(found)["tokens-disagree"] == [2]
    assert [found.usable(row) for row in found.rows] == [False, True]
    assert found.rows[0].get("tokens") == 2 * nanochat(12, flops=1e18).tokens, "what was read stays"


def test_a_rounded_budget_is_reported_and_replaced_by_the_flops_of_the_tokens(
    write: Write,
) -> None:
    found = read_import(write("results.csv", BUDGETS, budget_row(12, 2.15e18, "2e+18")))
    assert codes(found)["budget-rounded"] == [2]
    assert found.rows[0].get("flops") == nanochat(12, flops=2.15e18).flops
    assert found.usable(found.rows[0])


def test_a_core_of_zero_is_missing_but_the_run_is_finished(write: Write) -> None:
    found = read_import(write("results.csv", BUDGETS, budget_row(12, 1e18, "1e18", core="0.0")))
    (row,) = found.rows
    assert (row.get("core"), row.get("val_bpb"), row.get("status")) == (None, 0.912, "finished")
    assert codes(found)["core-zero"] == [2]
    assert row.original["core_score"] == "0.0"


def test_tokens_computed_with_a_wrong_batch_size_are_reported(write: Write) -> None:
    """miniseries.sh multiplies by 524,288 whatever the batch: at d20 the run's was twice that."""
    rows = []
    for depth, steps in ((10, 1605), (12, 2520), (20, 4980)):
        groups = nanochat(depth).parameters
        tokens = steps * 524288
        ratio = tokens / groups.scaling
        rows.append(
            f"{depth},{64 * depth},{groups.total},{groups.scaling},{steps},{tokens},"
            f"{ratio:.2f},0.9,0.1,10"
        )
    found = read_import(write("results.csv", SERIES, *rows))
    assert codes(found)["tokens-disagree"] == [4]


def test_a_crashed_trial_is_a_failed_run_without_a_result(write: Write) -> None:
    rows = ("a1b2c3d\t0.99\t44.0\tkeep\tbaseline", "e05a87d\t0.000000\t0.0\tcrash\tbatch 131K")
    found = read_import(write("results.tsv", TSV, *rows))
    kept, crashed = found.rows
    assert (crashed.get("val_bpb"), crashed.get("status"), crashed.get("reason")) == (
        None,
        "failed",
        "error",
    )
    assert set(found.flags(crashed)) == {"crash-zero", "failed"}
    assert kept.get("peak_memory_bytes") == round(44.0 * 2**30)
    assert kept.get("commit") == "a1b2c3d"


def test_a_final_loss_of_an_untrained_model_is_reported(write: Write) -> None:
    found = read_import(write("runs.csv", "depth,val_bpb", "12,3.2", "14,0.9"))
    assert codes(found)["untrained"] == [2]


def test_a_truncated_log_has_no_final_value(write: Write) -> None:
    steps = [
        f"step {step:05d}/00020 ({5 * step}.00%) | loss: {5 - step / 10} | dt: 1.00ms"
        for step in range(10)
    ]
    found = read_import(write("d4.log", "Step 00000 | Validation bpb: 3.167584", *steps))
    (row,) = found.rows
    assert (row.get("val_bpb"), row.get("status"), len(row.curve)) == (None, "interrupted", 11)
    assert "unfinished" in found.flags(row)


def test_parameters_that_do_not_add_up_are_reported(write: Write) -> None:
    header = (
        "params_wte,params_value_embeds,params_lm_head,params_transformer,params_total,"
        "params_scalars,val_bpb"
    )
    found = read_import(
        write("runs.csv", header, "10,10,10,100,130,0,0.9", "10,10,10,100,150,0,0.8"),
        mapping={"parameters_scalars": "params_scalars"},
    )
    assert codes(found)["parameters-disagree"] == [3]


def test_duplicates_copied_values_and_unlabelled_seeds_are_distinguished(write: Write) -> None:
    rows = (
        "a,12,0.912345678",
        "a,12,0.912345678",
        "b,12,0.934567891",
        "b,12,0.934512345",
        "c,14,0.912345678",
        "d,16,0.876543219",
    )
    told = codes(read_import(write("runs.csv", "name,depth,val_bpb", *rows)))
    assert told["duplicate"] == [3]
    assert told["unlabelled-seed"] == [4, 5]
    assert told["copied-value"] == [2, 3, 6]


def test_equal_values_of_few_digits_are_not_reported_as_copied(write: Write) -> None:
    rows = [f"run {index},{index},0.9{index % 7}" for index in range(1, 30)]
    assert "copied-value" not in codes(read_import(write("runs.csv", "name,depth,val_bpb", *rows)))


def test_a_loss_in_bits_per_byte_is_recognised(write: Write) -> None:
    found = read_import(
        write("runs.csv", "depth,val_loss,train_loss", "8,1.13,3.82", "8,3.79,3.82")
    )
    bits, nats = found.rows
    assert (bits.get("val_bpb"), bits.get("val_loss")) == (1.13, None)
    assert (nats.get("val_bpb"), nats.get("val_loss")) == (None, 3.79)
    assert codes(found) == {"no-result": [3], "loss-is-bpb": [2], "unlabelled-seed": [2, 3]}


def test_units_in_headers_and_cells_are_applied(write: Write) -> None:
    header = "depth,params_M,tokens (B),Val BPB,CORE (centered),train_time_min,total_batch_size"
    (row,) = read_import(write("runs.csv", header, "7,91.5,0.73,1.03,0.07,1:30h,524288")).rows
    assert {
        name: row.get(name)
        for name in ("parameters_total", "tokens", "val_bpb", "core", "train_seconds")
    } == {
        "parameters_total": 91_500_000,
        "tokens": 730_000_000,
        "val_bpb": 1.03,
        "core": 0.07,
        "train_seconds": 5400,
    }
    assert row.get("batch_tokens") == 524288


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1.14B", 1.14e9, 1e7),
        ("2.15e18", 2.15e18, 1e16),
        ("1,384,124,976", 1_384_124_976, 1),
        ("1.2063E+017", 1.2063e17, 1e13),
    ],
)
def test_numbers_are_read_with_the_unit_of_their_last_digit(
    text: str, value: float, unit: float
) -> None:
    found = number(text)
    assert found is not None
    assert (found.value, found.unit) == (value, unit)


@pytest.mark.parametrize("text", ["", "d12", "70M-235M", "1e999", "0x10", "1 2", "٣"])
def test_text_that_is_not_a_number_is_none(text: str) -> None:
    assert number(text) is None


def test_the_unit_of_a_duration_overrides_the_default() -> None:
    told = [seconds(text, 60.0) for text in ("5", "9:56h", "1.6 hrs", "8 min")]
    assert [one and one.value for one in told] == [300, 35760, 5760, 480]


def test_a_markdown_table_reads_like_the_same_csv(write: Write) -> None:
    csv = read_import(write("a.csv", "run,depth,val_bpb", "base,12,0.98", "new,12,0.97"))
    text = (
        "Results:",
        "",
        "| run | depth | **val_bpb** |",
        "|:---|---:|---|",
        "| base | 12 | 0.98 |",
        "| `new` | 12 | **0.97** |",
    )
    markdown = read_import(write("a.md", *text))
    assert [row.values for row in csv.rows] == [row.values for row in markdown.rows]


def test_a_mapping_names_columns_that_are_not_recognised(write: Write) -> None:
    path = write("runs.csv", "size,score_M,cost", "12,0.98,2e18")
    with pytest.raises(ValueError, match="--map val_bpb=COLUMN"):
        read_import(path)
    (row,) = read_import(path, mapping={"loss": "score_M", "flops": "cost", "depth": "size"}).rows
    assert (row.get("val_bpb"), row.get("flops"), row.get("depth")) == (0.98, 2e18, 12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ("flops,params,tokens,val_bpb", "1e18,136706248,1116751173,0.97", "3e18,2,3,0.9"),
            "optima, not runs",
        ),
        (("target,core,depth", "GPT-2,0.257,38"), "predictions, not runs"),
        (("depth,baseline_val_bpb,best_val_bpb", "8,1.1,1.0"), "2 results per row"),
        (("depth,core_clean", "8,0.1"), "--map core='core_clean'"),
        (("depth,depth,val_bpb", "8,8,1"), "appears twice"),
        (("depth,val_bpb",), "no row"),
        (("nothing here",), "the format is not recognised"),
    ],
)
def test_a_file_without_runs_is_refused_with_a_remedy(
    write: Write, rows: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_import(write("some.csv", *rows))


HARNESS = {
    "meta.json": (
        '{"name": "jul4", "git_commit": "92d63d4", "git_dirty": true, "dataset": "climbmix"}',
    ),
    "d12/base_train.log": (
        "argv depth=12 target_param_data_ratio=12",
        "config n_layer=12 n_embd=768 sequence_len=2048 window_pattern=SSSL",
        "params wte=25165824 value_embeds=150994944 lm_head=25165824 "
        "transformer_matrices=84935088 scalars=50 "
        "total=286261730",
        "eval step=0 val_bpb=3.2",
        "step 00000/02520 (0.00%) | loss: 10.4 | lrm: 0.03 | dt: 300.00ms | tok/sec: 1,700,000 "
        "| total time: 0.00m",
        "a line of prose with step=1 in it",
        "eval step=2520 val_bpb=0.85",
        "core step=2520 core=0.15",
        "summary model_tag=d12 depth=12 num_params=286261730 num_scaling_params=110100912 "
        "num_iterations=2520 "
        "total_batch_size=524288 tokens_trained=1321205760 train_time_sec=700.5 "
        "peak_vram_mib=40000 val_bpb=0.85 "
        "core=0.15 gpu='NVIDIA H100 80GB HBM3'",
    ),
    "d8/base_train.log": (
        "params wte=16777216",
        "eval step=0 val_bpb=3.2",
        "step step=10 loss=7.5 lrm=0.2",
    ),
}


@pytest.fixture
def harness(write: Write, tmp_path: Path) -> Path:
    """An experiment of the harness: one run finished, one cut short."""
    for name, rows in HARNESS.items():
        write(f"jul4/{name}", *rows)
    return tmp_path / "jul4"


def test_a_folder_of_the_harness_gives_one_row_per_run(harness: Path) -> None:
    found = read_import(harness)
    assert (found.format, found.experiment) == ("harness", "jul4")
    short, done = found.rows
    given = nanochat(12)
    assert done.get("label") == "d12"
    assert (done.get("val_bpb"), done.get("core"), done.get("tokens")) == (0.85, 0.15, given.tokens)
    assert (done.get("parameters_scaling"), done.get("flops_per_token")) == (
        given.parameters.scaling,
        given.flops_per_token,
    )
    assert (done.get("commit"), done.get("corpus"), done.get("device_name")) == (
        "92d63d4",
        "climbmix",
        "NVIDIA H100 80GB HBM3",
    )
    assert done.original["argv"]["target_param_data_ratio"] == "12"
    assert [event["event"] for event in done.curve] == ["eval", "train", "eval"]
    assert done.curve[-1]["core"] == 0.15
    assert (short.get("status"), short.get("val_bpb"), len(short.curve)) == ("interrupted", None, 2)
    assert codes(found)["dirty-code"] == [1, 2]


def test_a_stored_import_has_every_column_and_the_source_files(
    harness: Path, tmp_path: Path
) -> None:
    found = read_import(harness, axis="climbmix")
    home = tmp_path / "home"
    assert write_import(found, home)
    folder = home / "imports" / found.hash
    told: dict[str, Any] = json.loads((folder / "import.json").read_text())
    assert (told["axis"], told["source"], told["strict"]) == ("climbmix", "jul4", False)
    for row in told["rows"]:
        assert set(row) == {*COLUMNS, "run_id", "row", "flags", "usable", "original"}
        assert row["run_id"].startswith("x")
        assert len(row["run_id"]) == 12
        assert row["recipe"] == "jul4"
        curve = (folder / "curves" / f"{row['run_id']}.jsonl").read_text().splitlines()
        assert all(json.loads(line)["event"] in ("train", "eval") for line in curve)
    assert (folder / "original/d8/base_train.log").read_bytes() == (
        harness / "d8/base_train.log"
    ).read_bytes()
    assert not list((home / "imports").glob(".*"))
    assert not write_import(found, home), "the same content is one import"
    assert remove_import(home, "jul4") == "jul4"
    assert not folder.exists()


def test_names_in_a_source_do_not_become_paths(write: Write, tmp_path: Path) -> None:
    path = write("..evil name.csv", "run,depth,val_bpb", "../../etc,12,0.9")
    home = tmp_path / "home"
    found = read_import(path)
    write_import(found, home)
    kept = {str(one.relative_to(home)) for one in home.rglob("*") if one.is_file()}
    assert kept == {
        f"imports/{found.hash}/import.json",
        f"imports/{found.hash}/original/evil_name.csv",
    }
    assert found.rows[0].get("label") == "../../etc"


def test_an_experiment_name_that_exists_is_refused(write: Write, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_import(read_import(write("runs.csv", "depth,val_bpb", "12,0.9")), home)
    with pytest.raises(ValueError, match="choose another with --name"):
        write_import(read_import(write("runs.csv", "depth,val_bpb", "12,0.8")), home)
    (home / "experiments").mkdir()
    (home / "experiments" / "swept.json").write_text("{}")
    with pytest.raises(ValueError, match="'swept' exists"):
        write_import(read_import(write("other.csv", "depth,val_bpb", "12,0.7"), name="swept"), home)


def test_bytes_that_are_not_text_are_reported_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(b"run,val_bpb\ncaf\xe9,0.9\n")
    found = read_import(path)
    assert codes(found)["invalid-utf8"] == [None]
    assert found.rows[0].get("label") == "caf\ufffd"
    path.write_bytes(b"PAR1\0\0\0\0")
    with pytest.raises(ValueError, match="not a text"):
        read_import(path)


def test_a_link_in_a_folder_is_not_followed(harness: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.log"
    secret.write_text("Step 00010 | Validation bpb: 0.5\n")
    (harness / "d16").mkdir()
    (harness / "d16/base_train.log").symlink_to(secret)
    assert len(read_import(harness).rows) == 2


def test_every_defect_code_has_a_severity_and_no_comma() -> None:
    assert {code.weight for code in CODES.values()} == {"forbids", "warns", "notes"}
    assert not any("," in code or " " in code for code in CODES)


@pytest.fixture
def search(write: Write) -> str:
    """The path of a table of two trials, one of which crashed."""
    rows = ("a1b2c3d\t0.99\t44.0\tkeep\tbaseline", "e05a87d\t0.000000\t0.0\tcrash\tbatch 131K")
    return str(write("results.tsv", TSV, *rows))


def test_a_strict_import_refuses_defects_and_writes_nothing(search: str, tmp_path: Path) -> None:
    refused = slm("import", search, "--strict", home=tmp_path / "home")
    assert refused.returncode == 2
    assert "crash-zero in row 3" in refused.stderr
    assert not (tmp_path / "home").exists()


def test_the_command_reports_defects_and_imports_a_file_once(search: str, tmp_path: Path) -> None:
    arguments = ("import", search, "--name", "search")
    first = slm(*arguments, home=tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert "imported as 'search'" in first.stdout
    assert "1 usable" in first.stdout
    assert "crash-zero" in first.stdout
    again = json.loads(slm(*arguments, "--json", home=tmp_path / "home").stdout)
    assert [one["outcome"] for one in again["imports"]] == ["imported before"]
    assert [one["code"] for one in again["imports"][0]["defects"]] == ["crash-zero", "failed"]


def test_commands_on_runs_name_the_command_that_reads_imports(search: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_import(read_import(Path(search), "search"), home)
    store.ingest(home)
    assert "`slm report search`" in slm("status", "search", home=home).stderr
    run_id = store.results(home=home)["run_id"][0]
    assert "`slm query` reads its row" in slm("show", run_id, home=home).stderr


def test_the_command_removes_an_import(search: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_import(read_import(Path(search), "search"), home)
    store.ingest(home)
    gone = slm("import", "--remove", "search", home=home)
    assert (gone.returncode, gone.stdout) == (0, "removed import 'search'\n")
    assert not list((home / "imports").iterdir())


def test_thousands_of_empty_lines_or_equal_rows_are_read(write: Write) -> None:
    """Thousands of each, as spreadsheets and logs have them."""
    rule = write("rule.csv", "depth,val_bpb,note", f"12,0.9,{'-' * 5000}", *[""] * 20_000)
    assert len(read_import(rule).rows) == 1
    equal = read_import(
        write("equal.csv", "run,depth,val_bpb", *(f"{n},4,{1 + n / 1e5}" for n in range(5000)))
    )
    assert codes(equal)["unlabelled-seed"] == list(range(2, 5002))
    assert max(len(defect.message) for defect in equal.defects) < 100


def test_absurdly_large_numbers_are_refused(write: Write) -> None:
    found = read_import(write("runs.csv", "depth,val_bpb,flops", "12,0.9,1e300T"))
    assert codes(found)["bad-number"] == [2]


def test_an_ambiguous_import_is_removed_by_its_hash(write: Write, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for one in range(2):
        found = read_import(write(f"{one}.csv", "depth,val_bpb", f"12,0.{8 + one}"), "old")
        write_import(found, home)
        document = home / "imports" / found.hash / "import.json"
        document.write_text(document.read_text().replace('"old"', '"new"'))
    with pytest.raises(ValueError, match=f"name one by its hash, .*{found.hash}"):
        remove_import(home, "new")
    assert remove_import(home, found.hash) == "new"
    assert list(imported_experiments(home).values()) == ["new"]


def test_readable_files_are_imported_although_another_is_refused(
    write: Write, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    good, bad = (
        write("good.csv", "depth,val_bpb", "12,0.9"),
        write("bad.csv", "depth,ratio", "12,3"),
    )
    result = slm("import", str(bad), str(good), "--json", home=home)
    assert result.returncode == 2
    document = json.loads(result.stdout)
    assert [one["experiment"] for one in document["imports"]] == ["good"]
    assert len(document["refused"]) == 1
    assert "bad.csv: no results" in result.stderr


def test_a_row_without_a_result_is_a_failed_run(write: Write) -> None:
    found = read_import(write("runs.csv", "depth,val_bpb,core", "12,0.9,0.1", "14,,26.3"))
    assert [row.get("status") for row in found.rows] == ["finished", "failed"]
    assert codes(found) == {"no-result": [3], "bad-number": [3]}


def test_a_damaged_file_is_read_or_refused_and_every_finished_row_has_a_result(
    tmp_path: Path,
) -> None:
    sound = "\n".join(
        (BUDGETS, *(budget_row(depth, 2.15e18, "2.15e18") for depth in (10, 12, 14)))
    ).encode()
    odd = (
        b",",
        b"\t",
        b'"',
        b"\n",
        b"\r",
        b"\xff",
        b"1e999",
        b"nan",
        b"-1",
        b"0",
        b"|",
        b"9" * 400,
        b"E+017",
        b"",
    )
    path, chance, refused = tmp_path / "results.csv", random.Random(1), list[str]()
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(chance.randint(1, 10)):
            start = chance.randrange(len(damaged))
            damaged[start : start + chance.randint(0, 6)] = chance.choice(odd)
        path.write_bytes(damaged)
        try:
            told = import_document(read_import(path), strict=False, created=0.0)
        except ValueError as error:
            refused.append(str(error))
            continue
        json.dumps(told, allow_nan=False)
        for row in told["rows"]:
            assert (
                row["status"] != "finished"
                or row["val_bpb"]
                or row["val_loss"]
                or row["core"] is not None
            )
            assert all(row[name] is None or 0 < row[name] < 2**63 for name in ("tokens", "steps"))
    assert 0 < len(refused) < 300
    assert not any("\n" in line for line in refused)
