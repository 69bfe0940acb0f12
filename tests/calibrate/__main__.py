"""Print every table: `python -m tests.calibrate [--repetitions 500] [--designs 2]`."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from tests.calibrate import compare, curves, design

SECTIONS = {
    "Intervals of the curves: 90 to 98 % coverage if the assumptions hold": curves.intervals,
    "Warnings of the curves: designs where they should and should not fire": curves.warnings,
    "Two recipes: false claims at one look and at ten, with a seed added each": compare.report,
    "Next runs compared with evenly spaced runs of the same FLOPs": design.report,
}


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.calibrate")
    parser.add_argument("--repetitions", type=int, default=500, help="repetitions of each design")
    parser.add_argument("--designs", type=int, help="only the first designs of each table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for title, report in SECTIONS.items():
        headers, rows = report(options.repetitions, options.seed, options.designs)
        print(f"\n{title}\n")
        print(tabulate(rows, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
