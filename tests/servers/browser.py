"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.engines.services import need_program

from .harness import DEADLINE, until

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)


class Browser:
    """One page of it, and all that the page asked for and said."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._calls = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []  # of the console: errors, and violations of the page's policy
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self._calls += 1
        self._connection.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(DEADLINE))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            match message:
                case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                    self.requests.append(url)
                case {"method": "Log.entryAdded", "params": {"entry": {"text": text}}}:
                    self.complaints.append(text)
                case {"method": "Runtime.exceptionThrown" | "Runtime.consoleAPICalled", "params": said}:
                    self.complaints.append(json.dumps(said))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self) -> str:
        """Return what a reader sees."""
        return str(self.evaluate("document.body?.innerText"))

    def wait_for(self, expression: str) -> Any:
        return until(lambda: self.evaluate(expression), f"{expression} in {self.text()}, {self.complaints}")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in "keyDown", "keyUp":
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def on_every_page(self, script: str) -> None:
        """Run a script ahead of each page's own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def look_like(self, *, width: int, dark: bool) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


def _page(profile: Path) -> str | None:
    """Return the address of the page of a browser, once that listens."""
    try:
        port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    targets = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
    return next((target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"), None)


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile; skip the test where there is none, or fail it in CI."""
    program = need_program("chromium")
    profile = folder / "profile"
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        with connect(until(lambda: _page(profile), "Chromium to listen"), max_size=None, proxy=None) as connection:
            yield Browser(connection)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
