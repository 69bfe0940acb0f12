"""Downloads from a real server resume where they stopped and never pass an incomplete file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slm.evaluate import bundle
from slm.evaluate.download import download
from tests import bundles
from tests.evaluate.test_bundle import zipped

CONTENT = bytes(range(256)) * 4096


class Server(ThreadingHTTPServer):
    """Serves one content, with the faults that a test sets."""

    content = CONTENT
    tag = '"first"'
    max_bytes = 10**9
    """Bytes after which it closes the connection."""
    ranges = True
    requests: list[str | None]
    """Range header of each request."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        requested = self.headers.get("Range")
        server.requests.append(requested)
        if self.path != "/file":
            self.send_error(404, "Not Found")
            return
        start = 0
        if requested and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        try:
            self.wfile.write(server.content[start : start + server.max_bytes])
        except (BrokenPipeError, ConnectionResetError):
            server.requests.append("closed")

    def log_message(self, *words: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/file"


def ranges(server: Server) -> list[str]:
    return [request for request in server.requests if request and request != "closed"]


def test_the_content_arrives_with_progress(server: Server, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    path = download(address(server), tmp_path, lambda done, total: reports.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert server.requests == [None]


def test_a_broken_connection_resumes_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.max_bytes = 400_000
    assert download(address(server), tmp_path).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=400000-", "bytes=800000-"]


def test_the_next_download_resumes_an_interrupted_one(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(address(server), tmp_path, interrupt)
    (part,) = tmp_path.iterdir()
    size = part.stat().st_size
    assert 300_000 < size < len(CONTENT)
    assert download(address(server), tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [f"bytes={size}-"]


def test_a_part_of_other_content_is_not_resumed(server: Server, tmp_path: Path) -> None:
    server.max_bytes = 0
    with pytest.raises(
        RuntimeError, match=r"0 of 1,048,576 bytes received.*run the command again to resume"
    ):
        download(address(server), tmp_path)
    server.max_bytes, server.content, server.tag = 10**9, CONTENT[::-1], '"second"'
    assert download(address(server), tmp_path).read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_sends_the_whole_file(server: Server, tmp_path: Path) -> None:
    path = download(address(server), tmp_path)
    path.write_bytes(CONTENT[:1000])
    server.ranges = False
    assert download(address(server), tmp_path).read_bytes() == CONTENT


def test_a_failed_download_is_a_one_line_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="HTTP status 404 Not Found"):
        download(address(server) + "s", tmp_path)
    with pytest.raises(RuntimeError, match=r"could not be downloaded completely .*refused.*--from"):
        download("http://127.0.0.1:9/file", tmp_path)


def test_the_command_downloads_checks_and_keeps_only_the_bundle(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from slm.cli import data

    server.content = zipped(bundles.write(tmp_path / "eval_bundle")).read_bytes()
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "runs"))
    monkeypatch.setattr(data, "CORE_URL", address(server))
    data.core()
    installed = bundle.installed(tmp_path / "runs")
    assert f"bundle {installed.id}: 4 tasks, 160 examples" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "data" / "core").iterdir()) == [installed.folder]
