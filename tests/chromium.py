"""Headless Chromium, driven by its DevTools protocol over a pair of pipes.

Nothing has to be installed beside Chromium, and no port is opened. Whatever a page says on its console, throws, or asks
of a network is kept.

References:
  https://chromedevtools.github.io/devtools-protocol/ and the flag --remote-debugging-pipe: the browser reads commands
  from descriptor 3 and writes answers and events to 4, each as JSON that ends in a NUL byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60  # for any single answer, on a machine that has other work
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    "--disable-extensions",
]
KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27}


def find() -> str:
    """The program; without it the test is skipped, and fails where Q8JAX_REQUIRE_BROWSER=1."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing = pytest.fail if os.environ.get("Q8JAX_REQUIRE_BROWSER") == "1" else pytest.skip
        missing("Chromium is not installed: apt-get install chromium")
    return program


class Chromium:
    """One tab of a browser of its own.

    Attributes:
      console: what the page wrote to its console, its uncaught errors, and what the browser had to say about it.
      requests: what the page asked for by an address, but for data: and blob:, which lie in the page.
    """

    def __init__(self, program: str, folder: Path):
        """Starts it with an empty profile in a folder."""
        self.folder = folder
        self.console: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._unread = b""
        self._session: dict[str, str] = {}
        self._events: list[str] = []
        commands, self._commands = _pipe()
        self._answers, answers = _pipe()
        # Python can pass descriptors on, but not under other numbers.
        shell = ["bash", "-c", 'exec 3<&"$0" 4>&"$1" "${@:2}"', str(commands), str(answers)]
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*shell, program, *QUIET, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"],
                pass_fds=(commands, answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(commands)
        os.close(answers)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = {}
        try:
            self.send("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Gives a command and waits for its answer."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self._answers, 1 << 20) if ready else b""
            if not piece:
                state = "ended" if ready else f"has been silent for {SECONDS} s"
                raise RuntimeError(f"Chromium {state}. It wrote:\n{self._log.read_text()[-2000:]}")
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        self._events.append(f"{message['method']} {parameters.get('state', '')}".strip())
        match message["method"]:
            case "Runtime.consoleAPICalled":
                said = " ".join(str(value.get("value", value.get("description"))) for value in parameters["args"])
                self.console.append(f"{parameters['type']}: {said}")
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.console.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded":
                self.console.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
            case "Network.requestWillBeSent":
                if not parameters["request"]["url"].startswith(("data:", "blob:")):
                    self.requests.append(parameters["request"]["url"])

    def downloads(self, folder: Path) -> None:
        """Where files go that the page offers."""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)

    def wait_for(self, event: str) -> None:
        """Until an event has come since the page was opened; of what has states, with its state."""
        while event not in self._events:
            self._note(self._read())

    def open(self, file: Path) -> None:
        """Shows a file from disk, with nothing noted of what was shown before."""
        self._events, self.console, self.requests = [], [], []
        self.send("Page.navigate", url=file.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def screen(self, width: int, height: int, *, phone: bool = False, scheme: str = "light", media: str = "") -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails'].get('exception', {}).get('description')}")
        return done["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits for an expression in the page to hold."""
        deadline = time.monotonic() + SECONDS
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}"
            self.settle()

    def settle(self) -> None:
        """Lets the next picture be drawn and events that were under way arrive."""
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def middle(self, selector: str) -> tuple[float, float]:
        """Of an element, on the screen, once it has been scrolled there."""
        script = """(selector => {
            const element = document.querySelector(selector);
            element.scrollIntoView({block: "center"});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        })"""
        x, y = self.run(f"{script}({json.dumps(selector)})")
        self.settle()  # fingers touch what was drawn last
        return x, y

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector: str, times: int = 1) -> None:
        x, y = self.middle(selector)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.mouse(kind, x, y, button="left", clickCount=count)

    def drag(self, selector: str, dx: float, dy: float) -> None:
        x, y = self.middle(selector)
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseMoved", x + dx, y + dy, button="left", buttons=1)
        self.mouse("mouseReleased", x + dx, y + dy, button="left", clickCount=1)

    def wheel(self, selector: str, pixels: float, *, control: bool = False) -> None:
        x, y = self.middle(selector)
        self.mouse("mouseWheel", x, y, deltaX=0, deltaY=pixels, modifiers=2 if control else 0)

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        touches = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        self.send("Input.dispatchTouchEvent", type=kind, touchPoints=touches)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"windowsVirtualKeyCode": KEY_CODES[key]} if key in KEY_CODES else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def picture(self) -> bytes:
        """What the screen shows, as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])


def _pipe() -> list[int]:
    """Reading and writing end, above 9: no redirection to 3 or 4 can then overwrite the other."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high
