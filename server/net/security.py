"""Who may ask, by whichever protocol: bearer tokens, and how many answers one client may have under way."""

import hmac
import ipaddress
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from ...engine_impl.errors import RefusedError
from ..address import is_local
from ..config import SecurityConfig, ServerConfig
from ..errors import FIRST_RETRY_S, DeniedError, QueueFullError

log = logging.getLogger(__name__)

OTHERS = 0o007
"""The part of a file's mode that is everybody's."""

AUTHORIZATION, BEARER = "authorization", "bearer"
FORWARDED = "x-forwarded-for"
"""Metadata or header in which proxies tell whom they ask for."""
UNKNOWN = "send `authorization: Bearer TOKEN` with a known token"
"""Told to a client that brings none."""


class WatchedFiles:
    """Files that are read again when one of them has changed. A stat() each costs microseconds."""

    def __init__(self, *paths: Path | None) -> None:
        self._paths = [path for path in paths if path is not None]
        self._seen = self._stamps()

    def have_changed(self) -> bool:
        """Since the last time that this was asked."""
        before, self._seen = self._seen, self._stamps()
        return self._seen != before

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [stamp(path) for path in self._paths]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None while it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


class Tokens:
    """The tokens of a file, one a line."""

    def __init__(self, path: Path, flag: str = "auth_token_file") -> None:
        """Raises RefusedError, naming the flag, for a file that cannot be read or holds no token."""
        self._path, self._flag, self._file = path, flag, WatchedFiles(path)
        self._tokens = read_tokens(path, flag)

    def number_of(self, token: str) -> int | None:
        """Which of the tokens it is; None of none. Takes as long for a wrong one as for a right one."""
        if self._file.have_changed():
            self._read_again()
        sent = token.encode(errors="replace")
        matches = [hmac.compare_digest(sent, known) for known in self._tokens]
        return matches.index(True) if any(matches) else None

    def _read_again(self) -> None:
        """A damaged file must not lock everybody out, nor let everybody in: then the old tokens stay."""
        try:
            self._tokens = read_tokens(self._path, self._flag)
        except RefusedError as error:
            log.error("the old tokens stay: %s", error)
        else:
            log.info("read %d tokens from %s", len(self._tokens), self._path)


def read_tokens(path: Path, flag: str = "auth_token_file") -> list[bytes]:
    """Blank lines and blanks around a token are left out. Raises RefusedError; warns of a file that others may read."""
    tokens = [line.strip() for line in read_bytes(flag, path).splitlines() if line.strip()]
    if not tokens:
        raise RefusedError(f"{flag}={path} holds no token; write one a line")
    if not all(token.isascii() and token.decode().isprintable() for token in tokens):
        raise RefusedError(f"{flag}={path} must hold printable ASCII: gRPC carries nothing else")
    if (mode := path.stat().st_mode & 0o777) & OTHERS:
        log.warning("%s=%s has the mode %03o: others on this machine may read it; chmod 600 it", flag, path, mode)
    return tokens


def read_bytes(name: str, path: Path) -> bytes:
    """Raises RefusedError naming the flag."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{name}={path} cannot be read: {error.strerror}") from error


class Streams:
    """How many answers each client has under way. All in one event loop's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def hold(self, client: str, count: int = 1) -> Iterator[None]:
        """Raises QueueFullError beyond the limit, RefusedError for more than it at once."""
        if count > self._limit:
            raise RefusedError(
                f"{count} prompts at once exceed max_streams_per_client={self._limit}; send fewer in one request"
            )
        if self._under_way[client] + count > self._limit:
            raise QueueFullError(
                f"{self._under_way[client]} answers are under way for this client and "
                f"max_streams_per_client={self._limit}; wait for one to end",
                retry_after_s=FIRST_RETRY_S,
            )
        self._under_way[client] += count
        try:
            yield
        finally:
            self._under_way[client] -= count
            if not self._under_way[client]:
                del self._under_way[client]


