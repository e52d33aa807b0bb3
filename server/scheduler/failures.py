"""What is told of an engine that fails, and when it is given up."""

from ..errors import FailedError
from ..request.request import Request

MAX_FAILURES = 3
"""Failures without a success between them (count), after which the engine is given up."""


class DeadError(Exception):
    """The engine keeps failing."""


class Failures:
    """Failures since the last success. A prefill that works says nothing about steps."""

    def __init__(self) -> None:
        self._prefills = self._steps = 0

    def prefill_failed(self, error: Exception) -> None:
        """Raises DeadError when it was one too many."""
        self._prefills += 1
        self._give_up_on_a_series(error)

    def step_failed(self, error: Exception) -> None:
        """Raises DeadError when it was one too many."""
        self._steps += 1
        self._give_up_on_a_series(error)

    def worked(self, *, is_step: bool) -> None:
        """A result was read."""
        self._prefills = 0
        if is_step:
            self._steps = 0

    def _give_up_on_a_series(self, error: Exception) -> None:
        count = max(self._prefills, self._steps)
        if count >= MAX_FAILURES:
            raise DeadError(f"{count} failures in a row, the last: {describe(error)}") from error


def describe(error: Exception) -> str:
    """One short line: an XLA error can fill screens."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def failed(request: Request, error: Exception) -> FailedError:
    """What ends the request."""
    return FailedError(f"request {request.id} failed in the engine: {describe(error)}")
