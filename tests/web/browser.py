"""A real headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1200,900",
    "--remote-debugging-port=0",
)  # fmt: skip
LIMIT_S = 20


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here: the pages are tested in a real browser only")
    return found


class Browser:
    """One tab."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._session = ""
        self.console: list[str] = []
        """What the page complained of: blocked by the policy, failed to load."""

    async def start(self) -> None:
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        await self._socket.send_message(
            json.dumps({**message, **({"sessionId": self._session} if self._session else {})})
        )
        with trio.fail_after(LIMIT_S):
            while True:
                found = await self._next()
                if found.get("id") == number:
                    assert "error" not in found, found["error"]
                    return dict(found["result"])

    async def _next(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self._socket.get_message())
        if found.get("method") == "Log.entryAdded":
            self.console.append(found["params"]["entry"]["text"])
        return found

    async def _loaded(self) -> None:
        with trio.fail_after(LIMIT_S):
            while (await self._next()).get("method") != "Page.loadEventFired":
                pass

    async def go(self, url: str) -> None:
        await self._call("Page.navigate", url=url)
        await self._loaded()

    async def run(self, script: str) -> Any:
        found = await self._call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def fill(self, selector: str, value: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).value = {json.dumps(value)}")

    async def press(self, selector: str) -> None:
        """Click what leads to another page, and wait for it."""
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")
        await self._loaded()

    async def text(self, selector: str = "main") -> str:
        return str(await self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def path(self) -> str:
        return str(await self.run("location.pathname"))

    async def screenshot(self) -> bytes:
        """A PNG."""
        return base64.b64decode((await self._call("Page.captureScreenshot", format="png"))["data"])


@contextmanager
def running_chromium() -> Iterator[str]:
    """The address of its DevTools."""
    with tempfile.TemporaryDirectory(prefix="osqbox-chromium-", ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [chromium(), *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, path = _address(Path(profile) / "DevToolsActivePort")
            yield f"ws://127.0.0.1:{port}{path}"
        finally:
            process.kill()
            process.wait(10)


def _address(file: Path) -> tuple[str, str]:
    """Chromium writes it once it listens."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines[0], lines[1]
        time.sleep(0.02)
    raise AssertionError("Chromium did not start")


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    with running_chromium() as url:
        async with open_websocket_url(url, max_message_size=1 << 26) as socket:
            browser = Browser(socket)
            await browser.start()
            yield browser
