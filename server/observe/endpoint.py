"""HTTP for those who watch the server: /metrics for Prometheus, /healthz and /readyz for whoever knows no gRPC.

It has a thread and an event loop of its own: the server's loop may be busy for a while, a scrape of thousands of lines
must not hold up an answer, and a probe must not wait for either. What is left in common is the interpreter's lock.
"""

import asyncio
import threading
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, disable_created_metrics, generate_latest

from ..net.ports import Listener, address_of, listening


class Endpoint:
    """Listens from the moment it is made; close() it. Any thread."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
        """`is_ready` decides /readyz. Raises RefusedError when the port cannot be had."""
        disable_created_metrics()  # a second series for each, with its time of birth
        socks = listening(host, port, what="metrics", flag="--metrics-port")
        self.address = address_of(socks[0], host)
        """host:port; the port is the real one."""
        self._listener = Listener(application(registry, is_ready), socks, refuse)
        self._loop, self._closing = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        await self._listener.start()
        await self._closing.wait()
        await self._listener.close()


def refuse(status: int, message: str) -> web.Response:
    """What cannot be read."""
    return web.Response(status=status, text=f"{message}\n", headers={"server": "slipstream"})


def application(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> web.Application:
    """What is behind the port."""

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(request: web.Request) -> web.Response:
        return web.Response(text="ready\n") if is_ready() else web.Response(status=503, text="not ready\n")

    async def others(request: web.Request) -> web.Response:
        return web.Response(status=404, text="there are /metrics, /healthz and /readyz\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    app.router.add_route("*", "/{path:.*}", others)
    return app
