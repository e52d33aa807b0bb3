"""From the bytes that came to a body. Large ones are unpacked and parsed in processes of their own (`Workers`): a
million small objects would keep this one's interpreter from everybody else, and its memory."""

import asyncio
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...engine_impl.runtime.workers import WorkerError, Workers
from ..errors import FIRST_RETRY_S, QueueFullError
from ..request.limits import Limits
from ..rests import Rests
from .errors import BadFieldError, HttpError
from .readable import Readable

BodyT = TypeVar("BodyT", bound=Readable)

SMALL = 1 << 16
"""A body up to here is parsed at once (bytes), in a few milliseconds at worst."""

COUNT, SECONDS, MEMORY_MIB = 2, 20.0, 768
"""Processes, and what one body may take of them: its million objects of 100 bytes each, twice."""
MAX_WAITING = 64
"""Large bodies that may be held in memory at once (count)."""

MAX_NESTED = 100_000
"""Lists and objects of one body (count): more than any request needs, far fewer than 4 MB can hold. Each takes memory
that its two bytes do not tell of."""
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)

FORMATS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""What a content-encoding is to zlib."""
PLAIN = ("", "identity")


class BodyReader:
    """One server's. close() it."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds a body, unpacked."""
        self._max_bytes, self._waiting = max_bytes, 0
        self._workers = Workers(COUNT, seconds=SECONDS, memory_mib=MEMORY_MIB, nice=15)
        self._threads, self._rests = ThreadPoolExecutor(COUNT, "large-bodies"), Rests(COUNT)

    async def read(self, kind: type[BodyT], raw: bytes, encoding: str, limits: Callable[[], Limits]) -> BodyT:
        """`encoding` is what the caller calls it, such as gzip. `limits` is asked for large bodies alone.

        Raises BadFieldError, RefusedError for a prompt of too many tokens, HttpError, and QueueFullError when too many
        large ones wait.
        """
        encoding = encoding.strip().lower()
        if encoding in PLAIN and len(raw) <= SMALL:
            return kind.read(raw)
        if self._waiting >= MAX_WAITING:
            raise QueueFullError(
                f"{self._waiting} bodies of more than {SMALL} bytes wait already; try again later",
                retry_after_s=FIRST_RETRY_S,
            )
        self._waiting += 1
        try:
            async with self._rests.place():
                loop = asyncio.get_running_loop()
                args = (read_aside, kind, raw, encoding, self._max_bytes, limits())
                return await loop.run_in_executor(self._threads, self._workers.call, *args)
        except WorkerError as error:
            raise BadFieldError("", f"the body cannot be read: it {error}; send less") from error
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._workers.close()


def read_aside(kind: type[BodyT], raw: bytes, encoding: str, max_bytes: int, limits: Limits) -> BodyT:
    """In a worker. What comes back is no longer than the engine takes, as far as its tokens are known."""
    plain = raw if encoding in PLAIN else unpacked(raw, encoding, max_bytes)
    check_nested(plain)
    body = kind.read(plain)
    body.check_counts(limits)
    return body


def check_nested(plain: bytes) -> None:
    """Raises BadFieldError for more lists and objects than MAX_NESTED, before anything is made of them."""
    if plain.count(b"[") + plain.count(b"{") <= MAX_NESTED:
        return
    bare = STRING.sub(b"", plain)  # brackets in a text are no lists
    nested = bare.count(b"[") + bare.count(b"{")
    if nested > MAX_NESTED:
        raise BadFieldError("", f"the body has {nested} lists and objects and may have {MAX_NESTED}; send fewer")


def unpacked(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """Raises HttpError for what is damaged, cut short, or larger than `max_bytes`, of which no more is unpacked."""
    if encoding not in FORMATS:
        known = ", ".join(FORMATS)
        raise HttpError(415, f"content-encoding={encoding[:80]!r} is not known; send {known}, or the body as it is")
    unpacker = zlib.decompressobj(FORMATS[encoding])
    try:
        body = unpacker.decompress(raw, max_bytes + 1)
    except zlib.error as error:
        raise HttpError(400, f"the body is no {encoding}: {error}") from error
    if len(body) > max_bytes:
        raise too_large(max_bytes)
    if not unpacker.eof:
        raise HttpError(400, f"the body is cut short: its {encoding} has no end")
    if unpacker.unused_data:
        raise HttpError(400, f"the body goes on behind the end of its {encoding}")
    return body


def too_large(max_bytes: int) -> HttpError:
    return HttpError(
        413, f"the body exceeds max_message_bytes={max_bytes}; send less or serve with a larger --max-message-bytes"
    )
