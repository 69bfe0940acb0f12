"""What can be wrong with other people's results: the codes, and the checks that every format shares.

Each check looks at rows, fills in what it can compute where the source says nothing, takes out what is no result, and
says so. What the source says otherwise stays.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slm.exchange.importers.architectures import Architecture, known
from slm.exchange.importers.numbers import EMPTY, number
from slm.exchange.importers.readers import plain
from slm.exchange.importers.types import COUNTS, Defect, Row

Weight = Literal["forbids", "warns", "notes"]
"""A code forbids the use of a row in fits, warns, or only notes; `--strict` refuses whatever does more than note."""


@dataclass(frozen=True)
class Code:
    """A kind of defect."""

    weight: Weight
    """What follows from it."""
    meaning: str
    """What it means, for people."""


CODES = {
    "crash-zero": Code("forbids", "0 stands where a crashed run has no result; it is missing now"),
    "failed": Code("forbids", "the source calls the run failed"),
    "diverged": Code("forbids", "the source calls the run diverged"),
    "unfinished": Code("forbids", "the run had not reached its last step"),
    "untrained": Code(
        "forbids", "no better than an untrained model: step 0 posing as the end, or a broken run"
    ),
    "no-result": Code("forbids", "neither val_bpb nor CORE"),
    "estimated": Code("forbids", "an estimate, not a measurement"),
    "withdrawn": Code("forbids", "the author had taken the row out"),
    "duplicate": Code("forbids", "the same row again; the first one counts"),
    "copied-value": Code(
        "forbids", "the same many digits under different settings: a slip of copy and paste"
    ),
    "mixed-data": Code("warns", "several datasets in one file: compared only within each"),
    "ragged": Code(
        "forbids", "more or fewer cells than the header, so values may stand in wrong columns"
    ),
    "tokens-disagree": Code(
        "forbids", "tokens are not steps times batch, or not what the FLOPs budget paid for"
    ),
    "flops-disagree": Code("forbids", "FLOPs are not FLOPs a token times tokens"),
    "parameters-disagree": Code("forbids", "parameter counts contradict each other"),
    "core-disagree": Code("forbids", "CORE is not the mean of its tasks"),
    "core-zero": Code(
        "warns", "CORE of exactly 0 is what scripts write when none was measured; it is missing now"
    ),
    "core-subset": Code("warns", "CORE of a part of each task's examples"),
    "loss-is-bpb": Code("warns", "called a loss, but bits per byte; taken as val_bpb"),
    "mean-of-runs": Code("warns", "the mean of several runs, not one run"),
    "unlabelled-seed": Code(
        "warns", "equal settings, different results: repeats whose seeds are not told"
    ),
    "parameters-empty": Code("warns", "empty parameter columns"),
    "budget-rounded": Code("warns", "a budget printed with too few digits; FLOPs are those spent"),
    "bad-number": Code("warns", "not a number; the cell is missing now"),
    "spreadsheet": Code("warns", "went through a spreadsheet, which keeps a few digits"),
    "dirty-code": Code("warns", "trained by code that its commit does not hold"),
    "resumed": Code(
        "warns", "trained in several goes; the clock shows the last one alone, and is left out"
    ),
    "invalid-utf8": Code("warns", "bytes that are no UTF-8, shown as �"),
    "recomputed": Code("notes", "computed from the row's other numbers"),
    "rounded": Code("notes", "printed with few digits"),
    "empty-column": Code("notes", "a column without a value"),
}
"""Every kind of defect. Codes are stable: fits and queries name them."""

SHOWN = 8
"""Rows that a defect of several of them names."""
UNTRAINED = 3.0
"""Bits a byte: 15 bits a token at 4.7 bytes a token are 3.2, an untrained model of 32,768 tokens."""


def check(rows: Sequence[Row]) -> list[Defect]:
    """Every defect of rows that can be seen without knowing their format; fills in what can be computed."""
    each: tuple[Callable[[Row], Iterable[Defect]], ...] = (
        _states, _words, _zeros, _loss_is_bpb, _untrained, _products, _architecture, _products, _budget, _sums, _result,
    )  # fmt: skip
    found = [defect for one in each for row in rows for defect in one(row)]
    together = (_ratios, _duplicates, _copies, _repeats, _datasets, _rounded, _empty)
    found += [defect for several in together for defect in several(rows)]
    return list(dict.fromkeys(found))


FAILED = ("crash", "crashed", "failed", "error", "oom", "killed")
FINISHED = (
    "",
    "finished",
    "keep",
    "kept",
    "discard",
    "success",
    "ok",
    "done",
    "completed",
    "baseline",
)
UNFINISHED = ("running", "pending", "preempted", "interrupted", "stopped")


def _states(row: Row) -> Iterator[Defect]:
    """The status in our words."""
    word = str(row.get("status") or "").lower()
    if word in FAILED:
        row.values.update(status="failed", reason=row.get("reason") or "error")
        yield Defect("failed", f"status {word!r}", row.number)
    elif word in UNFINISHED:
        row.values.update(status="interrupted")
        yield Defect("unfinished", f"status {word!r}", row.number)
    elif word == "diverged":
        row.values.update(status="diverged", reason="diverged")
        yield Defect("diverged", "status 'diverged'", row.number)
    else:
        row.values.update(status="finished")


def _words(row: Row) -> Iterator[Defect]:
    """What cells say in words about the row as a whole."""
    for column, cell in row.original.items():
        text, name = str(cell).strip().lower(), plain(column)
        if text == "diverged" and row.get("status") == "finished":
            row.values.update(status="diverged", reason="diverged")
            yield Defect("diverged", f"{column} is {cell!r}", row.number, column)
        if text in ("estimated", "extrapolated", "predicted", "guess"):
            yield Defect("estimated", f"{column} is {cell!r}", row.number, column)
        if name in ("commented_out", "withdrawn", "excluded", "outlier") and text in (
            "1",
            "true",
            "yes",
        ):
            yield Defect("withdrawn", f"{column} is {cell!r}", row.number, column)
        several = re.search(r"\bmean\b.{0,30}?\b(\d+) (?:runs|seeds)", text)
        if several or (name in ("n_seeds", "n_runs", "seeds") and text.isdigit() and int(text) > 1):
            yield Defect("mean-of-runs", f"{column}: {cell}", row.number, column)


def _zeros(row: Row) -> Iterator[Defect]:
    """A loss of 0 is nobody's; a CORE of exactly 0 is what scripts write where none was measured."""
    for name in ("val_bpb", "val_loss", "train_loss"):
        if row.get(name) is not None and row.values[name] <= 0:
            printed = row.values.pop(name)
            if name != "train_loss" and row.get("status") == "finished":
                row.values.update(status="failed", reason="error")
            yield Defect("crash-zero", f"{name} {printed:.6f}", row.number, name)
    for name in COUNTS:
        if row.get(name) == 0 and name != "seed" and not name.startswith("parameters_"):
            del row.values[name]
            crashed = row.get("status") == "failed"
            yield Defect("crash-zero" if crashed else "bad-number", f"{name} 0", row.number, name)
        elif (row.get(name) or 0) >= 2**63 and name != "flops":
            yield Defect("bad-number", f"{name} {row.values.pop(name):.4g}", row.number, name)
    if abs(row.get("core") or 0) > 1:
        yield Defect(
            "bad-number", f"CORE {row.values.pop('core'):g} is no share", row.number, "core"
        )
    if row.get("core") == 0:
        del row.values["core"]
        yield Defect("core-zero", "CORE 0.0", row.number, "core")


