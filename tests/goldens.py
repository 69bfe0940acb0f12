"""Goldens: outputs of the command line for a small home of trained runs.

`python -m tests.goldens` compares and lists every value that differs; `python -m tests.goldens
--record` writes `tests/golden/*.json`. `--only WORD` selects the cases whose names contain the word.
With SLM_REFERENCE set to the folder of published figures, their fits and imports are cases, too.

Everything goes through the command line, so that no case depends on the names of modules and
functions. A golden keeps keys, numbers to the last digit, identifiers, codes and exit codes. It does
not keep prose, paths, current times, versions, or hashes of prose.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from html.parser import HTMLParser
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

# As the command line does, and before numpy reads it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

FOLDER = Path(__file__).parent / "golden"
"""Folder of the goldens, their home and their data."""
VERSIONS = FOLDER / "made_with.txt"
"""Versions that made the goldens."""
TEXT, NOW, PATH = "<text>", "<now>", "<path>"
"""Stand-ins for prose, for the time of the comparison, and for a path."""
WORDS = 4
"""A string of so many words is prose."""
LONG = 60
"""A query with more rows is recorded as a digest and its first rows."""
MAX_DIFFERENCES = 12
"""Largest number of differences listed for one case."""
DAY = 86400.0


@dataclass(frozen=True)
class Case:
    """A command, and the way to read its output."""

    name: str
    """The golden's file name, without ending."""
    arguments: tuple[str, ...]
    """Arguments of `slm`; {names} are filled in."""
    kind: str = "json"
    """json, csv, rows (JSON of a query), text, or report (JSON and the page it names)."""
    home: str = "home"
    """Copy of the home to run in: commands that change a home have another one."""

    @property
    def needs_reference(self) -> bool:
        """Whether it reads published figures."""
        return any("{reference}" in word for word in self.arguments)


def groups() -> list[list[Case]]:
    """List every case in the order to run it. Groups have their own homes and run in parallel."""
    return [
        [*_fits(), *_compared(), *_designs()],
        [*_sizes(), *_runs(), *_queries(), *_reports(), *_after()],
        [*_files(), *_imports()],
    ]


def cases() -> list[Case]:
    """List every case that can run: published figures need SLM_REFERENCE."""
    every = [case for group in groups() for case in group]
    return [case for case in every if os.environ.get("SLM_REFERENCE") or not case.needs_reference]


def _sizes() -> Iterator[Case]:
    yield Case("size-pocket", ("size", "--recipe", "pocket", "--depths", "1-12,24,100", "--json"))
    yield Case(
        "size-nanochat", ("size", "--recipe", "nanochat", "--depths", "1-6,8-34,100", "--json")
    )
    yield Case(
        "size-nanochat-table",
        ("size", "--recipe", "nanochat", "--depths", "4,8,12,16,20,24"),
        "text",
    )
    yield Case("size-refused", ("size", "--depths", "4-x", "--json"))
    plan = ("--dry-run", "--json")
    eight = ("--gpus", "8", "--price", "24/h")
    yield Case("plan-ladder", ("sweep", "--depths", "10-20", *eight, *plan))
    yield Case("plan-ladder-table", ("sweep", "--depths", "10-20", *eight, "--dry-run"), "text")
    grid = (
        "sweep",
        "--recipe",
        "nanochat",
        "--depths",
        "8-14",
        "--flops",
        "1e18,2.15e18,4.64e18",
        "--name",
        "grid",
    )
    yield Case("plan-grid", (*grid, "--gpus", "8", "--gpu", "A100", "--price", "3/gpu/h", *plan))
    yield Case(
        "plan-ratios",
        ("sweep", "--depths", "12,16", "--ratios", "4,8,16", "--seeds", "2", *eight, *plan),
    )
    yield Case(
        "plan-steps",
        ("sweep", "--depths", "12,26", "--steps", "100", *eight, "--gpus-per-run", "2", *plan),
    )
    slurm = (
        "--launcher",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--time",
        "4:00:00",
        "--price",
        "98/h",
    )
    yield Case("plan-slurm", ("sweep", "--depths", "10-20,30", *slurm, *plan))
    for name in ("crippled", "isoflop", "miniseries", "pocket_rates", "repeat", "seeds"):
        yield Case(
            f"plan-declared-{name}", ("sweep", "{root}/experiments/" + f"{name}.py", *eight, *plan)
        )


