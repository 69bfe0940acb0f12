"""Defects of imported results: their codes, and the checks that all formats share.

A check looks at rows, fills in what it can compute where the source has nothing, removes what is
not a result, and reports it. Everything the source states otherwise stays.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.exchange.importers.architectures import Architecture, known_architectures
from slm.exchange.importers.numbers import is_empty, value_of
from slm.exchange.importers.readers import plain
from slm.exchange.importers.types import COUNTS, Defect, Row
from slm.text import first_few

Weight = Literal["forbids", "warns", "notes"]
"""Effect of a code: keeps the row out of fits, warns, or only notes.

`--strict` refuses a file with any code that does more than note.
"""


@dataclass(frozen=True)
class Code:
    """A kind of defect."""

    weight: Weight
    meaning: str


FORBIDS = {
    "crash-zero": "0 in place of a crashed run's result; now missing",
    "failed": "the source calls the run failed",
    "diverged": "the source calls the run diverged",
    "unfinished": "the run had not reached its last step",
    "untrained": "no better than an untrained model: step 0 posing as the end, or a broken run",
    "no-result": "neither val_bpb nor CORE",
    "estimated": "an estimate, not a measurement",
    "withdrawn": "the author withdrew the row",
    "duplicate": "the same row again; the first one counts",
    "copied-value": "the same many digits under different settings: a copy-and-paste mistake",
    "ragged": "more or fewer cells than the header, so values may be in the wrong columns",
    "tokens-disagree": "tokens are not steps times batch, or not what the FLOPs budget paid for",
    "flops-disagree": "FLOPs are not FLOPs per token times tokens",
    "parameters-disagree": "parameter counts contradict each other",
    "core-disagree": "CORE is not the mean of its tasks",
}
"""Meanings of the codes that keep a row out of fits."""
WARNS = {
    "mixed-data": "several datasets in one file: compared only within each",
    "core-zero": "CORE of exactly 0 is what scripts write when none was measured; now missing",
    "core-subset": "CORE of only some of each task's examples",
    "loss-is-bpb": "called a loss, but in bits per byte; taken as val_bpb",
    "mean-of-runs": "the mean of several runs, not one run",
    "unlabelled-seed": "equal settings, different results: replicates without their seeds",
    "parameters-empty": "empty parameter columns",
    "budget-rounded": "a budget printed with too few digits; FLOPs are those spent",
    "bad-number": "not a number; the cell is now missing",
    "spreadsheet": "passed through a spreadsheet, which keeps few digits",
    "dirty-code": "trained by code that differs from its commit",
    "resumed": "trained in several parts; the clock covers only the last, and is left out",
    "invalid-utf8": "bytes that are not UTF-8, replaced by �",
}
"""Meanings of the codes that warn."""
NOTES = {
    "recomputed": "computed from the row's other numbers",
    "rounded": "printed with few digits",
    "empty-column": "a column without a value",
}
"""Meanings of the codes that only note."""
CODES = {
    **{code: Code("forbids", meaning) for code, meaning in FORBIDS.items()},
    **{code: Code("warns", meaning) for code, meaning in WARNS.items()},
    **{code: Code("notes", meaning) for code, meaning in NOTES.items()},
}
"""Every kind of defect, worst first. Codes are stable: fits and queries use them."""

MAX_ROWS_LISTED = 8
UNTRAINED_BPB = 3.0
"""An untrained model of 32,768 tokens has 15 bits per token: 3.2 bpb at 4.7 bytes per token."""
POWERS_OF_TWO = (0.125, 0.25, 0.5, 2, 4, 8)
"""Factors by which a batch or token count is off when a setting was mistaken."""
STATUSES = {
    **dict.fromkeys(("crash", "crashed", "failed", "error", "oom", "killed"), "failed"),
    **dict.fromkeys(("running", "pending", "preempted", "interrupted", "stopped"), "interrupted"),
    "diverged": "diverged",
}
"""Status of a run by the word of the source; any other word means finished."""
ESTIMATES = ("estimated", "extrapolated", "predicted", "guess")
WITHDRAWALS = ("commented_out", "withdrawn", "excluded", "outlier")
"""Columns that mark withdrawn rows."""
RUN_COUNTS = ("n_seeds", "n_runs", "seeds")
"""Columns with the number of runs whose mean a row is."""
MEAN_OF_RUNS = re.compile(r"\bmean\b.{0,30}?\b(\d+) (?:runs|seeds)")
WIDTHS = ("model_dim", "width", "n_embd", "d_model")
BUDGETS = ("flops_budget", "target_flops", "budget")
PARAMETERS = ("params_", "num_params", "num_scaling")
"""Beginnings of the headers of parameter counts."""
GROUPS = ("wte", "value_embeds", "lm_head", "matrices", "scalars")
MAX_DEPTH = 1000
INDEXES = ("rank", "index", "row", "no", "n", "", "unnamed_0")
"""Columns that number the rows."""
MEASURED = re.compile(
    r"(^|_)(entropy|mean|min|max|std|score|norm|loss|bpb|acc|accuracy|core|time|wall|runtime"
    r"|created|date|sec|seconds|ms|speed|tok|tokens_per|mem|memory|vram|util|delta|ci95|gap|dt|mfu"
    r"|lrm|pct|rank|metric|results|hours|note|notes|timestamp|trial|cost|flops_per_sec|centered)"
    r"(_|$)"
)
"""Words in the headers of columns that are measured rather than set."""
Findings = Iterator[tuple[str, str, str | None]]
"""Code, message and column of each defect in a row."""


def check(rows: Sequence[Row]) -> list[Defect]:
    """Return every defect visible without knowing the format; fill in what can be computed."""
    row_checks = (
        _check_status,
        _check_words,
        _check_zeros,
        _check_loss_unit,
        _check_untrained,
        _check_products,
        _fill_architecture,
        _check_products,
        _check_budget,
        _check_sums,
        _check_result,
    )
    table_checks = (
        _check_ratios,
        _check_duplicates,
        _check_copied_values,
        _check_replicates,
        _check_datasets,
        _note_rounding,
        _note_empty_columns,
    )
    defects: list[Defect] = []
    for row in rows:
        for check_row in row_checks:
            for code, message, column in check_row(row):
                defects.append(Defect(code, message, row.number, column))
    for check_table in table_checks:
        defects += check_table(rows)
    return defects


# Checks of one row


def _check_status(row: Row) -> Findings:
    """Translate the source's status."""
    printed = str(row.get("status") or "").lower()
    status = STATUSES.get(printed, "finished")
    row.values["status"] = status
    if status == "failed":
        row.values.setdefault("reason", "error")
    if status == "diverged":
        row.values["reason"] = "diverged"
    if status != "finished":
        code = "unfinished" if status == "interrupted" else status
        yield code, f"status {printed!r}", None


