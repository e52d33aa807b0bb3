"""Which pages may use the server from a browser: by default those that come from the server's own address.

A browser lets any page send requests to any address, also to a server that only this machine reaches. It says where the
page came from (`Origin`), and it asks before it sends JSON (a preflight), which other servers answer for their pages.

That `Origin` names the address that was asked (`Host`) proves nothing where that is a domain's name: whoever owns the
domain can let it mean this machine once his page is there (DNS rebinding). So the name must be one of ours.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web

from .errors import HttpError

ORIGIN = "origin"
ASKED = "access-control-request-headers"
HEADERS = ("authorization", "content-type", "x-request-id")
NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
"""Of a header."""
MAX_AGE_S = 600
"""How long a browser remembers that it may (seconds)."""


LOCALHOST = "localhost"


class Origins:
    """Those that may."""

    def __init__(self, allowed: Sequence[str], hosts: Sequence[str] = ()) -> None:
        """`allowed` beside the server's own: SCHEME://HOST[:PORT]. `hosts`: names that it was told to listen on."""
        self._allowed = frozenset(origin.lower() for origin in allowed)
        self._hosts = frozenset(name.lower() for name in (*hosts, LOCALHOST, socket.gethostname()))

    def check(self, request: web.BaseRequest) -> None:
        """Raises HttpError for a page that may not."""
        origin = request.headers.get(ORIGIN)
        if origin is None or self.is_named(origin) or self._is_own(origin, request.host):
            return
        raise HttpError(
            403,
            f"pages of {origin[:80]!r} may not use this server; serve with --allow-origin to let them",
            code="origin",
        )

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page came from the address that it asks, and that can be nobody else's."""
        try:
            asked = urlsplit(origin)
            return asked.netloc.lower() == host.lower() and (asked.hostname in self._hosts or is_ip(asked.hostname))
        except ValueError:  # no URL
            return False

    def is_named(self, origin: str) -> bool:
        return origin.lower() in self._allowed

    def is_preflight(self, request: web.BaseRequest) -> bool:
        """Whether a browser asks for a page that was named."""
        return request.method == "OPTIONS" and self.is_named(request.headers.get(ORIGIN, ""))

    def _asked(self, request: web.BaseRequest) -> str:
        """The headers that a browser asks for: clients in JavaScript send many of their own, which nobody reads."""
        names = [name.strip() for name in request.headers.get(ASKED, "").lower().split(",")]
        return ", ".join(dict.fromkeys([*HEADERS, *(name for name in names if NAME.fullmatch(name))]))

    def headers(self, request: web.BaseRequest) -> dict[str, str]:
        """Of an answer, for a page that was named."""
        origin = request.headers.get(ORIGIN, "")
        if not self.is_named(origin):
            return {}
        shown = {"access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": "*"}
        if request.method == "OPTIONS":
            shown["access-control-allow-methods"] = "GET, HEAD, POST, OPTIONS"
            shown["access-control-allow-headers"] = self._asked(request)
            shown["access-control-max-age"] = str(MAX_AGE_S)
        return shown


def is_ip(host: str | None) -> bool:
    """Whether it is an address as it stands, which nobody can give another meaning."""
    try:
        return bool(ipaddress.ip_address(host or ""))
    except ValueError:
        return False