def _runs() -> Iterator[Case]:
    yield Case("store-rebuild", ("store", "rebuild", "--json"))
    yield Case("store-check", ("store", "check", "--json"))
    yield Case("data-list", ("data", "list", "--json"))
    yield Case("data-verify", ("data", "verify", "--json"))
    yield Case("status", ("status", "--json"))
    yield Case("status-table", ("status",), "text")
    yield Case("status-isoflop", ("status", "isoflop", "--json"))
    yield Case("status-unknown", ("status", "nonesuch", "--json"))
    for name in ("ladder-0", "ladder-3", "crippled-4", "isoflop-5", "miniseries-2", "stopped-0"):
        yield Case(f"show-{name}", ("show", "{" + name + "}", "--json"))
    yield Case("logs-ladder-3", ("logs", "{ladder-3}", "--lines", "5", "--json"))
    yield Case("logs-stopped-0", ("logs", "{stopped-0}", "--lines", "3", "--json"))


TABLES = {
    "results": "home, run_id",
    "status": "home, run_id",
    "noise": "home, recipe, depth, horizon, comparison_key, code",
    "latest_attempts": "home, run_id",
    "micro_batches": "device_name, ranks, depth, width",
    "curves": "home, run_id, step",
    "metrics_latest": "home, run_id, event, step, name, attempt",
    "runs": "home, run_id",
    "attempts": "home, run_id, attempt",
    "metrics": "home, run_id, attempt, event, step, name, time",
    "finished": "home, run_id",
    "evaluations": "home, run_id, evaluation",
    "evaluation_tasks": "home, run_id, evaluation, task",
    "evaluation_examples": "home, run_id, evaluation, task, example",
    "imports": "home, hash",
    "imported": "home, hash, row",
    "experiments": "home, name",
    "memberships": "home, experiment, position",
    "homes": "home",
    "fits": "home, hash",
}
"""Views and tables whose rows do not depend on the machine, with the columns that order them."""


def _queries() -> Iterator[Case]:
    for table, order in TABLES.items():
        query = ("query", f"select * from {table} order by {order}")
        yield Case(f"query-{table}", (*query, "--format", "json"), "rows")
        if table in ("results", "noise", "curves", "evaluation_tasks", "imported", "memberships"):
            yield Case(f"query-{table}-csv", (*query, "--format", "csv"), "csv")
        if table in ("noise", "status", "finished"):
            yield Case(f"query-{table}-markdown", (*query, "--format", "markdown"), "text")
    cursors = "select file, \"offset\" from cursors where file like '%events.jsonl' order by file"
    yield Case("query-cursors", ("query", cursors, "--format", "json"), "rows")
    query = "select depth, seed, val_bpb, flops from results where flops > $least order by flops, seed, depth, val_bpb"
    yield Case("query-param", ("query", query, "--param", "least=5e9", "--format", "json"), "rows")
    yield Case(
        "query-limit",
        ("query", query, "--param", "least=1", "--limit", "3", "--format", "csv"),
        "csv",
    )
    yield Case(
        "query-refused", ("query", "select nonesuch from results", "--format", "json"), "rows"
    )


