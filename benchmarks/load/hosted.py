"""A real server in this process, in a thread with an event loop of its own, for benchmarks that look inside."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ...server.config import ServerConfig
from ...server.lifecycle import Serving

STOP_S = 60.0
"""How long the server may take to stop (seconds)."""


@contextmanager
def hosted(engine: Any, params: Any, config: ServerConfig) -> Iterator[Serving]:
    """Serving from the block's beginning to its end. Raises what the start raises."""
    started: Future[tuple[asyncio.AbstractEventLoop, Serving]] = Future()

    async def serve() -> None:
        try:
            async with Serving(lambda: (engine, params), config) as serving:
                started.set_result((asyncio.get_running_loop(), serving))
                await serving.stop_requested.wait()
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="hosted")
    thread.start()
    loop, serving = started.result()
    try:
        yield serving
    finally:
        loop.call_soon_threadsafe(serving.stop_requested.set)
        thread.join(STOP_S)


def metric(serving: Serving, name: str, **labels: str) -> float:
    """The value of `slipstream_<name>` now."""
    value = serving.metrics.registry.get_sample_value(f"slipstream_{name}", labels)
    assert value is not None, name
    return value
