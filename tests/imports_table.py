"""List what importing gives for every file below a folder: its rows and defects, or its refusal.

`python -m tests.imports_table [FOLDER]` prints the list; the default is the data of SLM_REFERENCE.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from slm.exchange.importers import read_import


def lines(folder: Path) -> Iterator[str]:
    """Yield one line per file, ordered by name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md":
            yield f"{path.relative_to(folder)}: {_outcome(path)}"


def _outcome(path: Path) -> str:
    try:
        parsed = read_import(path)
    except ValueError as error:
        return f"refused: {str(error).removeprefix(f'{path}: ')}"
    usable = sum(parsed.usable(row) for row in parsed.rows)
    counts = Counter(defect.code for defect in parsed.defects)
    defects = ", ".join(f"{code} {count}" for code, count in counts.items())
    outcome = f"{parsed.format}, {usable} of {len(parsed.rows)} rows usable"
    return f"{outcome}; {defects}" if defects else outcome


if __name__ == "__main__":
    default = f"{os.environ.get('SLM_REFERENCE', '')}/data/nanochat"
    root = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    sys.stdout.writelines(f"{line}\n" for line in lines(root))