PUBLISHED = {
    "autoresearch": "karpathy_h100_mar8.tsv pr109_m2pro_loop_results.tsv pr109_m2pro_results.tsv "
    "pr158_depth12_results.tsv pr238_bayesian_focused.jsonl pr238_genetic_focused.jsonl pr242_small_gpu_results.tsv "
    "pr442_ane_results.tsv pr71_multi_gpu_agents_results.tsv",
    "forks": "arch_sweep_rtx4090_5k.csv looped_hparam_sweep_s12_2026-02-08.csv looped_isoflop_optima_2026-02-01.csv "
    "looped_recursion_isoflop_2026-02-12.csv seqaeon_base_step004410_core.csv seqaeon_depth_series_from_html.csv "
    "seqaeon_mst_results.csv seqaeon_mst_results_p01.csv seqaeon_mst_results_p02.csv "
    "seqaeon_remixed-linear_step007699_core.csv seqaeon_remixed-linear_step024662_core.csv "
    "vibenanochat_isoflop_optima.csv",
    "karpathy": "auto_batch_by_depth_2026-02-05.csv depth_ladder_2026-07-04.csv gpt2_gpt3_core.csv "
    "isoflop_optima_2026-01-07.csv isoflop_optima_2026-01-27_three_param_conventions.csv leaderboard_2026-07-03.csv "
    "miniseries_v1_2026-01-07.csv miniseries_v1_extrapolation.csv weight_decay_optimum_by_depth_2026-01-10.csv "
    "x0_beta1_sweep_d20_2026-01-22.csv x0_lambdas_across_depths_2026-01-11.csv",
    "logs": "pr492_base_train_d24_thinned.log pr492_d24_val_bpb_curve.csv",
    "pulls": "pr376_results.csv pr376_results_ntk.csv pr376_results_pi.csv pr376_results_rope.csv "
    "pr376_results_yarn.csv pr376_wandb_overall.csv pr516_2runs.csv pr660_m2ultra_capacity.csv pr669_top5.csv "
    "pr733_followup_controlled.csv pr747_bigram_d16_h100.csv pr771_train_step_bench_h20.csv",
}
"""Every file of the reference's data/nanochat, by folder."""


def _imports() -> Iterator[Case]:
    for file in (
        "results.csv",
        "results.tsv",
        "ladder.md",
        "points.csv",
        "pairs.csv",
        "unknown.csv",
    ):
        yield Case(f"import-{file}", ("import", "{data}/" + file, "--dry-run", "--json"))
    mapped = (
        "import",
        "{data}/points.csv",
        "--map",
        "val_loss=nats,tokens=d,flops=compute",
        "--dry-run",
        "--json",
    )
    yield Case("import-mapped", mapped)
    yield Case("import-strict", ("import", "{data}/results.csv", "--strict", "--dry-run", "--json"))
    for folder, files in PUBLISHED.items():
        for file in files.split():
            path = "{reference}/data/nanochat/" + f"{folder}/{file}"
            yield Case(f"published-import-{file}", ("import", path, "--dry-run", "--json"))
    forced = "{reference}/data/nanochat/karpathy/isoflop_optima_2026-01-07.csv"
    yield Case(
        "published-import-forced", ("import", forced, "--format", "table", "--dry-run", "--json")
    )


def _fits() -> Iterator[Case]:
    for name, arguments in {
        "ladder": "ladder --depth 5,8 --at 1e11,1e12",
        "ladder-loss": "ladder --metric loss --at 1e11",
        "ladder-total": "ladder --params total --depth 5",
        "ladder-matrices": "ladder --params matrices --depth 5",
        "ladder-core": "ladder --metric core --at 1e11",
        "ladder-reach": "ladder --reach 0.3 --price 2",
        "ladder-power": "ladder --form power --at 1e11",
        "seeds": "seeds --depth 4 --at 5e10",
        "seeds-core": "seeds --metric core --at 5e10",
        "seeds-reach": "seeds --reach 0.25 --price 2",
        "crippled": "crippled --at 5e10",
        "isoflop": "isoflop --depth 4,6 --at 1e10,1e12",
        "isoflop-total": "isoflop --params total --at 1e11",
        "isoflop-coupled": "isoflop --form coupled --at 1e11",
        "isoflop-power": "isoflop --form power --at 1e11",
        "isoflop-paper": "isoflop --paper --at 1e11",
        "miniseries": "miniseries --depth 4",
        "both": "miniseries isoflop --depth 4,5 --at 1e11",
        "mixed": "ladder crippled --allow-mixed --at 1e11",
        "imported": "results --at 1e19",
        "unmixed": "ladder crippled",
        "unknown": "nonesuch",
        "unnamed": "",
    }.items():
        yield Case(f"fit-{name}", ("fit-curves", *arguments.split(), "--json"))
    yield Case("fit-seeds-table", ("fit-curves", "seeds", "--depth", "4", "--at", "5e10"), "text")


