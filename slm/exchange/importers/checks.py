"""Defects of imported results: their codes, and the checks that all formats share.

A check looks at rows, fills in what it can compute where the source has nothing, removes what is
not a result, and reports it. Everything the source states otherwise stays.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.exchange.importers.architectures import Architecture, known_architectures
from slm.exchange.importers.numbers import EMPTY, number
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


CODES = {
    "crash-zero": Code("forbids", "0 in place of a crashed run's result; now missing"),
    "failed": Code("forbids", "the source calls the run failed"),
    "diverged": Code("forbids", "the source calls the run diverged"),
    "unfinished": Code("forbids", "the run had not reached its last step"),
    "untrained": Code(
        "forbids", "no better than an untrained model: step 0 posing as the end, or a broken run"
    ),
    "no-result": Code("forbids", "neither val_bpb nor CORE"),
    "estimated": Code("forbids", "an estimate, not a measurement"),
    "withdrawn": Code("forbids", "the author withdrew the row"),
    "duplicate": Code("forbids", "the same row again; the first one counts"),
    "copied-value": Code(
        "forbids", "the same many digits under different settings: a copy-and-paste mistake"
    ),
    "mixed-data": Code("warns", "several datasets in one file: compared only within each"),
    "ragged": Code(
        "forbids", "more or fewer cells than the header, so values may be in the wrong columns"
    ),
    "tokens-disagree": Code(
        "forbids", "tokens are not steps times batch, or not what the FLOPs budget paid for"
    ),
    "flops-disagree": Code("forbids", "FLOPs are not FLOPs per token times tokens"),
    "parameters-disagree": Code("forbids", "parameter counts contradict each other"),
    "core-disagree": Code("forbids", "CORE is not the mean of its tasks"),
    "core-zero": Code(
        "warns", "CORE of exactly 0 is what scripts write when none was measured; now missing"
    ),
    "core-subset": Code("warns", "CORE of only some of each task's examples"),
    "loss-is-bpb": Code("warns", "called a loss, but in bits per byte; taken as val_bpb"),
    "mean-of-runs": Code("warns", "the mean of several runs, not one run"),
    "unlabelled-seed": Code(
        "warns", "equal settings, different results: replicates without their seeds"
    ),
    "parameters-empty": Code("warns", "empty parameter columns"),
    "budget-rounded": Code("warns", "a budget printed with too few digits; FLOPs are those spent"),
    "bad-number": Code("warns", "not a number; the cell is now missing"),
    "spreadsheet": Code("warns", "passed through a spreadsheet, which keeps few digits"),
    "dirty-code": Code("warns", "trained by code that differs from its commit"),
    "resumed": Code(
        "warns", "trained in several parts; the clock covers only the last, and is left out"
    ),
    "invalid-utf8": Code("warns", "bytes that are not UTF-8, replaced by �"),
    "recomputed": Code("notes", "computed from the row's other numbers"),
    "rounded": Code("notes", "printed with few digits"),
    "empty-column": Code("notes", "a column without a value"),
}
"""Every kind of defect, worst first. Codes are stable: fits and queries use them."""

MAX_ROWS_LISTED = 8
UNTRAINED_BPB = 3.0
"""An untrained model of 32,768 tokens has 15 bits per token: 3.2 bpb at 4.7 bytes per token."""
POWERS_OF_TWO = (0.125, 0.25, 0.5, 2, 4, 8)
"""Factors by which a batch or token count is off when a setting was mistaken."""


def check(rows: Sequence[Row]) -> list[Defect]:
    """Return every defect visible without knowing the format; fill in what can be computed."""
    row_checks: tuple[Callable[[Row], Iterable[Defect]], ...] = (
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
    for check_row in row_checks:
        for row in rows:
            defects += check_row(row)
    for check_table in table_checks:
        defects += check_table(rows)
    return list(dict.fromkeys(defects))


FAILED = ("crash", "crashed", "failed", "error", "oom", "killed")
UNFINISHED = ("running", "pending", "preempted", "interrupted", "stopped")


def _check_status(row: Row) -> Iterator[Defect]:
    """Translate the source's status."""
    status = str(row.get("status") or "").lower()
    if status in FAILED:
        row.values.update(status="failed", reason=row.get("reason") or "error")
        yield Defect("failed", f"status {status!r}", row.number)
    elif status in UNFINISHED:
        row.values.update(status="interrupted")
        yield Defect("unfinished", f"status {status!r}", row.number)
    elif status == "diverged":
        row.values.update(status="diverged", reason="diverged")
        yield Defect("diverged", "status 'diverged'", row.number)
    else:
        row.values.update(status="finished")


