"""Sections of a report: answer, curve, warnings, gaps, runs, fits, cost, provenance, repetition."""

from __future__ import annotations

import time
from collections import Counter

from slm import __version__, fits
from slm.exchange.importers.checks import CODES
from slm.fits import Interval, NoCoreFit
from slm.report.gather import (
    ExperimentData,
    Family,
    Row,
    describe_states,
    distinct,
    replicates,
    row_label,
)
from slm.report.provenance import provenance, repetition
from slm.report.render import KeyNumber, Part, Report, Section, Table
from slm.report.run_tables import (
    attempts,
    core_table,
    run_table,
    seed_tables,
    throughput,
)
from slm.text import duration, flops, plural

CAPTIONS = {
    "law": "Laws of loss against compute C",
    "budget (FLOPs)": "The best size at each FLOPs budget",
    "surface": "Surfaces of loss over parameters N and tokens D",
    "fitted to FLOPs <=": "Larger runs held out, and their prediction by the smaller ones",
}
"""Captions of the tables of a fit, by their first header."""
RESUMABLE = ("planned", "queued", "running", "interrupted")
"""States of runs that the same sweep continues."""


def build_report(data: ExperimentData) -> Report:
    """Build the report; sections without content are left out."""
    sections = [
        Section("What more compute buys", _curves(data)),
        Section("Warnings", _warnings(data)),
        Section("What is missing", _gaps(data)),
        Section("Runs", [Part(tables=[run_table(data), *seed_tables(data)])]),
        Section("Fits", _fits(data)),
        Section(data.core_name, _core(data)),
        Section("Throughput", throughput(data.finished)),
        Section("Attempts, and what failures cost", attempts(data)),
        Section("Where it comes from", provenance(data)),
        Section("How to repeat it", repetition(data)),
    ]
    return Report(
        name=data.name,
        question=data.question,
        facts=_facts(data),
        answer=_answer(data),
        key_numbers=_key_numbers(data),
        sections=[section for section in sections if section.parts],
        footer=f"Made by slm {__version__}, slm report {data.name}.",
    )


def _facts(data: ExperimentData) -> str:
    """Return recipes, number of runs, depths, and the day of the last result."""
    facts = [", ".join(distinct(data.rows, "recipe")), plural(len(data.rows), "run")]
    depths = sorted({row["depth"] for row in data.rows if row["depth"] is not None})
    if depths:
        facts.append(" to ".join(f"d{depth:g}" for depth in dict.fromkeys((depths[0], depths[-1]))))
    ends = [attempt["ended"] for attempt in data.attempts if attempt["ended"]]
    if ends:
        facts.append(time.strftime("%d %B %Y", time.gmtime(max(ends))).lstrip("0"))
    return " · ".join(facts)


def _answer(data: ExperimentData) -> list[str]:
    """Return a paragraph per recipe, and for several recipes the command that compares them."""
    if not data.finished:
        return [f"No answer yet: {describe_states(data.rows)}."]
    if len(data.families) == 1:
        (family,) = data.families
        return [fits.summary(family.fit) if family.fit else f"No curve: {family.why}."]
    paragraphs = []
    for family in data.families:
        summary = fits.summary(family.fit) if family.fit else family.why
        paragraphs.append(f"{family.recipe}: {summary}")
    names = " ".join(f"{data.name}/{family.recipe}" for family in data.families[:2])
    return [*paragraphs, f"`slm compare {names}` prices the change."]


def _key_numbers(data: ExperimentData) -> list[KeyNumber]:
    """Return the gain of doubled compute, the lowest loss, the highest score, and the runs
    finished."""
    finished = data.finished
    numbers = _gain(data)
    measured = [row for row in finished if row["val_bpb"] is not None]
    if measured:
        best = min(measured, key=lambda row: row["val_bpb"])
        cost = f", {flops(best['flops'])} FLOPs" if best["flops"] else ""
        detail = f"{row_label(best)}{cost}"
        numbers.append(KeyNumber(f"{best['val_bpb']:.4f}", "lowest val_bpb", detail))
    if data.scored:
        best = max(data.scored, key=lambda row: row["core"])
        error = f" ± {best['core_error']:.4f}" if best["core_error"] else ""
        name = f"highest {data.core_name}"
        numbers.append(KeyNumber(f"{best['core']:.4f}", name, f"{row_label(best)}{error}"))
    seconds = [row["train_seconds"] for row in finished if row["train_seconds"] is not None]
    detail = f"{duration(sum(seconds))} of training" if seconds else describe_states(data.rows)
    count = f"{len(finished)} of {len(data.rows)}"
    return [*numbers, KeyNumber(count, "runs finished", detail)]