def _check_words(row: Row) -> Findings:
    """Report what cells say in words about the whole row."""
    for column, cell in row.original.items():
        text = str(cell).strip().lower()
        name = plain(column)
        shows = f"{column} is {cell!r}"
        if text == "diverged" and row.values["status"] == "finished":
            row.values.update(status="diverged", reason="diverged")
            yield "diverged", shows, column
        if text in ESTIMATES:
            yield "estimated", shows, column
        if name in WITHDRAWALS and text in ("1", "true", "yes"):
            yield "withdrawn", shows, column
        counts_runs = name in RUN_COUNTS and text.isdigit() and int(text) > 1
        if counts_runs or MEAN_OF_RUNS.search(text):
            yield "mean-of-runs", f"{column}: {cell}", column


def _check_zeros(row: Row) -> Findings:
    """Remove zeros that scripts write where nothing was measured, and impossible values."""
    values = row.values
    for name in ("val_bpb", "val_loss", "train_loss"):
        if values.get(name, 1) > 0:
            continue
        if name != "train_loss" and values["status"] == "finished":
            values.update(status="failed", reason="error")
        yield "crash-zero", f"{name} {values.pop(name):.6f}", name
    for name in COUNTS:
        value = values.get(name, 1)
        if value == 0 and name != "seed" and not name.startswith("parameters_"):
            del values[name]
            code = "crash-zero" if values["status"] == "failed" else "bad-number"
            yield code, f"{name} 0", name
        elif value >= 2**63 and name != "flops":
            yield "bad-number", f"{name} {values.pop(name):.4g}", name
    core = row.get("core")
    if core == 0:
        del values["core"]
        yield "core-zero", "CORE 0.0", "core"
    elif core and abs(core) > 1:
        del values["core"]
        yield "bad-number", f"CORE {core:g} is beyond 1", "core"


