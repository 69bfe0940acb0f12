"""Download of one file that resumes where an interrupted attempt stopped.

urllib.request and torch.hub.download_url_to_file start over after an interruption; a bundle on a
slow line needs to resume.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from slm.files import fingerprint
from slm.monitor.progress import Report, no_report

CHUNK_BYTES = 2**18
MAX_FAILURES = 3
"""Attempts in a row that bring no byte before the download is given up."""
TIMEOUT = 60.0
"""Seconds without a byte."""


def download(url: str, folder: Path, report: Report = no_report) -> Path:
    """Return the file of a URL, in a folder; what an interrupted attempt received is reused.

    `report` is given the missing bytes received, and their number. A partial file belongs to the
    length and entity tag that the server named: other content starts over. Raises RuntimeError if
    the file cannot be received completely.
    """
    failures = 0
    while failures < MAX_FAILURES:
        size = 0
        part = None
        try:
            with _open(url, {}) as answer:
                part, length = _part(url, folder, answer)
                size = _size(part)
                _fill(url, part, length, answer, report)
            reason = f"{_size(part):,} of {length:,} bytes received"
            if _size(part) == length:
                return part
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{url}: HTTP status {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        failures = 0 if part and _size(part) > size else failures + 1
    raise RuntimeError(
        f"{url} could not be downloaded completely ({reason}): "
        "run the command again to resume, or name a copy with --from"
    )


def _open(url: str, headers: dict[str, str]) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _part(url: str, folder: Path, answer: Any) -> tuple[Path, int]:
    """Return the partial file of the server's content, and the content's length in bytes."""
    length = answer.headers.get("Content-Length")
    if length is None:
        raise RuntimeError(f"{url}: the server sends no Content-Length")
    tag = "|".join((url, length, answer.headers.get("ETag", "")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".{fingerprint(tag)}.part", int(length)


def _fill(url: str, part: Path, length: int, answer: Any, report: Report) -> None:
    """Append to a partial file what it lacks; a file that grew too long is removed."""
    size = _size(part)
    if size == length:
        return
    if size:
        answer.close()
        tag = answer.headers.get("ETag")
        conditions = {"If-Range": tag} if tag else {}
        answer = _open(url, {"Range": f"bytes={size}-"} | conditions)
        if answer.headers.get("Content-Range") != f"bytes {size}-{length - 1}/{length}":
            size = 0  # the server sends the whole file
    with answer, part.open("ab" if size else "wb") as file:
        start = size
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
            size += len(chunk)
            report(size - start, length - start)
    if size > length:
        part.unlink()
