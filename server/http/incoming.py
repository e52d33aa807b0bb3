"""A call's body: what it must be said to be, how long it may take, how it is read."""

import asyncio
from dataclasses import dataclass
from typing import Generic

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from ..gateway import Gateway
from ..request.limits import Limits
from .errors import HttpError
from .reading import BodyReader, BodyT

BODY_S = 60.0
"""How long a body may take to arrive (seconds)."""

JSON = "application/json"
"""What a body must be said to be: a browser sends nothing else to a server that does not know its page."""


@dataclass(frozen=True)
class Incoming(Generic[BodyT]):
    """One that is read."""

    body: BodyT
    size: int
    """As it came (bytes)."""


async def incoming(request: web.Request, kind: type[BodyT], reader: BodyReader, gateway: Gateway) -> Incoming[BodyT]:
    """Raises HttpError, aiohttp's for one that is too large, and as BodyReader.read() does."""
    check_json(request)
    raw, encoding = await read_body(request), request.headers.get("content-encoding", "")
    return Incoming(await reader.read(kind, raw, encoding, lambda: Limits.of(gateway.engine)), len(raw))


def too_slow() -> HttpError:
    """Of a body that has not come within BODY_S."""
    return HttpError(408, f"the body took longer than {BODY_S:g} s")


def check_json(request: web.Request) -> None:
    """Raises HttpError for a body that is said to be something else."""
    if request.content_type != JSON:
        sent = request.headers.get("content-type", "")
        raise HttpError(415, f"content-type={sent[:80]!r} must be {JSON}; send that header")


async def read_body(request: web.Request) -> bytes:
    """Raises HttpError, and aiohttp's for one that is too large."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise too_slow() from None
    except RequestPayloadError as error:
        raise HttpError(400, f"the body cannot be read: {error}") from error
