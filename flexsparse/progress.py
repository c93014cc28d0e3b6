"""A small progress bar on stderr, with the seconds of the step that is under way."""

from __future__ import annotations

import io
import sys
import threading
import time
from types import TracebackType

BAR = 24
REFRESH = 0.25  # seconds


class Progress:
    """A bar over steps of one job, for a `with` block.

    On a terminal one line is redrawn, also while a step runs. Elsewhere (a pipe, a CI log) each
    named step is a line of its own when it begins.

    Args:
        job: what is going on, in a word or two.
        total: how many times `step` or `tick` will be called.
        what: what is going on, in more words, for a job that ticks.
        live: whether to redraw a line; by default where stderr is a terminal.
        patience: seconds that the job may take without a word, for one that is mostly short.
    """

    def __init__(
        self,
        job: str,
        total: int,
        what: str = "",
        *,
        live: bool | None = None,
        patience: float = 0.0,
    ) -> None:
        self.job, self.total, self.done, self.what = job, total, 0, what
        self._started = self._step_started = time.perf_counter()
        self._stream = sys.stderr or io.StringIO()  # a program without a console has none
        self._live = self._stream.isatty() if live is None else live
        self._patience = patience
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._begun = False

    def step(self, what: str) -> None:
        """Begin a step; the one before it is done."""
        self.done += self._begun
        self._begun = True
        self.what, self._step_started = what, time.perf_counter()
        if self._live:
            self._draw()
        else:
            print(f"{self.job} {self.done + 1}/{self.total}: {what}", file=self._stream, flush=True)

    def tick(self) -> None:
        """One more of the total is done, and needs no words."""
        self.done += 1
        if self._live:
            self._draw()

    def __enter__(self) -> Progress:
        if self._live:
            self._thread.start()
        elif self.what and not self._patience:
            print(f"{self.job}: {self.what}", file=self._stream, flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._live:
            self._thread.join()
            self._stream.write("\r\033[K")
        taken = time.perf_counter() - self._started
        if kind is None and taken >= self._patience:
            print(f"{self.job}: done in {taken:.0f} s", file=self._stream)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH):
            self._draw()

    def _draw(self) -> None:
        if time.perf_counter() - self._started < self._patience:
            return
        filled = BAR * min(self.done, self.total) // max(self.total, 1)
        bar = "#" * filled + "-" * (BAR - filled)
        since = time.perf_counter() - self._step_started
        self._stream.write(
            f"\r\033[K{self.job} [{bar}] {self.done}/{self.total} {self.what} {since:.0f} s"
        )
        self._stream.flush()
