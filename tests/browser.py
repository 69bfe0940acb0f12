"""A headless Chromium driven by the DevTools protocol over two pipes."""

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
    """One page of a running browser."""

    commands: int
    """File descriptor of the browser's input."""
    answers: int
    """File descriptor of the browser's output."""
    session: str = ""
    """Session of the page; empty before one is attached."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Events since the last `open`."""
    buffer: bytes = b""
    """Bytes of an incomplete message."""
    count: int = 0
    """Commands sent."""

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.count += 1
        command: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            more = os.read(self.answers, 1 << 16)
            assert more, "the browser has ended"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path, width: int = 1200, theme: str = "light") -> None:
        """Load a file at a width in CSS pixels (a phone below 600) in the theme light or dark."""
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
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def console(self) -> list[str]:
        """Return console messages, errors of the page and violations of its policy."""
        names = (
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Audits.issueAdded",
        )
        return [
            json.dumps(event["params"]) for event in self.events if event.get("method") in names
        ]

    def requests(self) -> list[str]:
        """Return the addresses that the page requested, its own included."""
        sent = [
            event for event in self.events if event.get("method") == "Network.requestWillBeSent"
        ]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        answer = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print(self, path: Path) -> None:
        """Write the page as PDF."""
        answer = self(
            "Page.printToPDF",
            printBackground=False,
            preferCSSPageSize=True,
            paperWidth=8.27,
            paperHeight=11.69,
        )
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start a browser whose profile is in a folder; skip the test where no browser is installed.

    Scripts of the page are disabled: a report needs none.
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
        page = Browser(commands, answers)
        target = page("Target.createTarget", url="about:blank")["targetId"]
        page.session = page("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            page(f"{domain}.enable")
        page("Emulation.setScriptExecutionDisabled", value=True)
        yield page
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait(30)
