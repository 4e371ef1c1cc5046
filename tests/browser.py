"""Debian's chromium without a window, driven over its own protocol on a pipe: no driver and no package beside it."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page of a browser."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        command_out, command_in = os.pipe()
        answer_out, answer_in = os.pipe()

        def as_3_and_4() -> None:
            # copies first: one of the numbers may be the other's
            ends = os.dup(command_out), os.dup(answer_in)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [CHROMIUM, *arguments, "about:blank"], preexec_fn=as_3_and_4, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(command_out)
        os.close(answer_in)
        self._commands, self._answers = os.fdopen(command_in, "wb"), os.fdopen(answer_out, "rb")
        self._number, self._session = 0, None
        self.said: list[dict[str, Any]] = []
        """Errors, warnings and whatever else the page said, and the requests that it made."""
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Load a file into a page of this many CSS pixels across."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.said.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not any(each["method"] == "Page.loadEventFired" for each in self.said):
            self.said.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        self._commands.close()
        self._answers.close()

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        command |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while (answer := self._receive()).get("id") != self._number:
            self.said.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            content += byte
        return json.loads(content)