def _check_loss_unit(row: Row) -> Findings:
    """Recognise a val_loss in bits per byte by its ratio to the training loss in nats.

    Nats per token over bits per byte are ln 2 times bytes per token, 2.4 to 4.2; a validation loss
    in nats would be close to the training loss.
    """
    val_loss = row.get("val_loss")
    train_loss = row.get("train_loss")
    if not val_loss or not train_loss or "val_bpb" in row.values:
        return
    if 0.2 < val_loss / train_loss < 0.45:
        row.values["val_bpb"] = row.values.pop("val_loss")
        message = f"{val_loss:g} at a train loss of {train_loss:g} nats"
        yield "loss-is-bpb", message, "val_loss"


def _check_untrained(row: Row) -> Findings:
    bpb = row.values.get("val_bpb", 0)
    if bpb >= UNTRAINED_BPB and row.values["status"] == "finished":
        yield "untrained", f"val_bpb {bpb:g}", "val_bpb"


def _check_products(row: Row) -> Findings:
    """Compute or compare tokens = steps·batch and flops = FLOPs per token·tokens."""
    values = row.values
    yield from _check_product(row, "tokens", "steps", "batch_tokens")
    if "tokens" not in values and "flops" in values and "flops_per_token" in values:
        tokens = values["flops"] / values["flops_per_token"]
        if tokens >= 1:
            yield from _check_value(row, "tokens", round(tokens), "flops / flops_per_token")
    yield from _check_product(row, "flops", "flops_per_token", "tokens")


def _check_product(row: Row, product: str, a: str, b: str) -> Findings:
    values = row.values
    if a in values and b in values:
        slack = sum(0.6 * row.units.get(name, 1) / values[name] for name in (a, b))
        computed = values[a] * values[b]
        yield from _check_value(row, product, computed, f"{a} × {b}", max(slack, 0.001))


def _check_value(
    row: Row, column: str, computed: float, formula: str, slack: float = 0.0
) -> Findings:
    """Fill in a value that is missing, or compare the one that is stated."""
    if column in row.values:
        if not row.agrees(column, computed, slack):
            code = f"{column.partition('_')[0]}-disagree"
            stated, expected = _print(row.values[column]), _print(computed)
            yield code, f"{column} {stated}, but {formula} is {expected}", column
    elif computed < 2**63 or column == "flops":
        row.values[column] = computed
        yield "recomputed", f"{column} = {formula}", None


def _print(value: float) -> str:
    """Return all digits of a count, and six of another number."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _fill_architecture(row: Row) -> Findings:
    """Fill in the counts of the one known family that agrees with every number of a row."""
    family = _family(row)
    # 1) empty parameter columns
    empty = [
        name
        for name, cell in row.original.items()
        if plain(name).startswith(PARAMETERS) and is_empty(cell)
    ]
    if empty:
        outcome = f"filled in as {family.name}'s" if family else "and no known family agrees"
        yield "parameters-empty", f"{', '.join(empty)}: {outcome}", empty[0]
    if family is None:
        return
    # 2) missing counts
    counts = family.counts()
    missing = [name for name in counts if name not in row.values]
    row.values.update(counts | row.values)
    if "flops_per_token" not in missing:
        row.values.setdefault("sequence_length", family.context)
    if missing:
        is_known = "sequence_length" in row.values
        assumed = "" if is_known else f"; assumes a context of {family.context:,}"
        formula = f"those of {family.name}, d{row.values['depth']}{assumed}"
        yield "recomputed", f"{', '.join(missing)} = {formula}", None


def _family(row: Row) -> Architecture | None:
    """Return the known family that a row's own numbers identify, if exactly one does.

    Stated FLOPs must be the family's. A budget decides where counts do not; where counts are exact
    it may be off by as much as a mistake explains, which `_check_budget` then reports.
    """
    depth = row.get("depth")
    if not depth or depth > MAX_DEPTH:
        return None
    families = known_architectures(depth, row.get("sequence_length"))
    candidates = [family for family in families if _agrees(row, family)]
    if not candidates:
        return None
    stated = [name for name in candidates[0].counts() if row.get(name)]
    tokens = row.get("tokens")
    spent = row.get("flops") or _budget(row)
    if spent and tokens and "flops_per_token" not in row.values:
        has_exact_counts = stated and all(row.units.get(name, 1) <= 1 for name in stated)
        allowed = ["paid"]
        if has_exact_counts and "flops" not in row.values:
            allowed += ["power of two", "rounded"]
        candidates = [
            family
            for family in candidates
            if _compare_flops(row, family.flops_per_token * tokens, spent) in allowed
        ]
    elif not stated:
        return None
    return candidates[0] if len(candidates) == 1 else None


def _agrees(row: Row, family: Architecture) -> bool:
    """Whether a row's width and every count it states are a family's."""
    width = value_of(_original(row, WIDTHS))
    if width not in (None, family.width):
        return False
    return all(row.agrees(name, count) for name, count in family.counts().items())


def _original(row: Row, headers: Sequence[str]) -> str:
    """Return the source's cell under the first of these normalised headers, "" without one."""
    for name, cell in row.original.items():
        if plain(name) in headers:
            return str(cell).strip()
    return ""