def _files() -> Iterator[Case]:
    """Give fits of files, which no home records."""
    columns = "params=n,tokens=d,flops=compute,loss=nats,core=core_score,weight=w,outlier=flag"
    yield _of_file("fit-file", "{data}/points.csv", columns, "--at", "1e19,1e21")
    yield _of_file(
        "fit-file-core", "{data}/points.csv", columns, "--metric", "core", "--reach", "0.3"
    )
    yield _of_file("fit-file-paper", "{data}/points.csv", columns, "--paper")
    yield _of_file("fit-file-refused", "{data}/points.csv", "params=n")
    published = "{reference}/data/scaling/"
    chinchilla = published + "chinchilla_epoch/points.csv"
    yield _of_file("published-fit-chinchilla-budgets", chinchilla, "outlier=excluded_by_epoch")
    yield _of_file(
        "published-fit-chinchilla",
        chinchilla,
        "outlier=excluded_by_epoch,budget=none",
        "--at",
        "5.76e23",
    )
    for name in ("paper", "additive", "coupled", "power"):
        form = ("--paper",) if name == "paper" else ("--form", name)
        yield _of_file(
            f"published-fit-chinchilla-{name}",
            chinchilla,
            "outlier=excluded_by_epoch,budget=none",
            *form,
        )
    nanochat = "params=params_effective,flops=flops_budget,budget=flops_budget,loss=val_bpb"
    points = published + "nanochat_isoflop/points_2026-01-26.csv"
    yield _of_file("published-fit-nanochat", points, nanochat, "--at", "1e19,1e21")
    yield _of_file("published-fit-nanochat-paper", points, nanochat, "--paper", "--at", "1e19")
    llama = published + "llama3_isoflop/points.csv"
    yield _of_file("published-fit-llama", llama, "flops=budget", "--at", "3.8e25")
    yield _of_file("published-fit-llama-paper", llama, "flops=budget", "--paper")
    gadre, losses = (
        published + "gadre_overtraining/c4_rpj_small.csv",
        "flops=flops_6nd,loss=loss_c4_val,budget=none",
    )
    named = f"{losses},core=core"
    yield _of_file("published-fit-gadre", gadre, named, "--at", "1e21")
    yield _of_file("published-fit-gadre-core", gadre, named, "--metric", "core", "--reach", "0.2")
    datasets = f"{named},recipe=dataset,comparison_key=dataset"
    yield _of_file("published-fit-gadre-unmixed", gadre, datasets)
    yield _of_file("published-fit-gadre-mixed", gadre, datasets, "--allow-mixed")
    yield _of_file(
        "published-fit-repetition", published + "repetition/c4_oscar_repetition.csv", "run=name"
    )
    optima = "{reference}/data/nanochat/karpathy/isoflop_optima_2026-01-07.csv"
    yield _of_file("published-fit-optima", optima, "loss=val_bpb,budget=none", "--at", "1e20")


def _of_file(name: str, path: str, columns: str, *more: str) -> Case:
    return Case(
        name,
        (
            "fit-curves",
            "--from",
            path,
            "--map",
            columns,
            *more,
            "--figure",
            "{work}/figure",
            "--json",
        ),
    )


def _compared() -> Iterator[Case]:
    for first, second in (("seeds", "crippled"), ("crippled", "seeds"), ("ladder", "crippled")):
        yield Case(f"compare-{first}-{second}", ("compare", first, second, "--json"))
        yield Case(
            f"compare-{first}-{second}-markdown", ("compare", first, second, "--markdown"), "text"
        )
    yield Case("compare-recipes", ("compare", "seeds/pocket", "pocket-fast-matrices", "--json"))
    yield Case("compare-text", ("compare", "seeds", "crippled"), "text")
    yield Case("compare-shared", ("compare", "seeds", "ladder", "--json"))
    yield Case("compare-unknown", ("compare", "seeds", "nonesuch", "--json"))
    file = (
        "compare",
        "--from",
        "{data}/pairs.csv",
        "--map",
        "recipe=model,loss=bpb",
        "--figure",
        "{work}/figure",
    )
    yield Case("compare-file", (*file, "--json"))
    yield Case("compare-file-markdown", (*file, "--markdown"), "text")


