"""Work of a size that strangers choose, with a rest behind each piece: however much of it comes, others keep their
share of the processors. A step that waits for one of two processors is as late as one that waits for both."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SHARE = 16
"""One in so many of the machine's processors is what one such place may take all the time."""
MAX_REST_S = 1.0
"""The longest rest (seconds)."""


def rest_of(processors: int) -> float:
    """How many times as long as a piece of work takes, the rest behind it is."""
    return max(0.0, SHARE / processors - 1)


class Rests:
    """Of one event loop: places for so many pieces of work at once."""

    def __init__(self, places: int) -> None:
        self._places, self._rest = asyncio.Semaphore(places), rest_of(len(os.sched_getaffinity(0)))

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """For one piece of work, in the order in which they came. It ends at once; the next one's begins when the rest
        is over."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            loop.call_later(min(self._rest * (loop.time() - began), MAX_REST_S), self._places.release)
