"""An answer as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from ..delivery.mailbox import Batch
from .errors import told
from .replies import Reply

HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
"""The last one is for nginx, which would hold chunks back."""

DONE = b"data: [DONE]\n\n"


async def stream(
    request: web.Request, answer: Reply, batches: AsyncIterator[Batch], request_id: str
) -> web.StreamResponse:
    """One event for each batch that has something to show. Raises what goes wrong before the first; later, it is the
    last event."""
    response = web.StreamResponse(headers=HEADERS)
    try:
        async for batch in batches:
            chunk = await asyncio.to_thread(answer.chunk, batch) if answer.is_large else answer.chunk(batch)
            if chunk is not None:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(event(chunk))
        await response.write_eof((event(answer.usage_chunk()) if answer.has_usage_chunk else b"") + DONE)
    except ConnectionError:  # the client has left
        pass
    except Exception as error:
        if not response.prepared:
            raise
        await response.write_eof(event(told(error, request_id).body))
    return response


def event(data: dict[str, Any]) -> bytes:
    """ASCII: there are clients that break lines at U+2028."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
