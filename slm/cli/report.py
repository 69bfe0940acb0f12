"""`slm report`: an experiment as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.options import Json, Mixed, print_json
from slm.files import replacing

OUTPUT = "File to write; by default reports/NAME.html of the home, and Markdown on standard output."

Experiment = Annotated[
    str | None, typer.Argument(help="The experiment; by default the only one in the home.")
]
Output = Annotated[Path | None, typer.Option(help=OUTPUT)]
Markdown = Annotated[bool, typer.Option("--markdown", help="Markdown, for a pull request.")]


def report(
    experiment: Experiment = None,
    output: Output = None,
    as_markdown: Markdown = False,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Write an experiment as one page: question, answer, curve, runs, warnings, cost, provenance,
    repetition."""
    from slm import results

    if as_markdown and as_json:
        raise ValueError("--markdown and --json: choose one")
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output}: a folder; name a file in it")
    record = results.report(experiment, page=output, allow_mixed=allow_mixed)
    record.page.parent.mkdir(parents=True, exist_ok=True)
    text = record.markdown() if as_markdown else record.html()
    if as_markdown and output is None:
        print(text, end="")
        return
    with replacing(record.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if as_json:
        print_json(record.to_json())
    else:
        print("\n".join([*record.report.answer, "", f"report: {record.page}"]))
