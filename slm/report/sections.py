"""What is known of an experiment, in order: answer, curve, cautions, runs, fits, cost, origin."""

from __future__ import annotations

import time
from collections import Counter

from slm import __version__, fits
from slm.exchange.importers.checks import CODES
from slm.fits import Interval, NoCoreFit
from slm.report import provenance as origin
from slm.report import run_tables as runs
from slm.report.content import Block, Cautions, Heading, Items, Key, Report, Section, Table, Text
from slm.report.gather import (
    Columns,
    Found,
    compute,
    core_word,
    counts,
    depth,
    each,
    label,
    number,
    replicates,
    states,
    table,
    varying,
)
from slm.text import duration

CAPTIONS = {
    "law": "Laws of loss against compute C",
    "budget (FLOPs)": "The best size at each FLOPs budget",
    "surface": "Surfaces of loss over parameters N and tokens D",
    "fitted to FLOPs <=": "Larger runs held out, and how well the smaller ones foretold them",
}
"""Of the tables of a fit, by their first header."""
AGAIN = ("planned", "queued", "running", "interrupted")
"""States that the sweep, typed again, takes further by itself."""


def report_of(found: Found) -> Report:
    """The whole report; what there is nothing to say of is left out."""
    sections = [
        Section("What more compute buys", _curves(found)),
        Section("Cautions", _cautions(found)),
        Section("What is missing", _missing(found)),
        Section("Runs", [*runs.of_runs(found), *runs.of_seeds(found)]),
        Section("Fits", _fits(found)),
        Section(core_word(found.finished), _core(found)),
        Section("Throughput", runs.throughput(found.finished)),
        Section("Attempts, and what failures cost", runs.attempts(found)),
        Section("Where it comes from", origin.provenance(found)),
        Section("How to repeat it", origin.repeat(found)),
    ]
    return Report(
        found.name,
        found.question,
        _facts(found),
        _answer(found),
        _keys(found),
        [own for own in sections if own.blocks],
        f"Made by slm {__version__}, slm report {found.name}.",
    )


def _facts(found: Found) -> str:
    """Recipes, runs, depths and the day of the last result."""
    depths = sorted({row["depth"] for row in found.rows if row["depth"] is not None})
    ends = [own["ended"] for own in found.attempts if own["ended"]]
    parts = [", ".join(each(found.rows, "recipe")), counts(len(found.rows), "run")]
    parts += (
        [f"d{depths[0]:g}" + (f" to d{depths[-1]:g}" if len(depths) > 1 else "")] if depths else []
    )
    parts += [time.strftime("%d %B %Y", time.gmtime(max(ends))).lstrip("0")] if ends else []
    return " · ".join(parts)


def _answer(found: Found) -> list[str]:
    """In sentences; of several recipes each alone, and where they are judged against each other."""
    if not found.finished:
        return [f"No answer yet: {states(found.rows)}."]
    if len(found.families) == 1:
        (family,) = found.families
        return [fits.summary(family.fit) if family.fit else f"No curve: {family.why}."]
    said = [
        f"{own.recipe}: {fits.summary(own.fit) if own.fit else own.why}" for own in found.families
    ]
    names = [f"{found.name}/{own.recipe}" for own in found.families[:2]]
    return [*said, f"`slm compare {' '.join(names)}` says what the change is worth."]


def _keys(found: Found) -> list[Key]:
    """The gain, the lowest loss, the benchmark, and what it took."""
    finished, keys = found.finished, []
    law = found.families[0].fit.law if len(found.families) == 1 and found.families[0].fit else None
    if law:
        gain = law.gain(law.largest)
        less = Interval(gain.estimate, gain.high, gain.low)
        value, ends = f"{-100 * (gain.estimate or 0.0):+.1f} %", less.ends("+.1f", -100)
        name = "val_bpb for twice the compute"
        keys.append(Key(value.replace("-", "−"), name, f"95 % interval {ends}".replace("-", "−")))
    known = [row for row in finished if row["val_bpb"] is not None]
    if known:
        best = min(known, key=lambda row: row["val_bpb"])
        spent = f", {compute(best)} FLOPs" if best["flops"] else ""
        keys.append(Key(f"{best['val_bpb']:.4f}", "lowest val_bpb", f"{label(best)}{spent}"))
    scored = [row for row in finished if row["core"] is not None]
    if scored:
        best = max(scored, key=lambda row: row["core"])
        error = f" ± {best['core_error']:.4f}" if best["core_error"] else ""
        keys.append(
            Key(f"{best['core']:.4f}", f"highest {core_word(scored)}", f"{label(best)}{error}")
        )
    seconds = [row["train_seconds"] for row in finished if row["train_seconds"] is not None]
    took = f"{duration(sum(seconds))} of training" if seconds else states(found.rows)
    keys.append(Key(f"{len(finished)} of {len(found.rows)}", "runs finished", took))
    return keys


