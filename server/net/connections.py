"""aiohttp's server with our own manners: errors of a request's head are ours to word, a client may end its side of the
connection once it has asked, and how a body is packed is no concern of the event loop's."""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

log = logging.getLogger(__name__)

Refuse = Callable[[int, str], web.Response]
"""Makes the answer to a request that cannot be handled, of its status and what is wrong."""

CLOSED_POLL_S = 0.05
"""How often a connection whose client has ended its side is looked at (seconds)."""
TURNS = 5
"""Of the event loop, within which a request that has come begins."""
MOST, SPARED = 1 << 15, 128
"""Connections that may be open at once at one door, and file descriptors that are left for everything else (count)."""
TCP_CLOSE = 7
"""The kernel's name for a connection that was reset."""
ARE_YOU_THERE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""To a client that has ended its side: whoever still reads ignores it, whoever has left resets the connection."""


class Runner(web.AppRunner):
    """Of an application whose connections are ours."""

    def __init__(self, app: web.Application, refuse: Refuse, **options: Any) -> None:
        super().__init__(app, **options)
        self._refuse = refuse

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        refuse = self._refuse

        class Ours(type(server)):
            def __call__(self) -> RequestHandler:
                return Connection(self, refuse, loop=self._loop, auto_decompress=False, **self._kwargs)

        server.__class__ = Ours
        return server


class Connection(RequestHandler):
    """One client's."""

    __slots__ = ("_refuse", "_watcher")

    def __init__(self, manager: Any, refuse: Refuse, **options: Any) -> None:
        super().__init__(manager, **options)
        self._refuse = refuse
        self._watcher: asyncio.Task[None] | None = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Of a head that cannot be read, or of ours that failed."""
        if status >= 500:
            log.error("a request to %s failed", request.path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = self._refuse(status, first_line(message or "the server failed; its log tells why"))
        response.force_close()
        return response

    def eof_received(self) -> bool | None:
        """True: the connection stays open for the answer."""
        if self.transport is None or self.transport.get_extra_info("sslcontext") is not None:
            return None  # TLS ends both sides
        is_idle = self._waiter is not None and not self._waiter.done()
        if is_idle or not self._request_count:
            return None
        self.close()  # after the answer
        self._watcher = self._loop.create_task(self._watch(self.transport))
        return True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Beyond the bound, one that asks for nothing gives way; where there is none, this one."""
        super().connection_made(transport)
        assert self._manager is not None
        others: Any = self._manager.connections
        if len(others) > most_connections():
            idle = (other for other in others if other is not self and other.is_idle)
            next(idle, self).force_close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is there, nor a part of one."""
        return self._waiter is not None and not self._waiter.done() and not self._messages

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        super().connection_lost(exc)

    async def _watch(self, transport: asyncio.Transport) -> None:
        """Ends the connection, and with it the work, once its client turns out to have left."""
        request = None
        for _ in range(TURNS):  # it may be about to begin
            if (request := self._current_request) is not None:
                break
            await asyncio.sleep(0)
        if request is not None and not request.content.is_eof():
            transport.close()  # the rest of its body will not come
            return
        if request is not None and request.writer.output_size == 0 and request.version >= (1, 1):
            transport.write(ARE_YOU_THERE)
        while not transport.is_closing():
            if is_reset(transport.get_extra_info("socket")):
                transport.abort()
                return
            await asyncio.sleep(CLOSED_POLL_S)


def most_connections() -> int:
    """That may be open at once at one of two doors, HTTP's or gRPC's: of the file descriptors there may be, those that
    others need are left, and each door has half of the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, max(soft - SPARED, soft // 2) // 2)


def is_reset(sock: Any) -> bool:
    """Whether the kernel knows that nobody is at the other end; False where it does not tell."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE
    except (AttributeError, OSError):
        return False


def first_line(message: str) -> str:
    """The parser shows what it read below."""
    line = message.strip().partition("\n")[0]
    return "".join(character for character in line if character.isprintable())[:200]
