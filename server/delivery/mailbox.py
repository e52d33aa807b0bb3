"""From the delivery thread to the event loop: one wake-up for all that comes together, not one a token."""

import asyncio
from collections import deque

from ..request.events import Event

Batch = list[tuple[int, Event]]
"""Events that follow one another, each with the number of the request that it belongs to."""


class Inbox:
    """One call's. Belongs to the event loop; one task waits."""

    def __init__(self) -> None:
        self._come: Batch = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, number: int, event: Event) -> None:
        self._come.append((number, event))
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> Batch:
        """All that has come; waits for the first."""
        if not self._come:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        batch, self._come = self._come, []
        return batch


class Mailbox:
    """Belongs to one event loop; one thread posts."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posts: deque[tuple[Inbox, int, Event]] = deque()

    def post(self, inbox: Inbox, number: int, event: Event) -> None:
        """Puts (number, event) into the inbox on the loop. Raises RuntimeError when the loop is closed."""
        self._posts.append((inbox, number, event))
        if len(self._posts) == 1:  # else a wake-up is on its way, and takes this along
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._posts:
            inbox, number, event = self._posts.popleft()
            inbox.put(number, event)
