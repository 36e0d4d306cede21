"""Chromium without a window, told what to do through a pipe (its DevTools protocol)."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)


class Page:
    """The one tab of a browser.

    Attributes:
        said: what its console told, and what its rules refused.
        asked: addresses that it asked for.
    """

    def __init__(self, asks: int, told: int):
        self._asks, self._told, self._rest, self._number = asks, told, b"", 0
        self._session: str | None = None
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._asks, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            params = answer.get("params", {})
            if answer["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(params))
            elif answer["method"] == "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._told, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def do(self, script: str) -> Any:
        """The value of an expression of JavaScript; of a promise, what comes of it."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def type(self, name: str, text: str) -> None:
        """Type into the field of this id."""
        self.do(f"(document.getElementById({json.dumps(name)}).focus(), document.activeElement.select?.())")
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def look(self, width: int, height: int, scheme: str = "light", scale: float = 1) -> None:
        """Be a window of this size, in a light or dark scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)


@contextmanager
def browsing(profile: Path):
    """A `Page` of a browser with a new profile in this folder."""
    (asks_end, asks), (told, told_end) = os.pipe(), os.pipe()

    def as_3_and_4():
        # Copied first: either may be 3 or 4 itself.
        ends = os.dup(asks_end), os.dup(told_end)
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [FOUND, *OPTIONS.split(), f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, preexec_fn=as_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(asks_end)
    os.close(told_end)
    try:
        page = Page(asks, told)
        yield page
        page._session = None
        page.call("Browser.close")
    finally:
        process.kill()
        process.wait()
        os.close(asks)
        os.close(told)
