"""A server's process from its first signal handler to its exit status."""

import asyncio
import logging
import signal
from functools import partial

from ..engine_impl.hosts import Peers
from ..engine_impl.runtime import garbage
from .config import ServerConfig
from .lifecycle import Load, Serving
from .net.complaints import Complaints
from .observe.status import StatusLine
from .process import leave_at_once, say

log = logging.getLogger(__name__)

UNUSED = {
    signal.SIGUSR1: "serve with --profile to trace requests",
    signal.SIGUSR2: "means nothing here",
    signal.SIGHUP: "certificates and tokens are read again whenever their files change",
}
"""Signals that would end the process, and what is logged instead."""


async def serve(load: Load, config: ServerConfig, line: StatusLine | None = None, peers: Peers | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit status: 0, or 1 when the engine was given up; one that
    hangs ends the process."""
    serving = Serving(load, config, line, peers)
    is_ready = False

    def on_signal() -> None:
        if not is_ready:
            # Nothing is in flight, and a compilation cannot be interrupted.
            log.info("stopped before the server was ready")
            leave_at_once(0)
        if serving.stop_requested.is_set():
            serving.force_requested.set()
        serving.stop_requested.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    for number, why in UNUSED.items():
        loop.add_signal_handler(number, partial(log.info, "%s: %s", number.name, why))
    if serving.profile is not None:
        loop.add_signal_handler(signal.SIGUSR1, serving.profile.start)
    loop.set_exception_handler(Complaints().tell)
    async with serving:
        is_ready = True
        garbage.as_usual()
        say(f"SERVING on {serving.address}")
        await serving.stop_requested.wait()
    if serving.dead_reason is not None:
        log.error(serving.dead_reason)
        if serving.hangs:
            leave_at_once(1)
        return 1
    return 0
