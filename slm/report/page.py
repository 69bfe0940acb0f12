"""A report as one HTML page: no request, no script; everything that is not ours is escaped where it becomes markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from slm.report.charts import inline, palette
from slm.report.content import (
    Block,
    Cautions,
    Commands,
    Drawing,
    Facts,
    Heading,
    Items,
    Key,
    Report,
    Section,
    Table,
    Text,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""What a browser may do for the page: apply its own style. Were markup to slip in, it would load and run nothing."""
NUMBER = re.compile(r"[-+×]?[\d.,]+(e[-+]?\d+|[kMBT])?\s?(%|s|GB|MB)?|")
"""Cells that line up at the right, the empty one included."""

WHOLE = re.compile(r"\[[^][ ]+, [^][ ]+\]( %)?|\d %")
"""What no line ends in."""
LONG = 40
"""Characters of a cell from which its column is broken into lines."""


class Html(str):
    """Markup; any other string is words."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str) -> Html:
    """`<name …>children</name>`; words and values are escaped, a trailing _ of an attribute's name is dropped."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{given}>{''.join(map(_escaped, children))}</{name}>")


def page(report: Report) -> str:
    """The whole document."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = element(
        "main", *_head(report), *(_section(k, own) for k, own in enumerate(report.sections))
    )
    light, dark = palette(body)
    colours = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"{report.name} · slm"),
        Html(f"<style>\n{style}{colours}\n</style>"),
    ]
    foot = element("footer", element("p", report.made))
    inside = [element("head", *head), element("body", body, foot)]
    return f"<!doctype html>\n{element('html', *inside, lang='en')}\n"


def _escaped(words: str) -> str:
    """Markup as it is; words escaped, intervals and numbers kept on one line with their units."""
    if isinstance(words, Html):
        return words
    return html.escape(WHOLE.sub(lambda own: own[0].replace(" ", "\N{NO-BREAK SPACE}"), words))


def _head(report: Report) -> Iterator[Html]:
    asked = [element("p", report.question, class_="question")] if report.question else []
    yield element(
        "header", element("p", report.facts, class_="facts"), element("h1", report.name), *asked
    )
    keys = [element("ul", *map(_key, report.keys), class_="keys")] if report.keys else []
    answer = element("div", *(element("p", *_words(own)) for own in report.answer), class_="answer")
    yield element("section", element("h2", "The answer", class_="unseen"), answer, *keys)


def _key(own: Key) -> Html:
    parts = ("value", own.value), ("name", own.name), ("detail", own.detail)
    return element("li", *(element("span", words, class_=part) for part, words in parts))


def _section(number: int, section: Section) -> Html:
    blocks = (_block(own, f"s{number}b{k}") for k, own in enumerate(section.blocks))
    return element("section", element("h2", section.title), *blocks)


def _words(text: str) -> list[str]:
    """Words, and commands between backticks as code."""
    return [element("code", part) if k % 2 else part for k, part in enumerate(text.split("`"))]


def _block(block: Block, name: str) -> Html:
    """A block as markup; `name` is its own on the page."""
    match block:
        case Text():
            return element("p", *_words(block.words))
        case Heading():
            return element("h3", block.words)
        case Items():
            return element("ul", *(element("li", *_words(words)) for words in block.words))
        case Table():
            return _captioned(block, name)
        case Drawing():
            picture = Html(inline(block.path, name, block.alt))
            box = element(
                "div", picture, class_="scroll", role="region", aria_labelledby=name, tabindex="0"
            )
            caption = element("figcaption", *_words(block.caption), id=name)
            return element("figure", box, caption)
        case Facts():
            return element(
                "dl",
                *(
                    element("div", element("dt", key), element("dd", own))
                    for key, own in block.pairs
                ),
            )
        case Cautions():
            rows = (
                element("li", element("code", code), " ", *_words(words))
                for code, words in block.pairs
            )
            return element("ul", *rows, class_="cautions")
        case Commands():
            return element("pre", element("code", "\n".join(block.lines)))


def _captioned(table: Table, name: str) -> Html:
    """The caption stands above the box that scrolls, so that it is read whole on a phone."""
    caption = element("p", *_words(table.caption), class_="caption", id=name)
    box = element(
        "div",
        _table(table, name),
        class_="scroll",
        role="region",
        aria_labelledby=name,
        tabindex="0",
    )
    return Html(caption + box)


def _table(table: Table, name: str) -> Html:
    numbers = [
        all(NUMBER.fullmatch(row[k]) for row in table.rows) for k in range(len(table.headers))
    ]
    long = [
        max([0, *(len(row[k]) for row in table.rows)]) > LONG for k in range(len(table.headers))
    ]
    kinds = ("number" if right else "long" if wide else "" for right, wide in zip(numbers, long))
    looks = [{"class_": kind} if kind else {} for kind in kinds]
    heads = [element("th", words, scope="col", **look) for words, look in zip(table.headers, looks)]
    rows = [
        element(
            "tr",
            element("th", row[0], scope="row", **looks[0]),
            *(element("td", words, **look) for words, look in zip(row[1:], looks[1:])),
        )
        for row in table.rows
    ]
    inside = element("thead", element("tr", *heads)), element("tbody", *rows)
    return element("table", *inside, aria_labelledby=name)