def _designs() -> Iterator[Case]:
    for name, arguments in {
        "exponent": "isoflop --target params_exponent --budget 1e11",
        "exponent-dear": "isoflop --target params_exponent --budget 3e12",
        "depth": "isoflop --target loss@d6 --budget 2e11",
        "compute": "isoflop --target loss@1e12 --budget 1e11 --depths 1-5",
        "alpha": "isoflop --target alpha --budget 1e11",
        "beta": "isoflop --target beta --budget 1e11",
        "E": "isoflop --target E --budget 1e12",
        "ladder": "ladder --target loss@d5 --budget 1e11",
        "both": "miniseries isoflop --target loss@d5 --budget 5e11",
        "multiplier": "isoflop --target multiplier --budget 1e11",
        "targetless": "isoflop --budget 1e11",
    }.items():
        yield Case(f"next-{name}", ("next", *arguments.split(), "--json"))
    yield Case("next-text", ("next", "isoflop", "--target", "loss@d6", "--budget", "2e11"), "text")


def _reports() -> Iterator[Case]:
    for name in (
        "ladder",
        "seeds",
        "crippled",
        "isoflop",
        "miniseries",
        "stopped",
        "results",
        "loop",
    ):
        yield Case(
            f"report-{name}", ("report", name, "--output", "{work}/report", "--json"), "report"
        )
    for name in ("seeds", "stopped", "results", "loop"):
        yield Case(f"report-{name}-markdown", ("report", name, "--markdown"), "text")
    yield Case("report-unknown", ("report", "nonesuch", "--json"))


def _after() -> Iterator[Case]:
    """List commands that change a home, and those that exchange runs between two homes."""
    yield Case(
        "after-query-fits", ("query", "select count(*) as n from fits", "--format", "json"), "rows"
    )
    yield Case("after-store-check", ("store", "check", "--json"))
    yield Case("after-stop", ("stop", "--json"))
    yield Case("export", ("export", "{work}/export", "--json"))
    yield Case("export-some", ("export", "{work}/export-some", "seeds", "results", "--json"))
    yield Case("export-again", ("export", "{work}/export", "--json"))
    yield Case("merge", ("import", "{work}/export", "--json"), home="other")
    yield Case("merge-again", ("import", "{work}/export", "--json"), home="other")
    yield Case("merge-status", ("status", "--json"), home="other")
    yield Case("merge-check", ("store", "check", "--json"), home="other")
    results = f"select run_id, source, recipe, flops, val_bpb, core, flags from results order by {TABLES['results']}"
    yield Case("merge-results", ("query", results, "--format", "json"), "rows", home="other")
    command = (
        "import",
        "{data}/points.csv",
        "--map",
        "val_loss=nats,tokens=d,flops=compute",
        "--name",
        "own",
    )
    yield Case("import-kept", (*command, "--axis", "ours", "--json"), home="changed")
    yield Case("import-kept-again", (*command, "--axis", "ours", "--json"), home="changed")
    yield Case(
        "import-kept-fit",
        ("fit-curves", "own", "--metric", "loss", "--at", "1e20", "--json"),
        home="changed",
    )
    yield Case("import-removed", ("import", "--remove", "own", "--json"), home="changed")
    yield Case("retry", ("retry", "{stopped-0}", "--json"), home="changed")
    yield Case("retry-finished", ("retry", "{ladder-3}", "--json"), home="changed")
    yield Case("retry-status", ("status", "stopped", "--json"), home="changed")
    yield Case("rm", ("rm", "{ladder-0}", "--yes", "--json"), home="changed")
    yield Case("rm-status", ("status", "ladder", "--json"), home="changed")
    yield Case("rm-check", ("store", "check", "--json"), home="changed")