def _loss_is_bpb(row: Row) -> Iterator[Defect]:
    """Nats a token over bits a byte are ln 2 times bytes a token, 2.4 to 4.2; a validation loss lies near the loss."""
    loss, train = row.get("val_loss"), row.get("train_loss")
    if loss and train and row.get("val_bpb") is None and 0.2 < loss / train < 0.45:
        row.values["val_bpb"] = row.values.pop("val_loss")
        yield Defect(
            "loss-is-bpb", f"{loss:g} beside a train loss of {train:g} nats", row.number, "val_loss"
        )


def _untrained(row: Row) -> Iterator[Defect]:
    bpb = row.get("val_bpb")
    if bpb is not None and bpb >= UNTRAINED and row.get("status") == "finished":
        yield Defect("untrained", f"val_bpb {bpb:g}", row.number, "val_bpb")


def _products(row: Row) -> Iterator[Defect]:
    """tokens = steps·batch and flops = FLOPs a token·tokens: the missing one is computed, or all three compared."""
    yield from _product(row, "tokens", "steps", "batch_tokens")
    yield from _product(row, "flops", "flops_per_token", "tokens")


def _product(row: Row, whole: str, one: str, other: str) -> Iterator[Defect]:
    names = (whole, one, other)
    missing = [name for name in names if row.get(name) is None]
    if not missing:
        product = row.values[one] * row.values[other]
        slack = sum(0.6 * row.units.get(name, 1) / row.values[name] for name in (one, other))
        if not row.agrees(whole, product, max(slack, 0.001)):
            shown = f"{whole} {row.values[whole]:,.6g}, but {one} × {other} is {product:,.6g}"
            yield Defect(f"{whole}-disagree", shown, row.number, whole)
    elif missing == [whole] and (whole == "flops" or row.values[one] * row.values[other] < 2**63):
        row.values[whole] = row.values[one] * row.values[other]
        yield _computed(row, [whole], f"{one} × {other}")
    elif (
        whole == "flops"
        and missing == ["tokens"]
        and 1 <= row.values["flops"] / row.values["flops_per_token"] < 2**63
    ):
        row.values["tokens"] = round(row.values["flops"] / row.values["flops_per_token"])
        yield _computed(row, ["tokens"], "flops / flops_per_token")


