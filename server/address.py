"""Where a server listens beside its main ports: HOST:PORT, or a Unix domain socket."""

import re
from dataclasses import dataclass

from ..engine_impl.errors import RefusedError

MAX_PORT = 65535
LOOPBACK = ("localhost", "::1")
MAX_PATH = 107
"""Of a Unix domain socket, on Linux (bytes)."""
UNIX = "unix:"


@dataclass(frozen=True)
class Address:
    """Of one of the two kinds."""

    host: str = ""
    port: int = 0
    path: str = ""
    """Of a Unix domain socket; else empty."""

    @classmethod
    def parse(cls, flag: str, text: str) -> "Address":
        """Raises RefusedError, which names the flag."""
        if text.startswith(UNIX):
            path = text.removeprefix(UNIX)
            if not 0 < len(path.encode()) <= MAX_PATH:
                raise RefusedError(f"{flag}={text!r}: the socket's path must have from 1 to {MAX_PATH} bytes")
            return cls(path=path)
        match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", text)
        if match is None:
            raise RefusedError(f"{flag}={text!r} must be HOST:PORT, [IPV6]:PORT or unix:PATH")
        check_port(flag, int(match[3]))
        return cls(match[1] or match[2], int(match[3]))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.path) or is_local(self.host)

    def __str__(self) -> str:
        """As gRPC reads it."""
        return f"{UNIX}{self.path}" if self.path else join_address(self.host, self.port)


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in LOOPBACK or host.startswith("127.")


def check_port(name: str, port: int) -> None:
    """Raises RefusedError."""
    if not 0 <= port <= MAX_PORT:
        raise RefusedError(f"{name}={port} must be from 0 (any free one) to {MAX_PORT}")


def join_address(host: str, port: int) -> str:
    """host:port as gRPC reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
