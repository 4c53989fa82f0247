"""Headless Chromium over the DevTools protocol's pipe: no driver, no port, no library.

The browser reads commands from its file descriptor 3 and answers on 4, JSON that ends in a NUL.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 120.0


def program() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """What a page did while it was open."""

    errors: list[str] = field(default_factory=list)  # console, log and exceptions
    requests: list[str] = field(default_factory=list)


class Tab:
    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer, self._last = b"", 0
        self._session: str | None = None
        self.seen = Seen()
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._last:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            assert time.monotonic() < end, "the browser does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has gone"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.seen.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.seen.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.seen.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.seen.errors.append(str(params["args"]))

    def open(self, page: Path, width: int, scheme: str, height: int = 900) -> None:
        """Load a file at a width in CSS pixels, light or dark."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height,
             deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self("Emulation.setEmulatedMedia", features=[feature])
        self.seen = Seen()
        self("Page.navigate", url=page.as_uri())
        end = time.monotonic() + TIMEOUT
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        found = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser of its own."""
    chromium = program()
    assert chromium
    to_us, from_browser = os.pipe()
    to_browser, from_us = os.pipe()
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
        f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update",
    ]  # fmt: skip

    def arrange() -> None:
        # through numbers that neither 3 nor 4 can be, for each may be the other's
        read, write = os.dup2(to_browser, 60), os.dup2(from_browser, 61)
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen(
        [chromium, *flags],
        preexec_fn=arrange,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Tab(from_us, to_us)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT)
        os.close(from_us)
        os.close(to_us)
