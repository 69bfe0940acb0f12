"""A figure of ours as a part of a page: its drawing instructions alone, in colours that follow the reader's theme."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from slm.figures import Curve, draw_fit, style
from slm.fits import CurveFit
from slm.report.content import Drawing

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
DARK = {
    style.LAW: "#ff9a4d",
    style.LAW_BAND: "#6b3a16",
    style.SURFACE: "#63b3e6",
    style.SURFACE_BAND: "#1d4562",
}
"""What stands for the figures' two colours, and for their intervals, on a dark page; all else follows a rule."""
THEMED = {"#ffffff": "var(--paper)", "#000000": "var(--ink)"}
"""What takes the page's own colours."""
WORDS = {
    "-frontier": (
        "Best parameters and best tokens against training compute.",
        "How a budget is best shared: the compute-optimal parameters (left) and tokens (right), with 95 % intervals.",
    ),
    "-residuals": (
        "What the fit leaves unexplained, run by run, in per cent.",
        "What the fit leaves unexplained. A pattern here is what its form does not hold; grey is twice the noise.",
    ),
    "-core": (
        "The benchmark's score against training compute, with its 95 % interval.",
        "The score read through the loss. Hollow runs cannot be told from chance; dashed is beyond the runs.",
    ),
}
"""What the other figures show, and how to read them, by the ending of their names."""
NARROW = 400
"""Points of width below which a drawing leaves room beside it."""
GREY = 0.15
"""Saturation below which a colour is a grey."""


def drawings(fit: CurveFit, stem: str | Path, curves: Sequence[Curve]) -> tuple[Drawing, ...]:
    """All figures of a fit, drawn as `draw_fit` does, each with what it shows in words."""
    paths = [path for path in draw_fit(fit, stem, curves, title="") if path.suffix == ".svg"]
    words = {"": (_alt(fit), _caption(fit)), **WORDS}
    return tuple(Drawing(path, *words[path.stem.removeprefix(Path(stem).name)]) for path in paths)


def _alt(fit: CurveFit) -> str:
    """The curve in a sentence, with its ends."""
    flops, losses = [own.flops for own in fit.points], [own.loss for own in fit.points]
    law = f", and the law {fit.law.form} through them with its 95 % interval" if fit.law else ""
    where = f"{style.flops_text(min(flops))} to {style.flops_text(max(flops))} FLOPs"
    return (
        f"Validation loss of {len(fit.points)} run{'s' * (len(fit.points) != 1)} against training compute, {where}: "
        f"the highest {max(losses):.4g}, the lowest {min(losses):.4g}{law}."
    )


def _caption(fit: CurveFit) -> str:
    dots = "Dots are runs at their end, faint lines their training loss on the way there."
    law = " The line is the law, the band its 95 % interval; both reach beyond the runs where they are dashed."
    held = (
        " Below, what the laws of the smaller runs foretold of the larger ones, against what came."
    )
    grid = " The other panel has the loss against size at each FLOPs budget, and the best size as a star."
    return (
        dots
        + law * bool(fit.law)
        + held * bool(fit.law and fit.choice.hold_outs)
        + grid * bool(fit.isoflop)
    )


def inline(path: Path, name: str, label: str) -> str:
    """An SVG file of matplotlib as an element of a page: `label` says what it shows, `name` keeps its ids apart."""
    root = ElementTree.fromstring(path.read_bytes())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    used = set(
        re.findall(
            r"#([\w.]+)", " ".join(value for node in root.iter() for value in node.attrib.values())
        )
    )
    for node in root.iter():
        node.attrib = {
            key.removeprefix(XLINK): _themed(value, name)
            for key, value in node.attrib.items()
            if key != "id" or value in used
        }
        if "id" in node.attrib:
            node.set("id", f"{name}-{node.get('id')}")
    box = str(root.get("viewBox"))
    width = box.split()[2]
    look = {"class": "panel" if float(width) < NARROW else "whole", "style": f"--width:{width}"}
    root.attrib = {"viewBox": box, "role": "img", "aria-label": label, **look}
    ElementTree.register_namespace("", SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode")


def _themed(value: str, name: str) -> str:
    """An attribute: colours as variables of the page, its own letters, references to this drawing, short numbers."""
    value = re.sub(r"#[0-9a-f]{6}\b", lambda own: THEMED.get(own[0], f"var(--{own[0][1:]})"), value)
    value = re.sub(r"'DejaVu Sans'[^;]*", "var(--sans)", value)
    value = re.sub(r"(^|url\()#", rf"\1#{name}-", value)
    return re.sub(r"(\.\d\d)\d+", r"\1", value)


def palette(page: str) -> tuple[str, str]:
    """CSS declarations of the colours that a page's drawings use: as they were drawn, and for the dark."""
    colours = [f"#{own}" for own in sorted(set(re.findall(r"var\(--([0-9a-f]{6})\)", page)))]
    light = "".join(f"--{own[1:]}:{own};" for own in colours)
    return light, "".join(f"--{own[1:]}:{dark(own)};" for own in colours)


def dark(colour: str) -> str:
    """A colour that is as far from a dark page as this one is from white: greys mirrored, others made light."""
    if named := {own.lower(): other for own, other in DARK.items()}.get(colour):
        return named
    hue, light, strength = colorsys.rgb_to_hls(
        *(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    )
    light = 0.93 - 0.84 * light**1.5 if strength < GREY else 0.6 + 0.3 * light
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, strength)
    )
