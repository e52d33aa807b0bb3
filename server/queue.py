"""The waiting room: bounded, first come first served, shared by the callers and the orchestrator's thread."""

import threading
from collections import deque
from collections.abc import Callable

from .errors import QueueFullError
from .request import Request


class RequestQueue:
    """At most `max_queued` requests. All methods may be called from any thread."""

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self._requests: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed: Exception | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, request: Request) -> None:
        """Raises QueueFullError, or whatever the queue was closed with."""
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self._requests) >= self.max_queued:
                raise QueueFullError(
                    f"{len(self._requests)} requests wait already and max_queued={self.max_queued}; "
                    "try again later or serve with a larger --max-queued"
                )
            self._requests.append(request)
            self._changed.notify()

    def take(self) -> Request | None:
        """The oldest request, or None."""
        with self._changed:
            return self._requests.popleft() if self._requests else None

    def remove(self, request: Request) -> bool:
        """Whether it was still waiting."""
        with self._changed:
            if request not in self._requests:
                return False
            self._requests.remove(request)
            return True

    def close(self, reason: Exception) -> None:
        """From now on put() raises `reason`, the first one given. What waits already can still be taken."""
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify()

    def wait(self, until: Callable[[], bool]) -> None:
        """Sleeps until a request waits here or `until()` holds; asked again at every put() and close()."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._requests) or until())
