"""What a request notes of itself while it is traced. Requests that are not traced have none of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a prompt that were computed together."""

    started: float
    """When the device was asked for it (s of time.monotonic())."""
    start: int
    """Tokens of the text before it."""
    tokens: int


@dataclass(eq=False)
class Trace:
    """A request's, from its admission on."""

    caller: Mapping[str, str]
    """The W3C headers that its caller sent: traceparent, and tracestate if there is one."""
    end: Callable[[Any, str], object]
    """Told of the end, with the request and its outcome, from delivery's thread; must not block."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    """The loop's note. After a pre-emption the text so far is computed once more."""
