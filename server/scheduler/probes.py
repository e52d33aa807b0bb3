"""Who waits for the engine to show that it still makes steps."""

from collections import deque
from concurrent.futures import Future

from ..errors import UnavailableError


class Probes:
    """Asked from any thread, answered by the orchestrator's."""

    def __init__(self) -> None:
        self._waiting: deque[Future[None]] = deque()

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def add(self) -> "Future[None]":
        """For wait()."""
        probe: Future[None] = Future()
        self._waiting.append(probe)
        return probe

    def answer(self, error: Exception | None = None) -> None:
        """Tells all that wait of a step that was read, or of what went wrong."""
        while self._waiting:
            probe = self._waiting.popleft()
            probe.set_result(None) if error is None else probe.set_exception(error)


def wait(probe: "Future[None]", timeout_s: float) -> None:
    """Raises what went wrong, or UnavailableError when nothing is told in time."""
    try:
        probe.result(timeout_s)
    except TimeoutError:
        raise UnavailableError(f"no step of the engine came to an end within {timeout_s:g} s") from None