def _budget(row: Row) -> float:
    """Return the FLOPs budget of a row, 0 without one."""
    return max(value_of(_original(row, BUDGETS)) or 0, 0)


def _compare_flops(row: Row, computed: float, stated: float) -> str:
    """Compare computed with stated FLOPs: "paid", "power of two", "rounded" or "other"."""
    ratio = computed / stated
    step_share = 1 / (row.get("steps") or 100)
    token_rounding = 0.6 * row.units.get("tokens", 1) / row.values["tokens"]
    if abs(ratio - 1) <= max(0.01, step_share, token_rounding):
        return "paid"
    if _is_power_of_two(ratio, 0.02):
        return "power of two"
    if f"{computed:.0e}" == _original(row, BUDGETS):
        return "rounded"
    return "other"


def _is_power_of_two(ratio: float, tolerance: float) -> bool:
    return any(abs(ratio / factor - 1) < tolerance for factor in POWERS_OF_TWO)


def _check_budget(row: Row) -> Findings:
    """Compare a budget with the FLOPs spent, which a whole number of steps brings close to it."""
    budget = _budget(row)
    if budget and "flops" not in row.values:
        yield from _check_value(row, "flops", budget, "the budget, spent to the nearest step")
        return
    if not budget or "tokens" not in row.values:
        return
    tokens = row.values["tokens"]
    flops = row.values["flops"]
    printed = _original(row, BUDGETS)
    comparison = _compare_flops(row, flops, budget)
    if comparison == "rounded":
        yield "budget-rounded", f"{printed}, but {flops:.4g} were spent", "flops_budget"
    elif comparison != "paid":
        message = f"{tokens:,} tokens cost {flops:.4g} FLOPs, the budget is {printed}"
        yield "tokens-disagree", message, "tokens"


def _check_sums(row: Row) -> Findings:
    """Compare groups of parameters with their sums."""
    groups = [row.get(f"parameters_{name}") for name in GROUPS]
    if None not in groups and "parameters_total" in row.values:
        yield from _check_value(row, "parameters_total", sum(groups), "the sum of its groups")
    matrices = row.get("parameters_matrices")
    head = row.get("parameters_lm_head")
    if matrices and head:
        yield from _check_value(row, "parameters_scaling", matrices + head, "matrices + head")


def _check_result(row: Row) -> Findings:
    values = row.values
    if "val_bpb" in values or "core" in values or values["status"] != "finished":
        return
    if "val_loss" in values:
        message = "only a loss in nats per token, which depends on the tokeniser"
    else:
        values["status"] = "failed"
        message = "no result, so not a finished run"
    yield "no-result", message, None


# Checks of all rows