class Session:
    """Run every case once, in copies of the golden home below one folder."""

    def __init__(self, work: Path) -> None:
        """Copy the home twice: for commands that read, and for commands that change it."""
        self.work = work
        for name in ("home", "changed"):
            shutil.copytree(FOLDER / "home", work / name)
        (work / "other").mkdir()
        # An empty home gets a fixed identity: its first command would draw one.
        (work / "other" / "home.json").write_text('{"id": "00000002", "name": "other"}')
        self.started = time.time() - 1
        self.reference = os.environ.get("SLM_REFERENCE") or None
        self.names = {"home": str(work / "home"), "work": str(work), "data": str(FOLDER / "data")}
        self.names |= {"root": str(FOLDER.parent.parent), "reference": self.reference or ""}
        for path in sorted((FOLDER / "home" / "experiments").glob("*.json")):
            for number, run in enumerate(json.loads(path.read_text())["runs"]):
                self.names[f"{path.stem}-{number}"] = run

    def outcome(self, case: Case) -> dict[str, Any]:
        """Run a case, and return its exit code and output as a golden holds them."""
        arguments = [
            re.sub(r"\{([\w-]+)\}", lambda match: self.names[match[1]], word)
            for word in case.arguments
        ]
        code, printed = self._run(arguments, self.work / case.home)
        return {
            "command": " ".join(["slm", *case.arguments]),
            "exit": code,
            "output": self._read(case.kind, printed) if printed.strip() else None,
        }

    def _run(self, arguments: list[str], home: Path) -> tuple[int, str]:
        """Call the command line as a shell would; return its exit code and output."""
        from slm.cli import main

        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        environment = {
            "SLM_HOME": str(home),
            "CUDA_VISIBLE_DEVICES": "",
            "TZ": "UTC",
            "COLUMNS": "200",
        }
        argv = mock.patch.object(sys, "argv", ["slm", *arguments])
        err = io.StringIO()
        with _in(self.work), _environment(environment), _quick_figures(), argv:
            code = 0
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    main()
            except SystemExit as end:
                code = int(end.code or 0)
        if os.environ.get("GOLDENS_VERBOSE"):
            sys.stderr.write(err.getvalue())
        return code, out.buffer.getvalue().decode()  # type: ignore[attr-defined]

    def _read(self, kind: str, printed: str) -> Any:
        if kind == "json":
            return self._value(json.loads(printed))
        if kind == "report":
            page = self._without_hashes((self.work / "report").read_text(encoding="utf-8"))
            return {"document": self._value(json.loads(printed)), "page": numbers_of_html(page)}
        if kind == "rows":
            return self._rows(json.loads(printed))
        if kind == "csv":
            return self._rows(list(csv.reader(io.StringIO(printed))))
        return numbers_of_text(self._without_hashes(printed))

    def _without_hashes(self, text: str) -> str:
        """Return a text without the hashes of recorded fits, which any change of prose changes."""
        for path in (self.work / "home" / "fits").glob("*.json"):
            text = text.replace(path.stem, "")
        return text

    def _rows(self, rows: list[Any]) -> Any:
        """Return the rows of a query, or of a long one a digest and the first rows."""
        values = [self._value(row) for row in rows]
        if len(values) <= LONG:
            return values
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return {"rows": len(values), "sha256": digest, "first": values[:3]}

    def _value(self, value: Any, key: str = "", parent: dict[str, Any] | None = None) -> Any:
        """Return a value of a document without prose, paths, current times and versions."""
        if parent is not None and key in VOLATILE:
            replacement = VOLATILE[key](value, parent)
            if replacement is not value:
                return replacement
        if isinstance(value, dict):
            return {name: self._value(item, name, value) for name, item in value.items()}
        if isinstance(value, list):
            return [self._value(item, key, parent) for item in value]
        if isinstance(value, float) and self.started <= value <= self.started + DAY:
            return NOW
        return self._string(value, key) if isinstance(value, str) else value

    def _string(self, text: str, key: str) -> Any:
        if text[:1] in ("{", "[") and (inner := _json(text)) is not None:
            return self._value(inner, key)
        for name in ("work", "data", "reference", "root"):
            if self.names[name]:
                text = text.replace(self.names[name], f"<{name}>")
        if text.startswith("slm ") or all("=" in word for word in text.split()):
            return text
        if key in PROSE or key.endswith("why") or len(text.split()) >= WORDS:
            return TEXT
        if key == "reason" and not re.fullmatch(r"[\w-]+", text):
            return TEXT
        return PATH if text.startswith("/") else text


