"""Parts of a report, and their rendering as HTML and Markdown by the templates of this package.

Text in a part is plain text; commands in it stand between backticks. It becomes markup only here:
jinja2 escapes it in HTML, the filters `plain` and `code` escape it in Markdown.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).with_name("templates")
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""Content security policy of the page: should markup slip in, it loads and runs nothing."""
NUMBER = re.compile(r"[-+×]?[\d.,]+(e[-+]?\d+|[kMBT])?\s?(%|s|GB|MB)?|")
"""Cells of a right-aligned column, the empty cell included."""
UNBROKEN = re.compile(r"\[[^][ ]+, [^][ ]+\]( %)?|\d %")
"""Intervals and percentages: no line ends inside one."""
LONG_CELL = 40
"""Characters of a cell from which its column is broken into lines."""
NARROW_FIGURE = 400
"""Width in points below which a figure has its caption to its right."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first column names the row, an unknown cell is empty."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def classes(self) -> list[str]:
        """CSS class of each column: number, long, or none."""
        classes = []
        for cells in zip(*self.rows):
            if all(NUMBER.fullmatch(cell) for cell in cells):
                classes.append("number")
            else:
                classes.append("long" if max(map(len, cells)) > LONG_CELL else "")
        return classes


@dataclass(frozen=True)
class Drawing:
    """A figure with its description and caption."""

    name: str
    """Name among the figures of a fit: curve, frontier, residuals or core."""
    suffix: str
    """End of the file name, which is unique in the report."""
    figure: Figure
    alt: str
    caption: str

    @property
    def width(self) -> float:
        """Width in points."""
        return 72 * self.figure.get_figwidth()

    @property
    def is_narrow(self) -> bool:
        """Whether the caption fits to the right of the figure."""
        return self.width < NARROW_FIGURE

    @property
    def data_uri(self) -> str:
        """The figure as the address of an SVG image."""
        from slm.figures import save_svg

        file = io.BytesIO()
        save_svg(self.figure, file)
        return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Part:
    """A part of a section; empty fields are left out, the others follow in this order."""

    heading: str = ""
    text: str = ""
    entries: Sequence[str] = ()
    """Entries of a bullet list."""
    warnings: Sequence[tuple[str, str]] = ()
    """Code and message of each."""
    facts: Sequence[tuple[str, str]] = ()
    """Name and value of each."""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    """Lines for a shell."""


@dataclass(frozen=True)
class Section:
    """A title and the parts below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class KeyNumber:
    """A number shown next to the answer."""

    value: str
    name: str
    detail: str
    """Interval of the number, or the run that has it."""


@dataclass(frozen=True)
class Report:
    """An experiment as a document."""

    name: str
    question: str
    """Empty if none was declared."""
    facts: str
    """Recipes, runs, depths and date in one line."""
    answer: Sequence[str]
    """Paragraphs."""
    key_numbers: Sequence[KeyNumber]
    sections: Sequence[Section]
    footer: str


def render_html(report: Report) -> str:
    """Return the report as one HTML page that loads no other file and runs no script."""
    template = _environment().get_template("page.html.j2")
    return template.render(report=report, policy=POLICY)


def render_markdown(report: Report, stem: Path) -> str:
    """Return the report as Markdown; figures are written as `stem` and their suffix, and linked as
    PNG."""
    from slm.figures import save

    def link(drawing: Drawing) -> Path:
        return save(drawing.figure, f"{stem}{drawing.suffix}")[0]

    return _environment().get_template("page.md.j2").render(report=report, link=link)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "unbroken": _unbroken,
        "code": _html_code,
        "md": _md_plain,
        "md_code": _md_code,
        "md_table": _md_table,
    }
    return environment


def _unbroken(text: str) -> str:
    """Keep intervals and numbers on one line with their units."""
    return UNBROKEN.sub(lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _html_code(text: str) -> Markup:
    """Escape text, with what is between backticks as code."""
    from markupsafe import Markup

    markup = Markup()
    for k, part in enumerate(text.split("`")):
        markup += Markup("<code>{}</code>").format(part) if k % 2 else _unbroken(part)
    return markup


def _md_plain(text: str) -> str:
    """Escape text for Markdown, on one line."""
    line = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*<|]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", line)


def _md_code(text: str) -> str:
    """Escape text for Markdown, with what is between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return _md_plain(text)
    return "`".join(part if k % 2 else _md_plain(part) for k, part in enumerate(parts))


def _md_table(table: Table) -> str:
    from tabulate import tabulate

    rows: list[list[Any]] = [[_md_plain(cell) for cell in row] for row in table.rows]
    headers = [_md_plain(header) for header in table.headers]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
