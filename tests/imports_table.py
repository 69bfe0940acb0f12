"""What becomes of every published file under a folder: imported, with its defects, or refused, with the reason.

`python -m tests.imports_table [FOLDER]` prints it; without a folder that of SLM_REFERENCE.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from slm.exchange import importers as imports


def lines(folder: Path) -> Iterator[str]:
    """A line a file, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md":
            yield f"{path.relative_to(folder)}: {_outcome(path)}"


def _outcome(path: Path) -> str:
    try:
        found = imports.read(path)
    except ValueError as error:
        return f"refused: {str(error).removeprefix(f'{path}: ')}"
    usable = sum(found.usable(row) for row in found.rows)
    defects = ", ".join(
        f"{code} {count}" for code, count in Counter(one.code for one in found.defects).items()
    )
    return f"{found.format}, {usable} of {len(found.rows)} rows usable{f'; {defects}' if defects else ''}"


if __name__ == "__main__":
    root = Path(
        sys.argv[1] if len(sys.argv) > 1 else f"{os.environ['SLM_REFERENCE']}/data/nanochat"
    )
    sys.stdout.writelines(f"{line}\n" for line in lines(root))