def _check_words(row: Row) -> Iterator[Defect]:
    """Report what cells say in words about the whole row."""
    for column, cell in row.original.items():
        text = str(cell).strip().lower()
        name = plain(column)
        shows = f"{column} is {cell!r}"
        if text == "diverged" and row.get("status") == "finished":
            row.values.update(status="diverged", reason="diverged")
            yield Defect("diverged", shows, row.number, column)
        if text in ("estimated", "extrapolated", "predicted", "guess"):
            yield Defect("estimated", shows, row.number, column)
        is_withdrawal = name in ("commented_out", "withdrawn", "excluded", "outlier")
        if is_withdrawal and text in ("1", "true", "yes"):
            yield Defect("withdrawn", shows, row.number, column)
        is_mean = re.search(r"\bmean\b.{0,30}?\b(\d+) (?:runs|seeds)", text)
        counts_runs = name in ("n_seeds", "n_runs", "seeds") and text.isdigit() and int(text) > 1
        if is_mean or counts_runs:
            yield Defect("mean-of-runs", f"{column}: {cell}", row.number, column)


def _check_zeros(row: Row) -> Iterator[Defect]:
    """Remove zeros that scripts write where nothing was measured, and impossible values."""
    for name in ("val_bpb", "val_loss", "train_loss"):
        if row.get(name) is not None and row.values[name] <= 0:
            printed = row.values.pop(name)
            if name != "train_loss" and row.get("status") == "finished":
                row.values.update(status="failed", reason="error")
            yield Defect("crash-zero", f"{name} {printed:.6f}", row.number, name)
    for name in COUNTS:
        value = row.get(name)
        if value == 0 and name != "seed" and not name.startswith("parameters_"):
            del row.values[name]
            code = "crash-zero" if row.get("status") == "failed" else "bad-number"
            yield Defect(code, f"{name} 0", row.number, name)
        elif (value or 0) >= 2**63 and name != "flops":
            yield Defect("bad-number", f"{name} {row.values.pop(name):.4g}", row.number, name)
    if abs(row.get("core") or 0) > 1:
        message = f"CORE {row.values.pop('core'):g} is beyond 1"
        yield Defect("bad-number", message, row.number, "core")
    if row.get("core") == 0:
        del row.values["core"]
        yield Defect("core-zero", "CORE 0.0", row.number, "core")


def _check_loss_unit(row: Row) -> Iterator[Defect]:
    """Recognise a val_loss in bits per byte by its ratio to the training loss in nats.

    Nats per token over bits per byte are ln 2 times bytes per token, 2.4 to 4.2; a validation loss
    in nats would be close to the training loss.
    """
    val_loss = row.get("val_loss")
    train_loss = row.get("train_loss")
    if (
        val_loss
        and train_loss
        and row.get("val_bpb") is None
        and 0.2 < val_loss / train_loss < 0.45
    ):
        row.values["val_bpb"] = row.values.pop("val_loss")
        message = f"{val_loss:g} at a train loss of {train_loss:g} nats"
        yield Defect("loss-is-bpb", message, row.number, "val_loss")


def _check_untrained(row: Row) -> Iterator[Defect]:
    bpb = row.get("val_bpb")
    if bpb is not None and bpb >= UNTRAINED_BPB and row.get("status") == "finished":
        yield Defect("untrained", f"val_bpb {bpb:g}", row.number, "val_bpb")


def _check_products(row: Row) -> Iterator[Defect]:
    """Compute or compare tokens = steps·batch and flops = FLOPs per token·tokens."""
    yield from _check_product(row, "tokens", "steps", "batch_tokens")
    yield from _check_product(row, "flops", "flops_per_token", "tokens")


