"""Drive a headless Chromium through its DevTools pipe: JSON messages, each with a zero byte at its end."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-proxy-server",
    "--remote-debugging-pipe",
    "--force-color-profile=srgb",
    "--lang=en-GB",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


def find_chromium() -> str | None:
    """Return the command of an installed Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """A browser process with one page."""

    def __init__(self, folder: Path) -> None:
        own_in, to_browser = os.pipe()
        from_browser, own_out = os.pipe()
        # The browser reads from descriptor 3 and writes to descriptor 4.
        command = f'exec "$0" "$@" 3<&{own_in} 4>&{own_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, find_chromium(), *OPTIONS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(own_in, own_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(own_in), os.close(own_out)
        self._to, self._from = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._answers: queue.Queue[dict] = queue.Queue()
        self._number = 0
        self.events: list[dict] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        pending = b""
        while piece := self._from.read1(1 << 20):
            *whole, pending = (pending + piece).split(b"\0")
            for text in whole:
                message = json.loads(text)
                self._answers.put(message) if "id" in message else self.events.append(message)

    def call(self, method: str, session: str | None = None, **parameters) -> dict:
        """Ask the browser for something and return its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._answers.get(timeout=40))["id"] != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def close(self) -> None:
        """End the browser and what it has started."""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, 9)
                self._process.wait()
            self._to.close()


class Page:
    """One page of a browser."""

    def __init__(self, browser: Chromium) -> None:
        self.browser = browser
        # An own context: no cookies of other pages.
        context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.session, **parameters)

    def look_like(self, width: int, height: int = 900, *, dark: bool = False, phone: bool = False) -> None:
        """Take a size and a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, expression: str):
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 20.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.run(expression):
            assert time.monotonic() < deadline, f"waited in vain for {expression}; the page shows:\n{self.text()}"
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """Return what an element shows."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText") or ""

    def type(self, selector: str, text: str) -> None:
        """Click on a field and type into it, as a person does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key."""
        codes = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=codes[key], **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=codes[key])

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Return every error that the browser has noticed in this page: scripts, policies, requests that failed."""
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        thrown = [
            json.dumps(event["params"]["exceptionDetails"])
            for event in mine
            if event["method"] == "Runtime.exceptionThrown"
        ]
        logged = [
            f"{event['params']['entry']['text']} {event['params']['entry'].get('url', '')}"
            for event in mine
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
        ]
        return thrown + logged

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """Run a browser, with its files in a folder."""
    browser = Chromium(folder)
    try:
        yield browser
    finally:
        browser.close()
