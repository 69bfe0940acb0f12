"""Help of a command with many options, listed in groups: plain sections, without rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand


def grouped_command(groups: Mapping[str, Sequence[str]]) -> type[TyperCommand]:
    """Return a command class whose `--help` lists its parameters under these titles, the rest under
    "Other".
    """

    class GroupedCommand(TyperCommand):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            records = {}
            for parameter in self.get_params(ctx):
                if record := parameter.get_help_record(ctx):
                    records[parameter.name] = record
            sections = {
                title: [records.pop(name) for name in names] for title, names in groups.items()
            }
            sections["Other"] = list(records.values())
            for title, rows in sections.items():
                with formatter.section(title):
                    formatter.write_dl(rows)

    return GroupedCommand
