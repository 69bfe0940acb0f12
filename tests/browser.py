"""A headless Chromium, by its own protocol over two pipes: what a page shows, asks for and complains about."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --no-first-run"
)


@dataclass
class Browser:
    """One page of it."""

    commands: int
    """Descriptor that it reads."""
    answers: int
    """Descriptor that it writes."""
    session: str = ""
    """Of the page."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    """Events so far."""
    buffer: bytes = b""
    """Read, but no whole message yet."""
    count: int = 0
    """Commands sent."""

    def __call__(self, method: str, **given: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": given}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self.count:
            self.seen.append(found)
        assert "error" not in found, found
        return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            more = os.read(self.answers, 1 << 16)
            assert more, "the browser has ended"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path, width: int = 1200, theme: str = "light") -> None:
        """Load a file at a width in CSS pixels, a phone's below 600, in a theme."""
        phone = width < 600
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=2,
            mobile=phone,
        )
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": theme}],
        )
        self.seen.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(own.get("method") == "Page.loadEventFired" for own in self.seen):
            self.seen.append(self._next())

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What stood in the console, errors of the page and of its policy included."""
        names = (
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Audits.issueAdded",
        )
        return [json.dumps(own["params"]) for own in self.seen if own.get("method") in names]

    def requests(self) -> list[str]:
        """What the page asked for, itself included."""
        asked = [
            own["params"] for own in self.seen if own.get("method") == "Network.requestWillBeSent"
        ]
        return [own["request"]["url"] for own in asked]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def print(self, path: Path) -> None:
        """The page as a PDF."""
        found = self(
            "Page.printToPDF",
            printBackground=False,
            preferCSSPageSize=True,
            paperWidth=8.27,
            paperHeight=11.69,
        )
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser whose own files go to a folder; the test that asks for it is skipped where there is none.

    The page's scripts are off: what it shows needs none.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(PROGRAMS)} is installed: no page is opened")
    (reads, commands), (answers, writes) = os.pipe(), os.pipe()
    line = (
        f"exec {program} {ARGUMENTS} --user-data-dir='{folder}' about:blank 3<&{reads} 4>&{writes}"
    )
    process = subprocess.Popen(
        ["bash", "-c", line], pass_fds=(reads, writes), stderr=subprocess.DEVNULL
    )
    os.close(reads)
    os.close(writes)
    try:
        own = Browser(commands, answers)
        target = own("Target.createTarget", url="about:blank")["targetId"]
        own.session = own("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            own(f"{domain}.enable")
        own("Emulation.setScriptExecutionDisabled", value=True)
        yield own
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait(30)
