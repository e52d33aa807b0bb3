"""Ports: whether one is free, and listening on one for HTTP."""

import asyncio
import errno
import logging
import socket
from ssl import SSLContext

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from ...engine_impl.errors import RefusedError
from ..config import SecurityConfig, ServerConfig, join_address
from . import tls
from .connections import Refuse, Runner

log = logging.getLogger(__name__)
# A body that breaks off is answered with 400; strangers must not fill the log with it.
log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], RequestPayloadError)))

BACKLOG = 1024
"""Connections that may wait to be accepted; the kernel may take fewer."""

AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop. Where there are no more file descriptors, asyncio tries,
and complains, so many times a second."""

RENEW_S = 1.0
"""How often certificates are looked at (seconds)."""

IDLE_S = 75.0
"""How long a connection may be without a whole request (seconds): longer than the minute for which proxies keep theirs,
or they would meet one that is being closed."""

FLUSH_S = 1.0
"""Time that the last answers get to leave (seconds)."""

SILENT_S, PROBES_S, PROBES = 20, 5, 2
"""A connection this silent is asked whether it still stands, this often (seconds), so many times."""
UNACKNOWLEDGED_MS = 60_000
"""What was sent and is not acknowledged for so long: the peer has vanished, or has stopped reading."""


class Listener:
    """An aiohttp application on a socket. Belongs to one event loop."""

    def __init__(
        self, app: web.Application, sock: socket.socket, refuse: Refuse, security: SecurityConfig | None = None
    ) -> None:
        """`refuse` makes the answer to a request whose head cannot be read. `security`: whose certificates; default:
        in the clear. Raises RefusedError for certificates that cannot be used."""
        self._sock = sock
        self._tls = None if security is None else tls.context(security)
        self._renewal = None if security is None or self._tls is None else tls.Renewal(security)
        self._site: web.SockSite | None = None
        self._renewing: asyncio.Task[None] | None = None
        # handler_cancellation: a client that leaves cancels what works for it.
        self._runner = Runner(
            app,
            refuse,
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=IDLE_S,
            shutdown_timeout=FLUSH_S,
            logger=log,
        )

    async def start(self) -> None:
        """From now on it answers; until then connections wait."""
        await self._runner.setup()
        await self._accept(self._tls)
        if self._renewal is not None:
            self._renewing = asyncio.create_task(self._renew(self._renewal))

    async def close(self) -> None:
        """Frees the port; answers under way get FLUSH_S."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self._runner.cleanup()
        self._sock.close()

    async def _accept(self, context: SSLContext | None) -> None:
        """New connections get this context; those that are there keep theirs."""
        before, self._site = (
            self._site,
            web.SockSite(self._runner, self._sock.dup(), ssl_context=context, backlog=AT_ONCE),
        )
        await self._site.start()
        self._sock.listen(BACKLOG)
        if before is not None:
            await before.stop()

    async def _renew(self, renewal: tls.Renewal) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            if (context := renewal.renewed()) is not None:
                await self._accept(context)


def listening(host: str, port: int, *, what: str, flag: str) -> socket.socket:
    """A socket that other machines can connect to already. Raises RefusedError, which names `what` and the flag."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        is_any = host == "::"  # gRPC takes IPv4 there, too
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=is_any)
    except OSError as error:
        raise RefusedError(
            f"cannot serve {what} on {join_address(host, port)}: {error.strerror or error}; choose another {flag}"
        ) from error
    # Connections inherit these. A peer that vanished without a word is noticed within a minute, and its slot freed.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENT_S),
        ("TCP_KEEPINTVL", PROBES_S),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
    ):
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def address_of(sock: socket.socket, host: str) -> str:
    """host:port; the port is the real one."""
    return join_address(host, sock.getsockname()[1])


def check_port_is_free(config: ServerConfig) -> None:
    """Raises RefusedError; gRPC's own refusal names no cause and logs in its core."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RefusedError(
                f"port {config.port} on {config.host} is in use; stop what listens there, or choose another --port"
            ) from error
        raise RefusedError(f"cannot listen on {config.address}: {error.strerror or error}") from error
