"""A download goes on where it stopped, and is never taken for whole when it is not: against a real server."""

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
    """Serves one content, as badly as it is told."""

    content = CONTENT
    tag = '"first"'
    most = 10**9
    """Bytes after which it hangs up."""
    ranges = True
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        own, wanted = self.server, self.headers.get("Range")
        own.asked.append(wanted)
        if self.path != "/file":
            self.send_error(404, "Not Found")
            return
        start = 0
        if wanted and own.ranges and self.headers.get("If-Range") == own.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(own.content) - 1}/{len(own.content)}"
            )
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(own.content) - start))
        self.send_header("ETag", own.tag)
        self.end_headers()
        try:
            self.wfile.write(own.content[start : start + own.most])
        except (BrokenPipeError, ConnectionResetError):
            own.asked.append("left")

    def log_message(self, *words: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/file"


def ranges(server: Server) -> list[str]:
    return [wanted for wanted in server.asked if wanted and wanted != "left"]


def test_it_brings_the_content_and_says_how_far_it_is(server: Server, tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    path = download(address(server), tmp_path, lambda done, of: said.append((done, of)))
    assert path.read_bytes() == CONTENT
    assert said[-1] == (len(CONTENT), len(CONTENT))
    assert server.asked == [None]


def test_a_connection_that_breaks_is_gone_on_with_where_it_broke(
    server: Server, tmp_path: Path
) -> None:
    server.most = 400_000
    assert download(address(server), tmp_path).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=400000-", "bytes=800000-"]


def test_an_interrupted_download_is_gone_on_with_by_the_next(
    server: Server, tmp_path: Path
) -> None:
    def interrupt(done: int, of: int) -> None:
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(address(server), tmp_path, interrupt)
    (part,) = tmp_path.iterdir()
    have = part.stat().st_size
    assert 300_000 < have < len(CONTENT)
    assert download(address(server), tmp_path).read_bytes() == CONTENT
    assert ranges(server) == [f"bytes={have}-"]


def test_a_part_of_another_content_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.most = 0
    with pytest.raises(RuntimeError, match=r"0 of 1,048,576 bytes came.*run it again to go on"):
        download(address(server), tmp_path)
    server.most, server.content, server.tag = 10**9, CONTENT[::-1], '"second"'
    assert download(address(server), tmp_path).read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_is_asked_for_all_of_it(server: Server, tmp_path: Path) -> None:
    path = download(address(server), tmp_path)
    path.write_bytes(CONTENT[:1000])
    server.ranges = False
    assert download(address(server), tmp_path).read_bytes() == CONTENT


def test_what_cannot_be_had_is_said_in_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the server says 404 Not Found"):
        download(address(server) + "s", tmp_path)
    with pytest.raises(RuntimeError, match=r"could not be fetched whole .*refused.*--from"):
        download("http://127.0.0.1:9/file", tmp_path)


def test_the_command_downloads_checks_and_leaves_only_the_bundle(
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
    own = bundle.installed(tmp_path / "runs")
    assert f"bundle {own.id}: 4 tasks, 160 examples" in capsys.readouterr().out
    assert list((tmp_path / "runs" / "data" / "core").iterdir()) == [own.folder]
