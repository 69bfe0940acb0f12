"""A report in Markdown, for a pull request."""

from __future__ import annotations

import re

from tabulate import tabulate

from slm.report.content import (
    Block,
    Cautions,
    Commands,
    Drawing,
    Facts,
    Heading,
    Items,
    Report,
    Table,
    Text,
)


def markdown(report: Report) -> str:
    """The whole document. Drawings are linked, as .png, by the paths that they have."""
    parts = [f"# {_plain(report.name)}"]
    parts += [f"*{_plain(report.question)}*"] if report.question else []
    parts += [_plain(report.facts), *(f"**{_words(own)}**" for own in report.answer)]
    parts += [
        "\n".join(
            f"- {_plain(own.name)}: **{_plain(own.value)}**, {_plain(own.detail)}"
            for own in report.keys
        )
    ]
    for section in report.sections:
        parts += [f"## {_plain(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(part for part in [*parts, f"---\n{_plain(report.made)}"] if part) + "\n"


def _plain(words: str) -> str:
    """Words of which nothing is read as markup, on one line."""
    return re.sub(r"([\\`*<|]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", re.sub(r"\s+", " ", words))


def _words(text: str) -> str:
    """The same, commands between backticks as code."""
    parts = text.split("`")
    return (
        "`".join(part if k % 2 else _plain(part) for k, part in enumerate(parts))
        if len(parts) % 2
        else _plain(text)
    )


def _block(block: Block) -> str:
    match block:
        case Text():
            return _words(block.words)
        case Heading():
            return f"### {_plain(block.words)}"
        case Items():
            return "\n".join(f"- {_words(words)}" for words in block.words)
        case Table():
            rows = [[_plain(cell) for cell in row] for row in block.rows]
            cells = tabulate(
                rows,
                [_plain(own) for own in block.headers],
                tablefmt="github",
                disable_numparse=True,
            )
            return f"{_words(block.caption)}:\n\n{cells}"
        case Drawing():
            return f"![{_plain(block.alt)}](<{block.path.with_suffix('.png')}>)\n\n{_words(block.caption)}"
        case Facts():
            return "\n".join(f"- {_plain(key)}: {_plain(own)}" for key, own in block.pairs)
        case Cautions():
            return "\n".join(f"- `{code}`: {_words(words)}" for code, words in block.pairs)
        case Commands():
            return "\n".join(["```sh", *block.lines, "```"])