def _computed(row: Row, names: Sequence[str], how: str) -> Defect:
    return Defect("recomputed", f"{', '.join(names)} = {how}", row.number)


def _architecture(row: Row) -> Iterator[Defect]:
    """Fill in the counts of the one known family that agrees with every number of a row."""
    depth = row.get("depth")
    empty = [
        name
        for name in row.original
        if plain(name).startswith(("params_", "num_params", "num_scaling"))
    ]
    empty = [name for name in empty if str(row.original[name]).strip().lower() in EMPTY]
    one = _family(row) if depth and depth <= 1000 else None
    if empty:
        filled = f"filled in as {one.name}'s" if one else "and no known family agrees with the row"
        yield Defect("parameters-empty", f"{', '.join(empty)}: {filled}", row.number, empty[0])
    if one is None:
        return
    missing = {name: count for name, count in one.counts().items() if row.get(name) is None}
    row.values.update(missing)
    if row.get("sequence_length") is None and "flops_per_token" not in missing:
        row.values["sequence_length"] = one.context
    if missing:
        taken = (
            ""
            if row.get("sequence_length")
            else f"; its context of {one.context:,} is taken for granted"
        )
        yield _computed(row, list(missing), f"those of {one.name}, d{depth}{taken}")


def _family(row: Row) -> Architecture | None:
    """The known family that a row's own numbers name, if exactly one does.

    FLOPs told must be the family's. A budget decides where counts do not; where counts are exact it may be off as far
    as a slip explains, which `_budget` then names.
    """
    agreeing = [
        one for one in known(row.values["depth"], row.get("sequence_length")) if _agrees(row, one)
    ]
    tokens, asked = row.get("tokens"), _asked(row)
    told = [name for one in agreeing[:1] for name in one.counts() if row.get(name)]
    spent = row.get("flops") or (asked[0] if asked else None)
    if tokens and spent and row.get("flops_per_token") is None:
        exact = (
            bool(told)
            and row.get("flops") is None
            and all(row.units.get(name, 1) <= 1 for name in told)
        )
        allowed = ("paid", "halved", "rounded") if exact else ("paid",)
        agreeing = [
            one for one in agreeing if _paid(row, one.flops_per_token * tokens, spent) in allowed
        ]
    elif not told:
        return None
    return agreeing[0] if len(agreeing) == 1 else None


def _agrees(row: Row, one: Architecture) -> bool:
    """Whether every count that a row tells is a family's, and its width."""
    width = next(
        (number(str(row.original[name])) for name in row.original if plain(name) in WIDTHS), None
    )
    if width and width.value != one.width:
        return False
    return all(row.agrees(name, count) for name, count in one.counts().items())


def _paid(row: Row, flops: float, spent: float) -> str:
    """How FLOPs computed compare with FLOPs told: paid, halved (off by a power of two), rounded, or other."""
    off = flops / spent
    slack = max(
        0.01, 1 / (row.get("steps") or 100), 0.6 * row.units.get("tokens", 1) / row.values["tokens"]
    )
    asked = _asked(row)
    if abs(off - 1) <= slack:
        return "paid"
    if any(abs(off / factor - 1) < 0.02 for factor in (0.125, 0.25, 0.5, 2, 4, 8)):
        return "halved"
    one_digit = asked and re.fullmatch(r"\de\+\d+", asked[1])
    return (
        "rounded"
        if one_digit and abs(off - 1) <= 0.5 * 10 ** int(math.log10(spent)) / spent
        else "other"
    )


