"""Which pages may use the server from a browser: by default those that come from the server's own address.

A browser lets any page send requests to any address, also to a server that only this machine reaches. It says where the
page came from (`Origin`), and it asks before it sends JSON (a preflight), which other servers answer for their pages.
"""

import re
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


class Origins:
    """Those that may."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """`allowed` beside the server's own: SCHEME://HOST[:PORT]."""
        self._allowed = frozenset(origin.lower() for origin in allowed)

    def check(self, request: web.BaseRequest) -> None:
        """Raises HttpError for a page that may not."""
        origin = request.headers.get(ORIGIN)
        if origin is None or self.is_named(origin) or urlsplit(origin).netloc.lower() == request.host.lower():
            return
        raise HttpError(
            403,
            f"pages of {origin[:80]!r} may not use this server; serve with --allow-origin to let them",
            code="origin",
        )

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
