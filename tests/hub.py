"""A hub on loopback with the part of Hugging Face's protocol that its library needs.

It can be made to fail in several ways.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = 7
"""Entries per page of a listing."""


class Hub:
    """A dataset of some files, with counts of requests and of faults to come."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo: str = repo
        self.files: dict[str, bytes] = {}
        self.listed: dict[str, str] = {}
        """SHA-256 that the hub lists for each file."""
        self.requests: Counter[str] = Counter()
        """Requests for the content of each file."""
        self.sent: Counter[str] = Counter()
        """Bytes sent of each file."""
        self.busy: Counter[str] = Counter()
        """Number of next requests for a file that get the answer 429, too many requests."""
        self.cut: Counter[str] = Counter()
        """Number of next requests whose connection is closed half-way."""
        self.damaged: Counter[str] = Counter()
        """Number of next requests that get damaged content."""
        self.url = ""
        """Address of the hub."""
        self.content_url = ""
        """Address of the content, on another host name."""
        for name, content in files.items():
            self.put(name, content)

    def put(self, name: str, content: bytes) -> None:
        """Add or replace a file."""
        self.files[name] = content
        self.listed[name] = hashlib.sha256(content).hexdigest()

    def entries(self, folder: str) -> list[dict[str, Any]]:
        """Return the listing of a folder."""
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": self.listed[name][:40],
                "lfs": {"oid": self.listed[name], "size": len(content), "pointerSize": 134},
            }
            for name, content in sorted(self.files.items())
            if name.startswith(folder)
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path.startswith("/cdn/"):
                self._content(path.removeprefix("/cdn/"), body)
            elif match := re.fullmatch(rf"/datasets/{hub.repo}/resolve/[^/]+/(.+)", path):
                self._resolved(match[1])
            elif match := re.fullmatch(rf"/api/datasets/{hub.repo}/tree/[^/]+/?(.*)", path):
                self._listing(match[1], int(parse_qs(url.query).get("cursor", ["0"])[0]))
            elif re.fullmatch(rf"/api/datasets/{hub.repo}(/revision/[^/]+)?", path):
                self._send(
                    200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": []}).encode()
                )
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _listing(self, folder: str, first: int) -> None:
            entries = hub.entries(folder)
            more = {
                "Link": f'<{hub.url}{urlsplit(self.path).path}?cursor={first + PAGE}>; rel="next"'
            }
            page = json.dumps(entries[first : first + PAGE]).encode()
            self._send(200, page, more if first + PAGE < len(entries) else {})

        def _resolved(self, name: str) -> None:
            if name not in hub.files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(hub.files[name]))}
            headers |= {
                "X-Linked-Etag": f'"{hub.listed[name]}"',
                "Location": f"{hub.content_url}/cdn/{name}",
            }
            self._send(302, b"", headers)

        def _content(self, name: str, body: bool) -> None:
            content = hub.files[name]
            if not body:
                self._send(
                    200, b"", {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
                )
                return
            hub.requests[name] += 1
            if hub.busy[name]:
                hub.busy[name] -= 1
                self._send(429, b"", {"Retry-After": "1"})
                return
            if hub.damaged[name]:
                hub.damaged[name] -= 1
                content = content[:-9] + b"damaged!!"
            first = int(
                (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0]
            )
            ranged = (
                {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
                if first
                else {}
            )
            cut = len(content) // 2 if hub.cut[name] and not first else len(content)
            hub.cut[name] -= cut < len(content)
            hub.sent[name] += cut - first
            self._send(206 if first else 200, content[first:cut], ranged, len(content) - first)

        def _send(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            all_headers = {"Content-Length": str(len(body) if length is None else length)} | (
                headers or {}
            )
            for name, value in all_headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection |= length is not None and len(body) < length

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.content_url = f"http://localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """Return the environment of a process that uses only this hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
