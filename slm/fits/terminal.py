"""A fit in words and tables for a terminal: the answer first."""

from __future__ import annotations

from slm.fits.curve import REACH, CurveFit, gains
from slm.fits.isoflop import IsoFlop
from slm.fits.parametric import Parametric
from slm.fits.power_law import PURE, Law

Table = tuple[list[str], list[list[str]]]


def summary(fit: CurveFit) -> str:
    """What doubling compute buys and how the optimum grows, with intervals, or why neither is known."""
    sentences = [_gain(fit.law) if fit.law else f"No law L(C): {fit.choice.why}."]
    if fit.isoflop and fit.isoflop.params_exponent and fit.isoflop.tokens_exponent:
        params, tokens = fit.isoflop.params_exponent, fit.isoflop.tokens_exponent
        sentences.append(
            f"The optimal size grows as C^{params.text('.2f')}, its tokens as C^{tokens.text('.2f')} "
            f"(N: {fit.convention})."
        )
    return " ".join(sentences)


def _gain(law: Law) -> str:
    now, later = (law.gain(times * law.largest).text(".2f", 100) for times in (1.0, REACH))
    lead = "" if gains(law) else "The runs do not show that compute helps. "
    beyond = "extrapolated, if there is no floor," if law.form == PURE else "extrapolated,"
    return (
        f"{lead}Doubling compute lowers val_bpb by {now} % at the largest run, {law.largest:.2g} FLOPs; "
        f"at {REACH:g} times that, {beyond} by {later} %."
    )


def tables(fit: CurveFit) -> list[Table]:
    """(headers, rows) of strings: the laws, the isoFLOP minima, the surfaces; those that there are."""
    laws = [law for law in (fit.law, fit.choice.rival) if law]
    found = [_laws(fit, laws)] if laws else []
    found += [_minima(fit.isoflop)] if fit.isoflop else []
    return found + ([_surfaces(fit.parametric)] if fit.parametric.surface else [])


def _laws(fit: CurveFit, laws: list[Law]) -> Table:
    errors = fit.choice.validation.errors if fit.choice.validation else {}
    rows = [
        [
            law.form,
            "chosen" if law is fit.law else "",
            "0" if law.form == PURE else law.E.text(),
            law.K.text(),
            law.p.text(),
            f"{100 * law.residual_rms:.2g} %",
            f"{100 * errors[law.form]:.2g} %" if law.form in errors else "not tested",
        ]
        for law in laws
    ]
    return ["law", "", "E [95 %]", "K [95 %]", "p [95 %]", "residual", "error held out"], rows


def _minima(isoflop: IsoFlop) -> Table:
    rows = []
    for valley in isoflop.valleys:
        best = valley.minimum
        known = (
            [isoflop.interval(valley).text(), f"{best.tokens:.3g}", f"{best.ratio:.3g}", f"{best.loss:.4f}", "ok"]
            if best
            else ["", "", "", "", f"unresolved: {valley.reason}"]
        )
        rows.append([f"{valley.budget:.3g}", *known])
    return ["budget (FLOPs)", "optimal N [95 %]", "tokens", "tokens/N", "val_bpb", "status"], rows


def _surfaces(parametric: Parametric) -> Table:
    rows = [
        [
            surface.form,
            "chosen" if surface is parametric.surface else "",
            *(surface.intervals[name].text() for name in ("E", "alpha", "beta")),
            "1" if surface.form == "additive" else surface.intervals["gamma"].text(),
            surface.intervals["params_exponent"].text(),
            f"{100 * surface.residual_rms:.2g} %",
            f"{100 * parametric.decisive.errors[surface.form]:.2g} %" if parametric.decisive else "not tested",
        ]
        for surface in parametric.surfaces
    ]
    names = ["E", "alpha", "beta", "gamma", "N* ~ C^"]
    return ["surface", "", *(f"{name} [95 %]" for name in names), "residual", "error held out"], rows
