"""Text chart of a schedule: one line of bars per device over a time axis."""

from __future__ import annotations

from collections.abc import Sequence

from slm.sweep.schedule import Assignment, makespan

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
"""Seconds of the units of a time axis."""
TICK_COLUMNS = 10
"""Minimum distance of ticks."""


def draw(
    assignments: Sequence[Assignment], labels: dict[str, str], devices: int, width: int
) -> list[str]:
    """Draw a schedule in at most `width` columns; `labels` are by name of the job."""
    digits = len(str(devices - 1))
    columns = width - digits - 1
    scale = (columns - 1) / (makespan(assignments) or 1.0)
    rows = [[" "] * columns for _ in range(devices)]
    for assignment in assignments:
        first = round(assignment.start * scale)
        last = round(assignment.end * scale)
        bar = _bar(labels[assignment.job.name], last - first)
        for device in assignment.devices:
            rows[device][first : last + 1] = bar
    lines = []
    for device, row in enumerate(rows):
        bars = "".join(row).rstrip()
        lines.append(f"{device:>{digits}} {bars}")
    axis = _axis(columns, scale)
    return [*lines, f"{'':>{digits}} {axis}"]


def _bar(label: str, columns: int) -> str:
    """Return `|d20 ------|`, the last column of which is the first of the next bar."""
    if columns == 0:
        return "|"
    text = f"{label} "[: columns - 1] if len(label) < columns else ""
    return f"|{text:-<{columns - 1}}|"


def _axis(columns: int, scale: float) -> str:
    """Return evenly spaced times, each after its mark; `scale` is columns per second."""
    spacing = TICK_COLUMNS / scale
    unit = next((unit for unit, seconds in UNITS.items() if spacing <= 20 * seconds), "d")
    counts = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(count for count in counts if count * UNITS[unit] >= spacing)
    line = ""
    for number in range(0, columns * step, step):
        column = round(number * UNITS[unit] * scale)
        extended = f"{line:<{column}}|{number} {unit}"
        if len(extended) <= columns:
            line = extended
    return line
