"""Progress as lines, for a log or a pipe, where a bar cannot be drawn. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

EVERY = 15.0  # seconds without a line at most


class Lines:
    """A line as each part of a work begins, and one at least `every` seconds while it lasts.

    A thread of its own writes the latter, so they come also while one step takes minutes.

    Args:
        say: writes a line, at once: what it writes to must not wait for more.
    """

    def __init__(self, say: Callable[[str], None], every: float = EVERY) -> None:
        self._say, self._every = say, every
        self._lock, self._over = threading.Lock(), threading.Event()
        self._begun: dict[str, float] = {}  # part -> when
        self._what, self._amount = "working", ""
        self._last = self._start = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def update(self, what: str, done: int, total: int, in_bytes: bool = False) -> None:
        """`done` of `total` steps, or bytes, of a part are done."""
        with self._lock:
            is_new = what not in self._begun
            self._what, self._amount = what, _amount(done, total, in_bytes)
            if is_new:
                self._begun[what] = time.monotonic()
                self._write(f"{what} ...")

    def begin(self, line: str) -> None:
        """A part that tells no steps; its line is written as it is."""
        with self._lock:
            self._begun[line] = time.monotonic()
            self._what, self._amount = line, ""
            self._write(line)

    def _watch(self) -> None:
        while not self._over.wait(self._every / 15):
            with self._lock:
                now = time.monotonic()
                if now - self._last >= self._every:
                    since = now - self._begun.get(self._what, self._start)
                    self._write(f"{self._what}: {self._amount}{since:.0f} s so far")

    def _write(self, line: str) -> None:
        self._last = time.monotonic()
        self._say(line)

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._over.set()
        self._thread.join()


def _amount(done: int, total: int, in_bytes: bool) -> str:
    if in_bytes:
        return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB, "
    return f"{done:,} of {total:,}, "