WIDTHS = ("model_dim", "width", "n_embd", "d_model")


def _asked(row: Row) -> tuple[float, str] | None:
    """The budget that a row was given, and as it was printed."""
    printed = next(
        (str(cell).strip() for name, cell in row.original.items() if plain(name) in BUDGETS), ""
    )
    found = number(printed)
    return (found.value, printed) if found and found.value > 0 else None


def _budget(row: Row) -> Iterator[Defect]:
    """A budget beside the FLOPs spent, which a whole number of steps brings near it."""
    asked = _asked(row)
    if asked is None:
        return
    budget, printed = asked
    if row.get("flops") is None:
        row.values["flops"] = budget
        yield _computed(row, ["flops"], "the budget, spent to the nearest step")
    elif row.get("tokens"):
        how = _paid(row, row.values["flops"], budget)
        if how == "rounded":
            shown = f"{printed}, but {row.values['flops']:.4g} were spent"
            yield Defect("budget-rounded", shown, row.number, "flops_budget")
        elif how != "paid":
            shown = f"{row.values['tokens']:,} tokens cost {row.values['flops']:.4g} FLOPs, the budget is {printed}"
            yield Defect("tokens-disagree", shown, row.number, "tokens")


BUDGETS = ("flops_budget", "target_flops", "budget")


def _sums(row: Row) -> Iterator[Defect]:
    """Groups of parameters against their sums."""
    groups = [
        row.get(f"parameters_{name}")
        for name in ("wte", "value_embeds", "lm_head", "matrices", "scalars")
    ]
    if all(group is not None for group in groups) and not row.agrees(
        "parameters_total", sum(groups)
    ):
        shown = f"total {row.values['parameters_total']:,}, but the groups sum to {sum(groups):,}"
        yield Defect("parameters-disagree", shown, row.number, "parameters_total")
    matrices, head = groups[3], groups[2]
    if matrices and head:
        if not row.agrees("parameters_scaling", matrices + head):
            shown = f"scaling {row.values['parameters_scaling']:,}, but matrices + head are {matrices + head:,}"
            yield Defect("parameters-disagree", shown, row.number, "parameters_scaling")
        elif row.get("parameters_scaling") is None:
            row.values["parameters_scaling"] = matrices + head
            yield _computed(row, ["parameters_scaling"], "matrices + head")


def _result(row: Row) -> Iterator[Defect]:
    if row.get("val_bpb") is None and row.get("core") is None and row.get("status") == "finished":
        if row.get("val_loss"):
            yield Defect(
                "no-result",
                "only a loss in nats a token, which depends on the tokeniser",
                row.number,
            )
        else:
            row.values.update(status="failed")
            yield Defect("no-result", "no result, so no finished run", row.number)


def _ratios(rows: Sequence[Row]) -> Iterator[Defect]:
    """In a series at one ratio of tokens to parameters, a run off by a power of two had another batch than it says."""
    told = {plain(name): name for row in rows[:1] for name in row.original}
    if "param_data_ratio" not in told or "flops_budget" in told:
        return
    ratios = {row.number: number(str(row.original[told["param_data_ratio"]])) for row in rows}
    usual = Counter(round(ratio.value, 1) for ratio in ratios.values() if ratio).most_common(1)
    for row in rows:
        ratio = ratios[row.number]
        if ratio and usual and usual[0][0]:
            off = ratio.value / usual[0][0]
            if any(abs(off / factor - 1) < 0.05 for factor in (0.125, 0.25, 0.5, 2, 4, 8)):
                shown = f"{ratio.value:g} tokens a parameter where the series has {usual[0][0]:g}: the batch was another"
                yield Defect("tokens-disagree", shown, row.number, told["param_data_ratio"])


INDEXES = ("rank", "index", "row", "no", "n", "", "unnamed_0")


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(str(cell) for name, cell in row.original.items() if plain(name) not in INDEXES)


def _duplicates(rows: Sequence[Row]) -> Iterator[Defect]:
    first: dict[tuple[str, ...], int] = {}
    for row in rows:
        before = first.setdefault(_cells(row), row.number)
        if before != row.number:
            yield Defect("duplicate", f"as row {before}", row.number)


