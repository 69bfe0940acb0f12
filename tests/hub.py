"""A hub on loopback that speaks as much of Hugging Face's protocol as its library asks for, and can be made to fail."""

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
"""Entries of a page of a listing."""


class Hub:
    """A dataset of some files, and what became of the requests for them."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo: str = repo
        self.files: dict[str, bytes] = {}
        self.listed: dict[str, str] = {}
        """What the hub says of the files, whatever it sends."""
        self.asked: Counter[str] = Counter()
        """Requests for the content of each file."""
        self.sent: Counter[str] = Counter()
        """Bytes sent of each."""
        self.busy: Counter[str] = Counter()
        """Of how many requests for a file the next ones are told to come later."""
        self.cut: Counter[str] = Counter()
        """Of how many the connection ends half-way."""
        self.damaged: Counter[str] = Counter()
        """Of how many the content is another."""
        self.url = self.elsewhere = ""
        """Where it answers, and where the content is: another host to who asks."""
        for name, content in files.items():
            self.put(name, content)

    def put(self, name: str, content: bytes) -> None:
        """A file, or another in its place."""
        self.files[name] = content
        self.listed[name] = hashlib.sha256(content).hexdigest()

    def entries(self, below: str) -> list[dict[str, Any]]:
        """The listing of a folder."""
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": self.listed[name][:40],
                "lfs": {"oid": self.listed[name], "size": len(content), "pointerSize": 134},
            }
            for name, content in sorted(self.files.items())
            if name.startswith(below)
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
            elif found := re.fullmatch(rf"/datasets/{hub.repo}/resolve/[^/]+/(.+)", path):
                self._resolved(found[1])
            elif found := re.fullmatch(rf"/api/datasets/{hub.repo}/tree/[^/]+/?(.*)", path):
                self._listing(found[1], int(parse_qs(url.query).get("cursor", ["0"])[0]))
            elif re.fullmatch(rf"/api/datasets/{hub.repo}(/revision/[^/]+)?", path):
                self._send(
                    200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": []}).encode()
                )
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _listing(self, below: str, first: int) -> None:
            entries = hub.entries(below)
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
                "Location": f"{hub.elsewhere}/cdn/{name}",
            }
            self._send(302, b"", headers)

        def _content(self, name: str, body: bool) -> None:
            content = hub.files[name]
            if not body:
                self._send(
                    200, b"", {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}
                )
                return
            hub.asked[name] += 1
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
            given = {"Content-Length": str(len(body) if length is None else length)} | (
                headers or {}
            )
            for name, value in given.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection |= length is not None and len(body) < length

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a port of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.elsewhere = f"http://localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """What a process needs to talk to this hub alone."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
