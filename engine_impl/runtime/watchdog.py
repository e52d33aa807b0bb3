"""Notices work that does not come to its end: a device that hangs, a host of the group that does not step."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CHECKS = 20
"""How often a timeout's length is looked at."""


class Watchdog:
    """Of one thread's work. close() it."""

    def __init__(self, timeout_s: float, on_late: Callable[[str], object]) -> None:
        """`on_late` is called once, from a thread of its own, with a reason. A timeout of 0: never."""
        self._timeout_s, self._on_late = timeout_s, on_late
        self._work: tuple[float, str] | None = None
        self._closed = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """The block is work that has to end in time."""
        self._work = (time.monotonic(), what)
        try:
            yield
        finally:
            self._work = None

    def close(self) -> None:
        """It watches no more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._timeout_s / CHECKS):
            work = self._work
            if work is not None and time.monotonic() - work[0] > self._timeout_s:
                self._on_late(f"{work[1]} has taken longer than --step-timeout={self._timeout_s:g} s")
                return
