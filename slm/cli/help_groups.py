"""Commands with many options: dataclasses of options, each a section of the help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Any, get_type_hints

from typer.core import TyperCommand


def expanded(command: Callable[..., None], *groups: Any) -> Callable[..., None]:
    """Return a command whose options are the fields of dataclasses, which `command` takes."""
    parameters = []
    for group in groups:
        for name, kind in get_type_hints(group, include_extras=True).items():
            default = getattr(group, name)
            parameters.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )

    def run(**options: Any) -> None:
        arguments = []
        for group in groups:
            values = {name: options[name] for name in group.__annotations__}
            arguments.append(group(**values))
        command(*arguments)

    run.__doc__ = command.__doc__
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def grouped_command(groups: Mapping[str, Any]) -> type[TyperCommand]:
    """Return a command class whose `--help` lists the fields of each dataclass under its title, as
    plain sections without rich, and the rest under "Other".
    """

    class GroupedCommand(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            records = {}
            for parameter in self.get_params(ctx):
                if record := parameter.get_help_record(ctx):
                    records[parameter.name] = record
            for title, group in groups.items():
                with formatter.section(title):
                    formatter.write_dl([records.pop(name) for name in group.__annotations__])
            with formatter.section("Other"):
                formatter.write_dl(list(records.values()))

    return GroupedCommand
