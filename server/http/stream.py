"""An answer as server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from aiohttp import web

from ..delivery.mailbox import Batch
from .errors import HttpError, told

T = TypeVar("T")

HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
"""The last one is for nginx, which would hold chunks back."""


class Answer(Protocol):
    """To one call, in a vendor's form: whole, or as a stream."""

    @property
    def is_large(self) -> bool:
        """Whether to make it takes long enough to be done in a thread."""
        ...

    def add(self, batch: Batch) -> None:
        """For whole()."""

    def whole(self) -> dict[str, Any]:
        """Once everything is added."""
        ...

    def frames(self, batch: Batch) -> bytes:
        """What a stream brings for `batch`; empty when there is nothing to show yet."""
        ...

    def last_frames(self) -> bytes:
        """Once everything is shown."""
        ...

    def error_frames(self, error: HttpError) -> bytes:
        """How a stream ends that fails."""
        ...


async def made(answer: Answer, work: Callable[[Batch], T], batch: Batch) -> T:
    """What `work`, a method of the answer's, makes of a batch: in a thread where it takes long."""
    return await asyncio.to_thread(work, batch) if answer.is_large else work(batch)


async def stream(
    request: web.Request, answer: Answer, batches: AsyncIterator[Batch], request_id: str
) -> web.StreamResponse:
    """Events for each batch that has something to show. Raises what goes wrong before the first; later, it is the last
    event."""
    response = web.StreamResponse(headers=HEADERS)
    try:
        async for batch in batches:
            frames = await made(answer, answer.frames, batch)
            if frames:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(frames)
        await response.write_eof(answer.last_frames())
    except ConnectionError:  # the client has left
        pass
    except Exception as error:
        if not response.prepared:
            raise
        await response.write_eof(answer.error_frames(told(error, request_id)))
    return response