class Guard:
    """Whom a server lets in, by whichever protocol, and how much it lets one client have under way."""

    def __init__(self, config: SecurityConfig, *, is_local: bool = False) -> None:
        """`is_local`: only this machine can ask. Raises RefusedError for a token file that cannot be used."""
        self.tokens = None if config.auth_token_file is None else Tokens(config.auth_token_file)
        self._managers = None
        if config.admin_token_file is not None:
            self._managers = Tokens(config.admin_token_file, "admin_token_file")
        self._is_local, self._behind_proxy = is_local, config.behind_proxy
        self.streams = None if config.max_streams_per_client is None else Streams(config.max_streams_per_client)
        self._isolates_prefixes = config.isolate_prefixes

    def is_known(self, authorizations: Iterable[str]) -> bool:
        """Whether they may ask. `authorizations`: what came as `authorization`, in metadata or headers."""
        brought = list(authorizations)
        return self.tokens is None or any(
            tokens is not None and token_number(tokens, brought) is not None for tokens in (self.tokens, self._managers)
        )

    def check_manager(self, authorizations: Iterable[str]) -> None:
        """Raises DeniedError for who may not load and unload adapters: that takes a token of --admin-token-file. Where
        there is none, this machine may."""
        if self._managers is None and not self._is_local:
            raise DeniedError("adapters are loaded and unloaded from this machine alone; serve with --admin-token-file")
        if self._managers is not None and token_number(self._managers, authorizations) is None:
            raise DeniedError(
                "adapters are loaded and unloaded with a token of --admin-token-file; send one as a bearer"
            )

    def prefix_owner(self, authorizations: Iterable[str]) -> str | None:
        """The token whose cached prefixes a call finds and adds to; None: those of everybody."""
        return bearer(authorizations) if self.tokens is not None and self._isolates_prefixes else None

    def hold(self, authorizations: Iterable[str], address: str, count: int = 1) -> AbstractContextManager[None]:
        """The client has `count` answers more under way. `address`: its IP. Raises as Streams.hold() does."""
        if self.streams is None:
            return nullcontext()
        return self.streams.hold(self.client(authorizations, address), count)

    def address(self, peer: str, forwarded: str | None) -> str:
        """The client's. `peer`: who is connected (an IP; empty for a Unix socket); `forwarded`: its x-forwarded-for."""
        if not (self._behind_proxy and forwarded and (not peer or is_local(plain_ip(peer)))):
            return peer
        return forwarded.rpartition(",")[2].strip()

    def client(self, authorizations: Iterable[str], address: str) -> str:
        """A name for who asks: which token, or without tokens which network address."""
        if self.tokens is not None:
            return f"token {token_number(self.tokens, authorizations)}"
        return plain_ip(address)


def token_number(tokens: Tokens, authorizations: Iterable[str]) -> int | None:
    """Which token was brought; None of none that is known."""
    token = bearer(authorizations)
    return None if token is None else tokens.number_of(token)


def bearer(authorizations: Iterable[str]) -> str | None:
    """The token that was brought, known or not."""
    for value in authorizations:
        scheme, _, token = value.partition(" ")
        if scheme.lower() == BEARER:
            return token.strip()
    return None


def plain_ip(address: str) -> str:
    """One spelling for each; an IPv4 address that came through an IPv6 socket is itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # no IP: a Unix socket's
        return address
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def warn_if_open(config: ServerConfig) -> None:
    """Logs what a server that other machines reach lacks."""
    if config.is_local:
        return
    security = config.security
    if security.auth_token_file is None and security.tls_client_ca is None:
        log.warning("%s: whoever reaches this port may ask; see --auth-token-file and --tls-client-ca", config.address)
    if security.tls_cert is None and not config.listens_locally:
        log.warning("%s: requests and answers travel unencrypted; see --tls-cert", config.address)