def _check_ratios(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find runs off by a power of two in a series at one tokens-per-parameter ratio.

    Their batch differed from the one stated.
    """
    names = {plain(name): name for name in rows[0].original}
    column = names.get("param_data_ratio")
    if column is None or "flops_budget" in names:
        return
    ratios = {row.number: value_of(row.original[column]) for row in rows}
    counts = Counter(round(ratio, 1) for ratio in ratios.values() if ratio is not None)
    usual = next((ratio for ratio, _ in counts.most_common(1)), 0)
    for row, ratio in ratios.items():
        if usual and ratio and _is_power_of_two(ratio / usual, 0.05):
            message = (
                f"{ratio:g} tokens per parameter where the series has {usual:g}: "
                "the batch was different"
            )
            yield Defect("tokens-disagree", message, row, column)


def _groups(keyed_rows: Iterable[tuple[Hashable, Row]]) -> Iterable[tuple[Hashable, list[Row]]]:
    """Return the rows of each key."""
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for key, row in keyed_rows:
        groups[key].append(row)
    return groups.items()


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(str(cell) for name, cell in row.original.items() if plain(name) not in INDEXES)


def _check_duplicates(rows: Sequence[Row]) -> Iterator[Defect]:
    for _, (first, *repeats) in _groups((_cells(row), row) for row in rows):
        for row in repeats:
            yield Defect("duplicate", f"the same as row {first.number}", row.number)


def _check_copied_values(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find equal results of different settings that chance gives in under 1 % of files."""
    for name in ("val_bpb", "core"):
        measured = [row for row in rows if name in row.values]
        values = sorted(row.values[name] for row in measured)
        if len(values) < 3:
            continue
        last = len(values) - 1
        span = values[int(0.9 * last)] - values[int(0.1 * last)]
        for value, group in _groups((row.values[name], row) for row in measured):
            unit = min(row.units.get(name, 1e-6) for row in group)
            chance = len(values) ** 2 / 2 * unit / max(span, unit)
            if chance < 0.01 and len({_cells(row) for row in group}) > 1:
                message = f"{name} {value} in rows {_row_numbers(group)}"
                yield from (Defect("copied-value", message, row.number, name) for row in group)


def _row_numbers(rows: Sequence[Row]) -> str:
    return first_few([str(row.number) for row in rows], MAX_ROWS_LISTED)


def _settings(row: Row) -> tuple[tuple[str, str], ...]:
    """Return the cells that say what was run: all but measurements and row numbers."""
    settings = []
    for name, cell in row.original.items():
        text = str(cell).strip()
        header = plain(name)
        is_row_number = header in ("run", "id", *INDEXES) and text.isdigit()
        if is_row_number or MEASURED.search(header) or is_empty(text):
            continue
        value = value_of(text)
        settings.append((name, text if value is None else f"{value:.4g}"))
    return tuple(settings)


def _check_replicates(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find rows of equal settings, different results and no seed."""
    for settings, group in _groups((_settings(row), row) for row in rows):
        results = {(row.get("val_bpb"), row.get("core")) for row in group}
        has_seeds = all("seed" in row.values for row in group)
        if not settings or len(results) == 1 or has_seeds:
            continue
        for row in group:
            twins = [twin for twin in group[: MAX_ROWS_LISTED + 2] if twin is not row]
            message = f"the same settings as in rows {_row_numbers(twins)}"
            yield Defect("unlabelled-seed", message, row.number)


def _check_datasets(rows: Sequence[Row]) -> Iterator[Defect]:
    corpora = Counter(row.values["corpus"] for row in rows if "corpus" in row.values)
    if len(corpora) > 1:
        message = ", ".join(f"{name} ({count})" for name, count in corpora.items())
        yield from (Defect("mixed-data", message, row.number, "corpus") for row in rows)


def _note_rounding(rows: Sequence[Row]) -> Iterator[Defect]:
    """Note counts printed with two or three digits."""
    for name in COUNTS:
        if not name.startswith(("parameters_", "tokens", "flops")):
            continue
        worst = 0.0
        for row in rows:
            unit = row.units.get(name, 0)
            if unit > 1 and row.get(name):
                worst = max(worst, unit / 2 / row.values[name])
        if worst > 0.001:
            message = f"{name} up to ±{100 * worst:.2g} % by its digits"
            yield Defect("rounded", message, None, name)


def _note_empty_columns(rows: Sequence[Row]) -> Iterator[Defect]:
    if len(rows) == 1:
        return
    for name in rows[0].original:
        if all(is_empty(row.original.get(name, "")) for row in rows):
            yield Defect("empty-column", f"{name} is empty in every row", None, name)


# Weights of flags


def flags_of_weight(flags: str, weight: Weight) -> str:
    """Select the flags of a weight from a comma-separated list; unknown flags have every weight."""
    matching = [
        flag for flag in flags.split(",") if flag not in CODES or CODES[flag].weight == weight
    ]
    return ",".join(matching)


def usable(flags: Iterable[str]) -> bool:
    """Whether fits may use a row with these flags."""
    return all(CODES[flag].weight != "forbids" for flag in flags)