PROSE = {
    "message",
    "messages",
    "text",
    "answer",
    "why",
    "question",
    "meaning",
    "first",
    "lines",
    "note",
    "notes",
}
PROSE |= {
    "problems",
    "refused",
    "sentence",
    "convention",
    "advice",
    "way",
    "log",
    "description",
    "warnings",
}
"""Keys whose strings are prose."""


def _fit_hash(value: Any, parent: dict[str, Any]) -> Any:
    """Hide the hash of a fit, which covers prose and versions; that of an import stays."""
    return "<hash>" if "kind" in parent and "experiments" in parent else value


def _of_parquet(value: Any, parent: dict[str, Any]) -> Any:
    """Hide size and hash of an exported file unless it is a copy of a file of the home."""
    name = str(parent.get("name", ""))
    copied = name.startswith("runs/") and "/fits/" not in name
    return value if copied or "name" not in parent else "<file>"


def _name(value: Any, parent: dict[str, Any]) -> Any:
    """Hide the hash in the name of an exported fit."""
    return re.sub(r"/fits/\w+", "/fits/<hash>", value) if "/fits/" in str(value) else value


VOLATILE: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "hash": _fit_hash,
    "name": _name,
    "versions": lambda value, parent: value if "host" in parent else "<versions>",
    "slm": lambda value, parent: "<version>",
    "bytes": _of_parquet,
    "sha256": _of_parquet,
    "state": lambda value, parent: value if "/" not in str(value) else "<state>",
}
"""Replacements of values that differ between machines, versions and days, by key."""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


NUMBER = re.compile(
    r"(?<![\w.])[+\-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+\-]?\d+)?(?=\W|[A-Za-z%×]{1,2}\b|$)"
)
DROPPED = re.compile(
    r"\d{4}-\d{2}-\d{2}|\d{1,2}:\d{2}(?::\d{2})?|\b\d+\.\d+\.\d+[\w+.]*|\b(?=\w*[a-f])(?=\w*\d)[0-9a-f]{6,64}\b"
)
"""Dates, times of day, versions and hashes are no measured numbers."""


def numbers(text: str) -> list[str]:
    """Return every number of a text as it is printed, without units."""
    return NUMBER.findall(DROPPED.sub(" ", text))


def numbers_of_text(text: str) -> dict[str, Any]:
    """Return the numbers of every table of Markdown or plain text by row, and the other numbers."""
    rows = []
    rest = []
    for line in text.splitlines():
        if line.startswith(("|", " ")) or re.search(r"\S {2,}\S", line):
            rows.append(numbers(line.replace("|", " ")))
        else:
            rest += numbers(line)
    return {"rows": [row for row in rows if row], "others": rest}


def numbers_of_html(text: str) -> dict[str, Any]:
    """Return the numbers of every table of an HTML page by row, and the other numbers."""
    reader = _Reader()
    reader.feed(text)
    return {
        "rows": [row for row in map(numbers, reader.rows) if row],
        "others": numbers(" ".join(reader.rest)),
    }


class _Reader(HTMLParser):
    """Parser that collects the text of a page: rows of its tables, and the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.rest: list[str] = []
        self._row, self._hidden = False, 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("script", "style", "svg")
        if tag == "tr":
            self._row = True
            self.rows.append("")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "svg")
        self._row = self._row and tag != "tr"

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._row:
            self.rows[-1] += f" {data} "
        else:
            self.rest.append(data)


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Set environment variables, without those that move the store or show tracebacks."""
    with mock.patch.dict(os.environ, more):
        for name in ("SLM_STORE", "SLM_DEBUG"):
            os.environ.pop(name, None)
        yield


