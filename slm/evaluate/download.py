"""A file from the network: what an interrupted attempt brought is kept, and the next one goes on from there."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = 2**18
"""Bytes read at once."""
ATTEMPTS = 3
"""In a row that bring nothing before it is given up."""
TIMEOUT = 60.0
"""Seconds without a byte."""

Report = Callable[[int, int], None]
"""Told how many of how many missing bytes came."""


def download(url: str, folder: Path, report: Report = lambda done, of: None) -> Path:
    """The file of an address, in a folder. Raises RuntimeError when it cannot be had whole; what came is kept.

    A part belongs to the content (length and entity tag) that the server named: of another content it begins anew.
    """
    failed, why = 0, ""
    while failed < ATTEMPTS:
        try:
            with _open(url, {}) as answer:
                part, length = _part(url, folder, answer)
                before = part.stat().st_size if part.exists() else 0
                why = _fill(url, part, length, answer, report)
            if not why:
                return part
            failed = failed + 1 if part.stat().st_size <= before else 0
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{url}: the server says {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            failed, why = failed + 1, str(error) or type(error).__name__
    raise RuntimeError(
        f"{url} could not be fetched whole ({why}): run it again to go on, or name a copy with --from"
    )


def _open(url: str, headers: dict[str, str]) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _part(url: str, folder: Path, answer: Any) -> tuple[Path, int]:
    """Where a content is gathered, and how long it is."""
    if (length := answer.headers.get("Content-Length")) is None:
        raise RuntimeError(f"{url}: the server does not say how long the file is")
    tag = "|".join((url, length, answer.headers.get("ETag", "")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".{hashlib.sha256(tag.encode()).hexdigest()[:16]}.part", int(length)


def _fill(url: str, part: Path, length: int, answer: Any, report: Report) -> str:
    """Add to a part what it lacks; "" when it is whole, else what went wrong."""
    have = part.stat().st_size if part.exists() else 0
    if have < length:
        if have:
            answer.close()
            tag = answer.headers.get("ETag")
            answer = _open(url, {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {}))
            if answer.headers.get("Content-Range") != f"bytes {have}-{length - 1}/{length}":
                have = 0  # the server sends all of it
        with answer, part.open("r+b" if have else "wb") as file:
            file.seek(have)
            before = have
            while piece := answer.read(PIECE):
                file.write(piece)
                have += len(piece)
                report(have - before, length - before)
    if have > length:
        part.unlink()
    return "" if have == length else f"{have:,} of {length:,} bytes came"
