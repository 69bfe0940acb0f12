"""`slm report`: an experiment as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from slm.cli.options import Json, Mixed, print_result
from slm.files import replacing


def report(
    experiment: Annotated[
        str | None, Argument(help="The experiment; by default the only one in the home.")
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            help="File to write; by default reports/NAME.html of the home, and Markdown on "
            "standard output."
        ),
    ] = None,
    as_markdown: Annotated[
        bool, Option("--markdown", help="Markdown, for a pull request.")
    ] = False,
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
    answer = "\n".join(record.report.answer)
    print_result(as_json, record.to_json(), f"{answer}\n\nreport: {record.page}")