@contextmanager
def _quick_figures() -> Iterator[None]:
    """Draw figures without rendering them, which takes most of the time."""
    from matplotlib.figure import Figure

    drawn = _empty_drawing()

    def save(self: Figure, path: Any, **options: Any) -> None:
        if isinstance(path, io.BytesIO):
            path.write(drawn)
        else:
            Path(path).write_bytes(drawn)

    with mock.patch.object(Figure, "savefig", save):
        yield


@cache
def _empty_drawing() -> bytes:
    from matplotlib.figure import Figure

    file = io.BytesIO()
    Figure(figsize=(1, 1)).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def differences(expected: Any, actual: Any, path: str = "", tolerance: float = 0.0) -> list[str]:
    """Describe every value that differs, a line each; numbers may differ by a relative tolerance."""
    lines: list[str] = []
    if isinstance(expected, dict) and isinstance(actual, dict):
        lines += [f"{path}: missing {name}" for name in expected.keys() - actual.keys()]
        lines += [f"{path}: new {name}" for name in actual.keys() - expected.keys()]
        for name in expected.keys() & actual.keys():
            lines += differences(expected[name], actual[name], f"{path}/{name}", tolerance)
        return lines
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            lines.append(f"{path}: {len(expected)} items, now {len(actual)}")
        for number, pair in enumerate(zip(expected, actual)):
            lines += differences(*pair, f"{path}/{number}", tolerance)
        return lines
    if type(expected) is type(actual) and expected == actual:
        return []
    numeric = all(
        isinstance(value, (int, float)) and not isinstance(value, bool)
        for value in (expected, actual)
    )
    if numeric and tolerance and math.isclose(expected, actual, rel_tol=tolerance):
        return []
    return [f"{path}: {expected!r}, now {actual!r}"]


def golden(case: Case) -> Path:
    """Return the file of a case's golden."""
    return FOLDER / f"{case.name}.json"


def compared(case: Case, outcome: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    """Describe every value of an outcome that differs from the golden, a line each."""
    path = golden(case)
    if not path.exists():
        return ["there is no golden"]
    return differences(json.loads(path.read_text(encoding="utf-8")), outcome, tolerance=tolerance)


def versions() -> dict[str, str]:
    """Return the machine and the versions on which the last digits of a fit depend."""
    packages = ("duckdb", "numpy", "pandas", "scipy")
    return {"machine": platform.machine()} | {name: metadata.version(name) for name in packages}


def outcomes(selected: Iterable[Case]) -> dict[str, dict[str, Any]]:
    """Run cases, one process per group; return what each printed, by name."""
    names = {case.name for case in selected}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(partial(_of_group, names), range(len(groups())))
        return {name: outcome for group in results for name, outcome in group.items()}


def _of_group(names: set[str], number: int) -> dict[str, dict[str, Any]]:
    results = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        session = Session(Path(folder).resolve())
        for case in groups()[number]:
            if case.name in names:
                start = time.perf_counter()
                results[case.name] = session.outcome(case)
                sys.stderr.write(f"{time.perf_counter() - start:6.1f} s  {case.name}\n")
    return results


def main() -> int:
    """Record or compare; return 1 if a value differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the goldens anew")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="only cases whose names contain the word"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="numbers may differ by this share",
    )
    options = parser.parse_args()
    selected = [case for case in cases() if options.only in case.name]
    results = outcomes(selected)
    if options.record and not options.only:
        VERSIONS.write_text(json.dumps(versions(), indent=1) + "\n")
    differ = 0
    for case in selected:
        if options.record:
            text = json.dumps(results[case.name], indent=1, ensure_ascii=False)
            golden(case).write_text(f"{text}\n", encoding="utf-8")
        elif lines := compared(case, results[case.name], options.tolerance):
            differ += 1
            sys.stdout.write(f"{case.name}: {len(lines)} differences\n")
            sys.stdout.writelines(f"    {line:.400}\n" for line in lines[:MAX_DIFFERENCES])
    left_out = sum(len(group) for group in groups()) - len(cases())
    last = f"{len(results)} cases, {differ} differ; {left_out} need SLM_REFERENCE and are left out"
    sys.stdout.write(f"{last}\n")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