def _curves(found: Found) -> list[Block]:
    blocks: list[Block] = []
    for family in found.families:
        several = [Heading(family.recipe)] if len(found.families) > 1 else []
        none = [] if family.drawings else [Text(f"No curve: {family.why}.")]
        blocks += [*several, *family.drawings[:1], *none, *family.drawn("-frontier")]
    return blocks


def _missing(found: Found) -> list[Block]:
    """What the experiment does not hold, and the way to it."""
    said = []
    own = [row for row in found.rows if row["source"] == "run"]
    finished, unfinished = (
        [row for row in own if (row["status"] == "finished") is done] for done in (True, False)
    )
    again = [row for row in unfinished if row["status"] in AGAIN]
    stopped = [row for row in unfinished if row["status"] in ("failed", "cancelled")]
    if again:
        said.append(f"{states(again)}: the sweep, typed again, goes on with what is unfinished.")
    for row in stopped:
        reason = f" ({row['reason']})" if row["reason"] else ""
        ways = f"`slm logs {row['run_id']}` says why, `slm retry {row['run_id']}` lets a sweep train it again"
        said.append(f"{label(row)} {row['status']}{reason}: {ways}.")
    lost = [label(row) for row in unfinished if row["status"] == "diverged"]
    said += [f"{name} diverged, which is a result: it has no loss." for name in lost]
    if finished and not replicates(finished):
        said.append(
            "How much of a difference is luck: every run has one seed; `slm sweep … --seeds 3` would tell."
        )
    if finished and all(row["core"] is None for row in finished):
        said.append(f"CORE: `slm eval {finished[-1]['run_id']} --core` measures it.")
    return [Items(said)] if said else []


def _cautions(found: Found) -> list[Block]:
    """Warnings of the fits and defects of imported rows, each once."""
    fitted = [own.fit for own in found.families if own.fit]
    pairs = [(own.code, own.message) for fit in fitted for own in fit.cautions]
    flags = Counter(
        flag for row in found.rows for flag in str(row["flags"] or "").split(",") if flag
    )
    pairs += [
        (flag, f"{_meaning(flag)} ({counts(count, 'imported run')})")
        for flag, count in flags.items()
    ]
    return [Cautions(list(dict.fromkeys(pairs)))] if pairs else []


def _meaning(flag: str) -> str:
    """What a defect means; a newer version's code has no words here."""
    return CODES[flag].meaning if flag in CODES else "a defect"


def _fits(found: Found) -> list[Block]:
    blocks: list[Block] = []
    for family in found.families:
        if family.fit is None:
            continue
        blocks += [Heading(family.recipe)] if len(found.families) > 1 else []
        blocks += [
            Table(CAPTIONS[headers[0]], headers, rows) for headers, rows in fits.tables(family.fit)
        ]
        blocks += family.drawn("-residuals")
    return blocks


def _core(found: Found) -> list[Block]:
    scored = [row for row in found.finished if row["core"] is not None]
    if not scored:
        return []
    columns: Columns = {"depth": depth}
    columns |= varying(scored, "recipe", "horizon", "seed")
    columns |= {
        "FLOPs": compute,
        core_word(scored): lambda row: number(row["core"], ".4f"),
        "standard error": lambda row: number(row["core_error"], ".4f"),
        "val_bpb": lambda row: number(row["val_bpb"], ".4f"),
        "mode": lambda row: str(row["core_mode"] or ""),
    }
    blocks: list[Block] = [own for family in found.families for own in family.drawn("-core")]
    curves = [own.fit.core for own in found.families if own.fit]
    refused = {own.why: None for own in curves if isinstance(own, NoCoreFit)}
    blocks += [Text(f"No curve of {core_word(scored)}: {why}.") for why in refused]
    return [
        *blocks,
        table(
            f"{core_word(scored)} of the final weights: 0 is chance, 1 is perfect", columns, scored
        ),
    ]