def _copies(rows: Sequence[Row]) -> Iterator[Defect]:
    """Equal results of different settings with more digits than chance gives: below 1 % in the whole file."""
    for name in ("val_bpb", "core"):
        known = [row for row in rows if row.get(name) is not None]
        values = sorted(row.values[name] for row in known)
        if len(values) < 3:
            continue
        span = values[int(0.9 * (len(values) - 1))] - values[int(0.1 * (len(values) - 1))]
        groups: dict[float, list[Row]] = defaultdict(list)
        for row in known:
            groups[row.values[name]].append(row)
        for value, same in groups.items():
            unit = min(row.units.get(name, 1e-6) for row in same)
            chance = len(known) ** 2 / 2 * unit / max(span, unit)
            if chance < 0.01 and len({_cells(row) for row in same}) > 1:
                shown = f"{name} {value} in rows {_numbers(same)}"
                yield from (Defect("copied-value", shown, row.number, name) for row in same)


def _numbers(rows: Sequence[Row]) -> str:
    """The first of them."""
    return ", ".join(str(row.number) for row in rows[:SHOWN]) + ", …" * (len(rows) > SHOWN)


MEASURED = re.compile(
    r"(^|_)(entropy|mean|min|max|std|score|norm|loss|bpb|acc|accuracy|core|time|wall|runtime|created|date|sec|seconds|ms"
    r"|speed|tok|tokens_per|mem|memory|vram|util|delta|ci95|gap|dt|mfu|lrm|pct|rank|metric|results|hours|note|notes"
    r"|timestamp|trial|cost|flops_per_sec|centered)(_|$)"
)
"""Words of columns that are measured rather than set."""


def _settings(row: Row) -> tuple[tuple[str, str], ...]:
    """The cells that say what was run: all but what was measured, and bare numbers of rows."""
    kept = []
    for name, cell in row.original.items():
        text, header = str(cell).strip(), plain(name)
        counted = header in ("run", "id", *INDEXES) and text.isdigit()
        if not counted and not MEASURED.search(header) and text.lower() not in EMPTY:
            found = number(text)
            kept.append((name, f"{found.value:.4g}" if found else text))
    return tuple(kept)


def _repeats(rows: Sequence[Row]) -> Iterator[Defect]:
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_settings(row)].append(row)
    for settings, same in groups.items():
        results = {(row.get("val_bpb"), row.get("core")) for row in same}
        if settings and len(results) > 1 and any(row.get("seed") is None for row in same):
            for row in same:
                others = [other for other in same[: SHOWN + 2] if other is not row]
                yield Defect("unlabelled-seed", f"set as in rows {_numbers(others)}", row.number)


def _datasets(rows: Sequence[Row]) -> Iterator[Defect]:
    found = Counter(row.get("corpus") for row in rows if row.get("corpus"))
    if len(found) > 1:
        shown = ", ".join(f"{name} ({count})" for name, count in found.items())
        yield from (Defect("mixed-data", shown, row.number, "corpus") for row in rows)


def _rounded(rows: Sequence[Row]) -> Iterator[Defect]:
    """Counts of which two or three digits were printed."""
    for name in COUNTS:
        if name.startswith(("parameters_", "tokens", "flops")):
            read = [row for row in rows if row.get(name) and row.units.get(name, 0) > 1]
            worst = max((row.units[name] / 2 / row.values[name] for row in read), default=0.0)
            if worst > 0.001:
                yield Defect(
                    "rounded", f"{name} up to ±{100 * worst:.2g} % by its digits", None, name
                )


def _empty(rows: Sequence[Row]) -> Iterator[Defect]:
    names = list(rows[0].original) if len(rows) > 1 else []
    for name in names:
        if all(str(row.original.get(name, "")).strip().lower() in EMPTY for row in rows):
            yield Defect("empty-column", f"{name} is empty in every row", None, name)


def weighing(flags: str, weight: Weight) -> str:
    """Those of a row's flags, joined by commas, that have a weight; a code that is not known has any."""
    return ",".join(
        flag for flag in flags.split(",") if flag not in CODES or CODES[flag].weight == weight
    )


def usable(flags: Iterable[str]) -> bool:
    """Whether fits may use a row."""
    return all(CODES[flag].weight != "forbids" for flag in flags)
