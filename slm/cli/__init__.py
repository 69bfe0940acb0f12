"""The command line: one file per command group; heavy modules are imported inside the commands."""

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
    evaluate,
    export,
    fit_curves,
    import_results,
    logs,
    next_runs,
    query,
    report,
    sample,
    size,
    status,
    sweep,
)
from slm.cli.help_groups import expanded, grouped_command

app = typer.Typer(
    name="slm",
    help="Scaling-law experiments on families of small language models.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data_app = typer.Typer(
    help="Corpora, tokenisers and datasets, and the bundles of CORE and pocket-core.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
store_app = typer.Typer(help="The results database.", rich_markup_mode=None, no_args_is_help=True)

app.command("size")(size.size)
app.command("sweep", cls=grouped_command(sweep.GROUPS))(
    expanded(sweep.sweep, *sweep.GROUPS.values())
)
app.command("status")(status.status)
app.command("show")(status.show)
app.command("logs")(logs.logs)
app.command("stop")(control.stop)
app.command("retry")(control.retry)
app.command("rm")(control.rm)
app.command("fit-curves")(fit_curves.fit_curves)
app.command("compare")(compare.compare)
app.command("next")(next_runs.next_runs)
app.command("eval")(evaluate.evaluate)
app.command("sample")(sample.sample)
app.command("report")(report.report)
app.command("query")(query.query)
app.command("doctor")(doctor.doctor)
app.command("import")(expanded(import_results.import_results, import_results.Request))
app.command("export")(export.export)
data_app.command("prepare")(data.prepare)
data_app.command("list")(data.list_data)
data_app.command("show")(data.show)
data_app.command("verify")(data.verify)
data_app.command("remove")(data.remove)
data_app.command("core")(data.core)
data_app.command("pocket-core")(data.pocket_core)
store_app.command("rebuild")(query.rebuild)
store_app.command("check")(query.check)
store_app.command("vacuum")(query.vacuum)
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Scaling-law experiments on families of small language models."""
    if show:
        print(f"slm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 wrong usage or a refusal, 130 interrupted. An error is
    one line on standard error; SLM_DEBUG shows its traceback.
    """
    # Fits solve many small systems, for which BLAS threads cost more than they save.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        if error.exit_code == 0 or type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            code = 0
        else:
            code = _print_error(error.format_message(), error.exit_code)
    except ValueError as error:
        code = _print_error(str(error), 2)
    except RuntimeError as error:
        code = _print_error(str(error), 1)
    except OSError as error:
        code = _print_error(_describe(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _print_error("interrupted", 130)
    sys.exit(code)


def _print_error(message: str, code: int) -> int:
    if os.environ.get("SLM_DEBUG"):
        raise
    print(f"slm: {' '.join(message.split())}", file=sys.stderr)
    return code


def _describe(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        location = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{location}: free some space and run the command again"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