def _gain(data: ExperimentData) -> list[KeyNumber]:
    """Return the change of loss for twice the largest compute, of an experiment with one law."""
    laws = [family.fit.law if family.fit else None for family in data.families]
    if len(laws) != 1 or laws[0] is None:
        return []
    gain = laws[0].gain(laws[0].largest)
    value = f"{-100 * (gain.estimate or 0.0):+.1f} %"
    ends = Interval(gain.estimate, gain.high, gain.low).ends("+.1f", -100)
    detail = f"95 % interval {ends}"
    minus = "\N{MINUS SIGN}"
    name = "val_bpb for twice the compute"
    return [KeyNumber(value.replace("-", minus), name, detail.replace("-", minus))]


def _curves(data: ExperimentData) -> list[Part]:
    return [
        Part(
            heading=_heading(data, family),
            text="" if family.drawings else f"No curve: {family.why}.",
            drawings=family.drawings_named("curve", "frontier"),
        )
        for family in data.families
    ]


def _heading(data: ExperimentData, family: Family) -> str:
    return family.recipe if len(data.families) > 1 else ""


def _warnings(data: ExperimentData) -> list[Part]:
    """Return the warnings of the fits and the defects of imported rows, each once."""
    warnings = []
    for family in data.families:
        if family.fit:
            warnings += [(warning.code, warning.message) for warning in family.fit.warnings]
    flags: Counter[str] = Counter()
    for row in data.rows:
        flags.update(flag for flag in str(row["flags"] or "").split(",") if flag)
    for flag, count in flags.items():
        # a newer version of slm may have written a code that is unknown here
        meaning = CODES[flag].meaning if flag in CODES else "a defect"
        warnings.append((flag, f"{meaning} ({plural(count, 'imported run')})"))
    return [Part(warnings=list(dict.fromkeys(warnings)))] if warnings else []


def _gaps(data: ExperimentData) -> list[Part]:
    """Return what the experiment lacks, and the commands that supply it; nothing for imported
    runs."""
    runs = [row for row in data.rows if row["source"] == "run"]
    finished = [row for row in runs if row["status"] == "finished"]
    resumable = [row for row in runs if row["status"] in RESUMABLE]
    gaps = []
    if resumable:
        gaps.append(f"{describe_states(resumable)}: run the same sweep again to continue.")
    gaps += [_failure(row) for row in runs if row["status"] in ("failed", "cancelled")]
    gaps += [
        f"{row_label(row)} diverged, which is a result: it has no loss."
        for row in runs
        if row["status"] == "diverged"
    ]
    if finished and not replicates(finished):
        gaps.append("The noise: every run has one seed; `slm sweep … --seeds 3` measures it.")
    if finished and all(row["core"] is None for row in finished):
        gaps.append(f"CORE: `slm eval {finished[-1]['run_id']} --core` measures it.")
    return [Part(entries=gaps)] if gaps else []


def _failure(row: Row) -> str:
    run = row["run_id"]
    reason = f" ({row['reason']})" if row["reason"] else ""
    return (
        f"{row_label(row)} {row['status']}{reason}: `slm logs {run}` shows the log, "
        f"`slm retry {run}` lets the next sweep train it again."
    )


def _fits(data: ExperimentData) -> list[Part]:
    parts = []
    for family in data.families:
        if family.fit:
            tables = [
                Table(CAPTIONS[headers[0]], headers, rows)
                for headers, rows in fits.tables(family.fit)
            ]
            parts.append(Part(heading=_heading(data, family), tables=tables))
            parts.append(Part(drawings=family.drawings_named("residuals")))
    return parts


def _core(data: ExperimentData) -> list[Part]:
    if not data.scored:
        return []
    drawings = [drawing for family in data.families for drawing in family.drawings_named("core")]
    curves = [family.fit.core for family in data.families if family.fit]
    reasons = dict.fromkeys(curve.why for curve in curves if isinstance(curve, NoCoreFit))
    return [
        Part(drawings=drawings),
        *(Part(text=f"No curve of {data.core_name}: {why}.") for why in reasons),
        Part(tables=[core_table(data)]),
    ]