def _check_product(row: Row, product: str, a: str, b: str) -> Iterator[Defect]:
    values = row.values
    missing = [name for name in (product, a, b) if row.get(name) is None]
    if not missing:
        expected = values[a] * values[b]
        slack = sum(0.6 * row.units.get(name, 1) / values[name] for name in (a, b))
        if not row.agrees(product, expected, max(slack, 0.001)):
            message = f"{product} {values[product]:,.6g}, but {a} × {b} is {expected:,.6g}"
            yield Defect(f"{product}-disagree", message, row.number, product)
    elif missing == [product] and (product == "flops" or values[a] * values[b] < 2**63):
        values[product] = values[a] * values[b]
        yield _recomputed(row, [product], f"{a} × {b}")
    elif product == "flops" and missing == ["tokens"]:
        tokens = values["flops"] / values["flops_per_token"]
        if 1 <= tokens < 2**63:
            values["tokens"] = round(tokens)
            yield _recomputed(row, ["tokens"], "flops / flops_per_token")


def _recomputed(row: Row, names: Sequence[str], formula: str) -> Defect:
    return Defect("recomputed", f"{', '.join(names)} = {formula}", row.number)


def _fill_architecture(row: Row) -> Iterator[Defect]:
    """Fill in the counts of the one known family that agrees with every number of a row."""
    depth = row.get("depth")
    family = _family(row) if depth and depth <= 1000 else None
    # 1) empty parameter columns
    prefixes = ("params_", "num_params", "num_scaling")
    empty = [
        name
        for name, cell in row.original.items()
        if plain(name).startswith(prefixes) and str(cell).strip().lower() in EMPTY
    ]
    if empty:
        outcome = f"filled in as {family.name}'s" if family else "and no known family agrees"
        yield Defect("parameters-empty", f"{', '.join(empty)}: {outcome}", row.number, empty[0])
    if family is None:
        return
    # 2) missing counts
    missing = {name: value for name, value in family.counts().items() if row.get(name) is None}
    row.values.update(missing)
    if row.get("sequence_length") is None and "flops_per_token" not in missing:
        row.values["sequence_length"] = family.context
    if missing:
        assumed = "" if row.get("sequence_length") else f"; assumes a context of {family.context:,}"
        yield _recomputed(row, list(missing), f"those of {family.name}, d{depth}{assumed}")


def _family(row: Row) -> Architecture | None:
    """Return the known family that a row's own numbers identify, if exactly one does.

    Stated FLOPs must be the family's. A budget decides where counts do not; where counts are exact
    it may be off by as much as a mistake explains, which `_check_budget` then reports.
    """
    candidates = [
        family
        for family in known_architectures(row.values["depth"], row.get("sequence_length"))
        if _agrees(row, family)
    ]
    if not candidates:
        return None
    stated = [name for name in candidates[0].counts() if row.get(name)]
    budget = _stated_budget(row)
    tokens = row.get("tokens")
    spent = row.get("flops") or (budget[0] if budget else None)
    if tokens and spent and row.get("flops_per_token") is None:
        is_exact = (
            bool(stated)
            and row.get("flops") is None
            and all(row.units.get(name, 1) <= 1 for name in stated)
        )
        allowed = ("paid", "power of two", "rounded") if is_exact else ("paid",)
        candidates = [
            family
            for family in candidates
            if _compare_flops(row, family.flops_per_token * tokens, spent) in allowed
        ]
    elif not stated:
        return None
    return candidates[0] if len(candidates) == 1 else None


WIDTHS = ("model_dim", "width", "n_embd", "d_model")


def _agrees(row: Row, family: Architecture) -> bool:
    """Whether a row's width and every count it states are a family's."""
    widths = (number(str(cell)) for name, cell in row.original.items() if plain(name) in WIDTHS)
    width = next(widths, None)
    if width and width.value != family.width:
        return False
    return all(row.agrees(name, value) for name, value in family.counts().items())


def _compare_flops(row: Row, computed: float, stated: float) -> str:
    """Compare computed with stated FLOPs: "paid", "power of two", "rounded" or "other"."""
    ratio = computed / stated
    step_share = 1 / (row.get("steps") or 100)
    token_rounding = 0.6 * row.units.get("tokens", 1) / row.values["tokens"]
    if abs(ratio - 1) <= max(0.01, step_share, token_rounding):
        return "paid"
    if any(abs(ratio / factor - 1) < 0.02 for factor in POWERS_OF_TWO):
        return "power of two"
    budget = _stated_budget(row)
    if budget and re.fullmatch(r"\de\+\d+", budget[1]):
        half_a_digit = 0.5 * 10 ** int(math.log10(stated)) / stated
        if abs(ratio - 1) <= half_a_digit:
            return "rounded"
    return "other"


