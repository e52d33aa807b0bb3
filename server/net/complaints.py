"""What an event loop has to complain of, told at a pace that a log can bear."""

import asyncio
import errno
import logging
import time
from typing import Any

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""How often the same complaint is told (seconds)."""
FULL = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM


class Complaints:
    """One event loop's."""

    def __init__(self) -> None:
        self._full_at = -EVERY_S

    def tell(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception handler for the loop."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in FULL):
            loop.default_exception_handler(context)
            return
        if (now := time.monotonic()) - self._full_at >= EVERY_S:
            self._full_at = now
            log.error(
                "connections wait: %s; raise `ulimit -n`, or let clients close what they do not use",
                error.strerror,
            )
