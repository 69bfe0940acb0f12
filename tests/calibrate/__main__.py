"""Print every section's table: `python -m tests.calibrate [--repetitions 500] [--seed 0]`."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from tests.calibrate import compare, curves, design

SECTIONS = {
    "Intervals of the curves: 90 to 98 % cover where the assumptions hold": curves.intervals,
    "Warnings of the curves, by the designs where they should and should not fire": curves.warnings,
    "Two recipes: false claims at one look and at ten, a seed added at each": compare.report,
    "Next runs against evenly spaced runs of the same FLOPs": design.report,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.calibrate")
    parser.add_argument("--repetitions", type=int, default=500, help="of every design")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for title, report in SECTIONS.items():
        headers, rows = report(given.repetitions, given.seed)
        print(f"\n{title}\n")
        print(tabulate(rows, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