BUDGETS = ("flops_budget", "target_flops", "budget")


def _stated_budget(row: Row) -> tuple[float, str] | None:
    """Return the FLOPs budget of a row, and its text."""
    cells = (str(cell).strip() for name, cell in row.original.items() if plain(name) in BUDGETS)
    printed = next(cells, "")
    budget = number(printed)
    return (budget.value, printed) if budget and budget.value > 0 else None


def _check_budget(row: Row) -> Iterator[Defect]:
    """Compare a budget with the FLOPs spent, which a whole number of steps brings close to it."""
    stated = _stated_budget(row)
    if stated is None:
        return
    budget, printed = stated
    if row.get("flops") is None:
        row.values["flops"] = budget
        yield _recomputed(row, ["flops"], "the budget, spent to the nearest step")
        return
    if not row.get("tokens"):
        return
    flops = row.values["flops"]
    comparison = _compare_flops(row, flops, budget)
    if comparison == "rounded":
        message = f"{printed}, but {flops:.4g} were spent"
        yield Defect("budget-rounded", message, row.number, "flops_budget")
    elif comparison != "paid":
        message = f"{row.values['tokens']:,} tokens cost {flops:.4g} FLOPs, the budget is {printed}"
        yield Defect("tokens-disagree", message, row.number, "tokens")


def _check_sums(row: Row) -> Iterator[Defect]:
    """Compare groups of parameters with their sums."""
    names = ("wte", "value_embeds", "lm_head", "matrices", "scalars")
    groups = {name: row.get(f"parameters_{name}") for name in names}
    if all(group is not None for group in groups.values()):
        total = sum(groups.values())
        if not row.agrees("parameters_total", total):
            stated = row.values["parameters_total"]
            message = f"total {stated:,}, but the groups sum to {total:,}"
            yield Defect("parameters-disagree", message, row.number, "parameters_total")
    matrices = groups["matrices"]
    head = groups["lm_head"]
    if not matrices or not head:
        return
    scaling = row.get("parameters_scaling")
    if scaling is None:
        row.values["parameters_scaling"] = matrices + head
        yield _recomputed(row, ["parameters_scaling"], "matrices + head")
    elif not row.agrees("parameters_scaling", matrices + head):
        message = f"scaling {scaling:,}, but matrices + head are {matrices + head:,}"
        yield Defect("parameters-disagree", message, row.number, "parameters_scaling")


def _check_result(row: Row) -> Iterator[Defect]:
    has_result = row.get("val_bpb") is not None or row.get("core") is not None
    if has_result or row.get("status") != "finished":
        return
    if row.get("val_loss"):
        message = "only a loss in nats per token, which depends on the tokeniser"
    else:
        row.values.update(status="failed")
        message = "no result, so not a finished run"
    yield Defect("no-result", message, row.number)


