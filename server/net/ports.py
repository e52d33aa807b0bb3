"""Ports: whether one is free, and listening on one for HTTP."""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from ssl import SSLContext

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from ...engine_impl.errors import RefusedError
from ..address import UNIX, Address, join_address
from ..config import SecurityConfig, ServerConfig
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
TRIES = 8
"""For a port that is free for all addresses of a host (count)."""
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Of an address that the host's name has and the machine lacks, such as ::1."""
UNACKNOWLEDGED_MS = 60_000
"""What was sent and is not acknowledged for so long: the peer has vanished, or has stopped reading."""


class Listener:
    """An aiohttp application on one or more sockets. Belongs to one event loop."""

    def __init__(
        self,
        app: web.Application,
        socks: Sequence[socket.socket],
        refuse: Refuse,
        security: SecurityConfig | None = None,
    ) -> None:
        """`refuse` makes the answer to a request whose head cannot be read. `security`: whose certificates; default:
        in the clear. Raises RefusedError for certificates that cannot be used."""
        self._socks = socks
        self._tls = None if security is None else tls.context(security)
        self._renewal = None if security is None or self._tls is None else tls.Renewal(security)
        self._sites: list[web.SockSite] = []
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
        for sock in self._socks:
            if sock.family == socket.AF_UNIX:
                with suppress(OSError):  # somebody was quicker
                    os.unlink(sock.getsockname())
            sock.close()

    async def _accept(self, context: SSLContext | None) -> None:
        """New connections get this context; those that are there keep theirs."""
        before, self._sites = self._sites, []
        for sock in self._socks:
            site = web.SockSite(self._runner, sock.dup(), ssl_context=context, backlog=AT_ONCE)
            await site.start()
            sock.listen(BACKLOG)
            self._sites.append(site)
        for site in before:
            await site.stop()

    async def _renew(self, renewal: tls.Renewal) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            if (context := renewal.renewed()) is not None:
                await self._accept(context)


def listening(host: str, port: int, *, what: str, flag: str) -> list[socket.socket]:
    """A socket for each of the host's addresses that there is here, which other machines can connect to already; all
    have one port. Raises RefusedError, which names `what` and the flag."""
    for tries_left in range(TRIES, -1, -1):
        socks: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))
            for family, ip in addresses:
                try:
                    socks.append(_created(family, (ip, socks[0].getsockname()[1] if socks else port), host == "::"))
                except OSError as error:
                    if error.errno not in NOT_HERE or (not socks and (family, ip) == addresses[-1]):
                        raise
            return socks
        except OSError as error:
            for sock in socks:
                sock.close()
            if error.errno == errno.EADDRINUSE and not port and tries_left:
                continue  # free for one address and not for another
            raise RefusedError(
                f"cannot serve {what} on {join_address(host, port)}: {error.strerror or error}; choose another {flag}"
            ) from error
    raise AssertionError("the last try returns or raises")


def _created(family: socket.AddressFamily, at: tuple[str, int], is_any: bool) -> socket.socket:
    """`is_any`: with IPv4 beside IPv6, as gRPC takes it."""
    sock = socket.create_server(at, family=family, backlog=BACKLOG, dualstack_ipv6=is_any)
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


def listening_at(address: Address, *, what: str, flag: str) -> list[socket.socket]:
    """`listening` for one more address. Raises RefusedError likewise."""
    if not address.path:
        return listening(address.host, address.port, what=what, flag=flag)
    free_path(address.path, flag)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(address.path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise RefusedError(f"cannot serve {what} on {address}: {error.strerror}; choose another {flag}") from error
    return [sock]


def free_path(path: str, flag: str) -> None:
    """Removes the socket that a server left there which is gone. Raises RefusedError for a path that is in use."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise RefusedError(f"{flag}: {path!r} is there and no socket; choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except OSError as error:
        raise RefusedError(f"{flag}: {path!r} cannot be used: {error.strerror}; choose another path") from error
    raise RefusedError(f"{flag}: another server listens on {path!r}; stop it, or choose another path")


def address_of(sock: socket.socket, host: str) -> str:
    """host:port; the port is the real one. Of a Unix domain socket unix:PATH."""
    name = sock.getsockname()
    return f"{UNIX}{name}" if sock.family == socket.AF_UNIX else join_address(host, name[1])


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
