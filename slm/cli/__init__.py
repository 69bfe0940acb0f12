"""The command line: one file for each group of commands; what is heavy is imported inside them."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from slm import __version__
from slm.cli import (
    compare,
    control,
    data,
    doctor,
    export,
    logs,
    query,
    report,
    runs,
    sample,
    size,
    sweep,
)
from slm.cli import data_list as prepared
from slm.cli import evaluate as eval
from slm.cli import fit_curves as curves
from slm.cli import import_results as imports
from slm.cli import next_runs as next

app = typer.Typer(
    name="slm",
    help="Scaling-law experiments on families of small language models.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data_app = typer.Typer(
    help="Corpora, tokenisers and rows, and the bundles of CORE and pocket-core.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
store_app = typer.Typer(help="The results database.", rich_markup_mode=None, no_args_is_help=True)

app.command("size")(size.size)
app.command("sweep")(sweep.sweep)
app.command("status")(runs.status)
app.command("show")(runs.show)
app.command("logs")(logs.logs)
app.command("stop")(control.stop)
app.command("retry")(control.retry)
app.command("rm")(control.rm)
app.command("fit-curves")(curves.fit_curves)
app.command("compare")(compare.compare)
app.command("next")(next.next_runs)
app.command("eval")(eval.evaluate)
app.command("sample")(sample.sample)
app.command("report")(report.report)
app.command("query")(query.query)
app.command("doctor")(doctor.doctor)
app.command("import")(imports.import_results)
app.command("export")(export.export)
app.add_typer(data_app, name="data")
data_app.command("prepare")(data.prepare)
data_app.command("list")(prepared.list_data)
data_app.command("show")(prepared.show)
data_app.command("verify")(prepared.verify)
data_app.command("remove")(prepared.remove)
data_app.command("core")(data.core)
data_app.command("pocket-core")(data.pocket_core)
app.add_typer(store_app, name="store")
store_app.command("rebuild")(query.rebuild)
store_app.command("check")(query.check)
store_app.command("vacuum")(query.vacuum)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Scaling-law experiments on families of small language models."""
    if show:
        print(f"slm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit code 0 done, 1 the work failed, 2 wrong usage or a refusal; errors are one line."""
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # fits solve many small systems: threads wait for each other
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if error.exit_code == 0 or type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            code = 0
        else:
            code = _complain(error.format_message(), error.exit_code)
    except ValueError as error:
        code = _complain(str(error), 2)
    except RuntimeError as error:
        code = _complain(str(error), 1)
    except OSError as error:
        code = _complain(_system_error(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _complain("interrupted", 130)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    if os.environ.get("SLM_DEBUG"):
        raise
    print(f"slm: {' '.join(message.split())}", file=sys.stderr)
    return code


def _system_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full{f' at {error.filename}' if error.filename else ''}: free some space and run it again"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