def _check_ratios(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find runs off by a power of two in a series at one tokens-per-parameter ratio.

    Their batch differed from the one stated.
    """
    names = {plain(name): name for row in rows[:1] for name in row.original}
    if "param_data_ratio" not in names or "flops_budget" in names:
        return
    column = names["param_data_ratio"]
    ratios = {row.number: number(str(row.original[column])) for row in rows}
    counts = Counter(round(ratio.value, 1) for ratio in ratios.values() if ratio)
    usual = next((ratio for ratio, _ in counts.most_common(1)), 0)
    for row in rows:
        ratio = ratios[row.number]
        if not ratio or not usual:
            continue
        share = ratio.value / usual
        if any(abs(share / factor - 1) < 0.05 for factor in POWERS_OF_TWO):
            message = (
                f"{ratio.value:g} tokens per parameter where the series has {usual:g}: "
                "the batch was different"
            )
            yield Defect("tokens-disagree", message, row.number, column)


INDEXES = ("rank", "index", "row", "no", "n", "", "unnamed_0")
"""Columns that number the rows."""


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(str(cell) for name, cell in row.original.items() if plain(name) not in INDEXES)


def _check_duplicates(rows: Sequence[Row]) -> Iterator[Defect]:
    first: dict[tuple[str, ...], int] = {}
    for row in rows:
        original = first.setdefault(_cells(row), row.number)
        if original != row.number:
            yield Defect("duplicate", f"the same as row {original}", row.number)


def _check_copied_values(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find equal results of different settings that chance gives in under 1 % of files."""
    for name in ("val_bpb", "core"):
        measured = [row for row in rows if row.get(name) is not None]
        if len(measured) < 3:
            continue
        values = sorted(row.values[name] for row in measured)
        span = values[int(0.9 * (len(values) - 1))] - values[int(0.1 * (len(values) - 1))]
        groups: dict[float, list[Row]] = defaultdict(list)
        for row in measured:
            groups[row.values[name]].append(row)
        for value, group in groups.items():
            unit = min(row.units.get(name, 1e-6) for row in group)
            chance = len(measured) ** 2 / 2 * unit / max(span, unit)
            if chance < 0.01 and len({_cells(row) for row in group}) > 1:
                message = f"{name} {value} in rows {_row_numbers(group)}"
                yield from (Defect("copied-value", message, row.number, name) for row in group)


def _row_numbers(rows: Sequence[Row]) -> str:
    return first_few([str(row.number) for row in rows], MAX_ROWS_LISTED)


MEASURED = re.compile(
    r"(^|_)(entropy|mean|min|max|std|score|norm|loss|bpb|acc|accuracy|core|time|wall|runtime"
    r"|created|date|sec|seconds|ms|speed|tok|tokens_per|mem|memory|vram|util|delta|ci95|gap|dt|mfu"
    r"|lrm|pct|rank|metric|results|hours|note|notes|timestamp|trial|cost|flops_per_sec|centered)"
    r"(_|$)"
)
"""Words in the headers of columns that are measured rather than set."""


def _settings(row: Row) -> tuple[tuple[str, str], ...]:
    """Return the cells that say what was run: all but measurements and row numbers."""
    settings = []
    for name, cell in row.original.items():
        text = str(cell).strip()
        header = plain(name)
        is_row_number = header in ("run", "id", *INDEXES) and text.isdigit()
        if is_row_number or MEASURED.search(header) or text.lower() in EMPTY:
            continue
        parsed = number(text)
        settings.append((name, f"{parsed.value:.4g}" if parsed else text))
    return tuple(settings)


def _check_replicates(rows: Sequence[Row]) -> Iterator[Defect]:
    """Find rows of equal settings, different results and no seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_settings(row)].append(row)
    for settings, group in groups.items():
        results = {(row.get("val_bpb"), row.get("core")) for row in group}
        has_unlabelled = any(row.get("seed") is None for row in group)
        if not settings or len(results) == 1 or not has_unlabelled:
            continue
        for row in group:
            twins = [twin for twin in group[: MAX_ROWS_LISTED + 2] if twin is not row]
            message = f"the same settings as in rows {_row_numbers(twins)}"
            yield Defect("unlabelled-seed", message, row.number)


def _check_datasets(rows: Sequence[Row]) -> Iterator[Defect]:
    corpora = Counter(row.get("corpus") for row in rows if row.get("corpus"))
    if len(corpora) > 1:
        message = ", ".join(f"{name} ({count})" for name, count in corpora.items())
        yield from (Defect("mixed-data", message, row.number, "corpus") for row in rows)


def _note_rounding(rows: Sequence[Row]) -> Iterator[Defect]:
    """Note counts printed with two or three digits."""
    for name in COUNTS:
        if not name.startswith(("parameters_", "tokens", "flops")):
            continue
        printed = [row for row in rows if row.get(name) and row.units.get(name, 0) > 1]
        worst = max((row.units[name] / 2 / row.values[name] for row in printed), default=0.0)
        if worst > 0.001:
            message = f"{name} up to ±{100 * worst:.2g} % by its digits"
            yield Defect("rounded", message, None, name)


def _note_empty_columns(rows: Sequence[Row]) -> Iterator[Defect]:
    names = list(rows[0].original) if len(rows) > 1 else []
    for name in names:
        if all(str(row.original.get(name, "")).strip().lower() in EMPTY for row in rows):
            yield Defect("empty-column", f"{name} is empty in every row", None, name)


def flags_of_weight(flags: str, weight: Weight) -> str:
    """Select the flags of a weight from a comma-separated list; unknown flags have every weight."""
    matching = [
        flag for flag in flags.split(",") if flag not in CODES or CODES[flag].weight == weight
    ]
    return ",".join(matching)


def usable(flags: Iterable[str]) -> bool:
    """Whether fits may use a row with these flags."""
    return all(CODES[flag].weight != "forbids" for flag in flags)
