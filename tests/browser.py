"""A headless Chromium, driven through its DevTools pipe: the standard library is all it takes."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
    "--window-size=1000,900",
)
# the browser reads commands from file descriptor 3 and writes answers to 4
LAUNCHER = """
import os, sys
for source, spare in zip(map(int, sys.argv[1:3]), (103, 104)):
    os.dup2(source, spare)
os.dup2(103, 3), os.dup2(104, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 20  # seconds


def executable() -> str | None:
    """The browser of this machine, or one that lies beside Python, if there is one."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next(filter(None, (shutil.which(name, path=places) for name in NAMES)), None)


class Browser:
    """A page that can be loaded, looked at, and touched with a mouse.

    Args:
        path: of the executable.
    """

    def __init__(self, path: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, commands = os.pipe()
        answers, writes = os.pipe()
        profile = f"--user-data-dir={self._profile.name}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(reads), str(writes), path, *FLAGS, profile],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._commands, self._answers = commands, answers
        self._unread = b""
        self._sent = self._loaded = 0
        self._session: str | None = None
        page = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; events are skipped."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._sent:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> bytes:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            read = os.read(self._answers, 1 << 16)
            assert read, "the browser has gone"
            self._unread += read
        answer, _, self._unread = self._unread.partition(b"\0")
        return answer

    def load(self, page: str) -> None:
        """Show a page, given as HTML, and wait until its scripts have run."""
        self._loaded += 1
        path = Path(self._profile.name) / f"page{self._loaded}.html"
        path.write_text(page, encoding="utf-8")
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for(f"location.href === '{path.as_uri()}' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event of the protocol: mouseMoved, mouseWheel, mousePressed, mouseReleased."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._answers)
        self._profile.cleanup()
