"""A real server for clients that block."""

import asyncio
import threading
from contextlib import contextmanager

from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving


@contextmanager
def serving_in_thread(engine, *, max_queued=256):
    """host:port of a server that runs beside the test."""
    started, loops = threading.Event(), []

    async def serve():
        async with Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=1.0, max_queued=max_queued)) as serving:
            loops.append((asyncio.get_running_loop(), serving))
            started.set()
            await serving.stop_requested.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    loop, serving = loops[0]
    try:
        yield serving.address
    finally:
        loop.call_soon_threadsafe(serving.stop_requested.set)
        thread.join(10)
