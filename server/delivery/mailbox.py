"""From the delivery thread to the event loop: one wake-up for all that comes together, not one a token."""

import asyncio
from collections import deque

from ..request.request import Event

Batch = list[tuple[int, Event]]
"""Events that follow one another, each with the number of the request that it belongs to."""


class Mailbox:
    """Belongs to one event loop; one thread posts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posts: deque[tuple[asyncio.Queue[tuple[int, Event]], int, Event]] = deque()

    def post(self, events: "asyncio.Queue[tuple[int, Event]]", number: int, event: Event) -> None:
        """Puts (number, event) into `events` on the loop. Raises RuntimeError when the loop is closed."""
        self._posts.append((events, number, event))
        if len(self._posts) == 1:  # else a wake-up is on its way, and takes this along
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._posts:
            events, number, event = self._posts.popleft()
            events.put_nowait((number, event))
