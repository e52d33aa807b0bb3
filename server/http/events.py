"""Server-sent events, as they are written."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """ASCII: there are clients that break lines at U+2028."""
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
