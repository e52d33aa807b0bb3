"""A page to try the server: one file, which loads nothing from elsewhere and talks to this server alone."""

import base64
import hashlib
import re
from importlib import resources

from aiohttp import web


class Page:
    """The file, and what a browser may do with it."""

    def __init__(self) -> None:
        self._text = resources.files(__name__).joinpath("index.html").read_text(encoding="utf-8")
        inline = {
            kind: " ".join(hash_of(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", self._text, re.S))
            for kind, tag in (("script-src", "script"), ("style-src", "style"))
        }
        allowed = {
            "default-src": "'none'",
            **inline,
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        self._headers = {
            "content-security-policy": "; ".join(f"{kind} {sources}" for kind, sources in allowed.items()),
            "cache-control": "no-cache",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    async def get(self, request: web.Request) -> web.Response:
        return web.Response(text=self._text, content_type="text/html", headers=self._headers)


def hash_of(text: str) -> str:
    """As a content security policy names what stands in a page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
