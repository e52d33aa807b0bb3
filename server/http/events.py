"""Server-sent events, as they are written."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"
WRITER = json.JSONEncoder(separators=(",", ":"))
"""ASCII: there are clients that break lines at U+2028."""


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Of a stream."""
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + WRITER.encode(data).encode() + b"\n\n"
