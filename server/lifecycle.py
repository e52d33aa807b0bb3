"""A server's life, one ordered block: listen (NOT_SERVING) -> load -> warm up -> SERVING -> drain -> stop.

The port comes first, so that a port in use is known before minutes of loading, and health checks have an answer.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..engine_impl.errors import RefusedError
from .config import ServerConfig, join_address
from .errors import UnavailableError
from .front import JETSTREAM_SERVICE, SERVICE, Front, add_to
from .orchestrator import Orchestrator

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine

Load = Callable[[], tuple["Engine", Any]]
"""Builds the engine and its params; may take minutes."""

FLUSH_S = 1.0
"""Time that the last replies get to leave (seconds)."""


class Serving:
    """`async with Serving(load, config) as serving:` serves inside the block and drains on leaving it."""

    def __init__(self, load: Load, config: ServerConfig) -> None:
        """`load` returns (engine, params); it is called in a thread of its own."""
        self.stop_requested = asyncio.Event()
        """Set by whoever wants the server to stop: a signal, a dead engine."""
        self.force_requested = asyncio.Event()
        """Set to end the drain at once."""
        self.dead_reason: str | None = None
        """Why the engine was given up."""
        self.orchestrator: Orchestrator | None = None
        self.address = config.address
        """host:port; the port is the real one after entering."""
        self._load, self._config = load, config
        self._front = Front()
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        # Without so_reuseport=0 a second server on the same port starts, and the kernel deals connections to both.
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    async def __aenter__(self) -> "Serving":
        await self._listen()
        try:
            await self._load_and_warm_up()
        except BaseException:
            await self._server.stop(None)
            raise
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return self

    async def __aexit__(self, *exc_info) -> None:
        log.info("stopping: NOT_SERVING, new requests are refused")
        await self._health.enter_graceful_shutdown()
        self._front.close("the server is stopping")
        await self._drain()
        assert self.orchestrator is not None
        await asyncio.to_thread(self.orchestrator.close)
        await self._server.stop(FLUSH_S)
        log.info("stopped")

    async def _listen(self) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_to(self._server, self._front)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        check_port_is_free(self._config)
        try:
            port = self._server.add_insecure_port(self._config.address)
        except RuntimeError as error:  # taken in the meantime
            raise RefusedError(f"cannot listen on {self._config.address}: {error}") from error
        self.address = join_address(self._config.host, port)
        await self._server.start()

    async def _load_and_warm_up(self) -> None:
        start = time.monotonic()
        engine, params = await in_thread(self._load)
        log.info("loaded %s in %.1f s; compiling", engine.model_name, time.monotonic() - start)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self.orchestrator = Orchestrator(
            engine,
            params,
            max_queued=self._config.max_queued,
            on_ready=partial(loop.call_soon_threadsafe, ready.set),
            on_dead=partial(loop.call_soon_threadsafe, self._on_dead),
        )
        self.orchestrator.start()
        await first_of(ready, self.stop_requested)
        if self.dead_reason is not None:
            raise UnavailableError(self.dead_reason)
        self._front.open(engine, self.orchestrator)
        log.info("ready after %.1f s", time.monotonic() - start)

    def _on_dead(self, reason: str) -> None:
        self.dead_reason = reason
        self._front.close(reason)
        self.stop_requested.set()

    async def _drain(self) -> None:
        """Until the calls in flight are answered, the grace is over or somebody forces."""
        deadline = time.monotonic() + self._config.grace_s
        while self._front.calls and time.monotonic() < deadline and not self.force_requested.is_set():
            await asyncio.sleep(0.01)
        if self._front.calls:
            log.warning("cancelling %d requests that are not finished", self._front.calls)

    async def _set_health(self, status) -> None:
        for service in ("", SERVICE, JETSTREAM_SERVICE):
            await self._health.set(service, status)


async def serve(load: Load, config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit status: 0, or 1 when the engine was given up."""
    serving = Serving(load, config)
    is_ready = False

    def on_signal() -> None:
        if not is_ready:
            # Nothing is in flight, and a compilation cannot be interrupted.
            log.info("stopped before the server was ready")
            os._exit(0)
        if serving.stop_requested.is_set():
            serving.force_requested.set()
        serving.stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    async with serving:
        is_ready = True
        print(f"SERVING on {serving.address}", flush=True)
        await serving.stop_requested.wait()
    if serving.dead_reason is not None:
        log.error(serving.dead_reason)
        return 1
    return 0


async def first_of(*events: asyncio.Event) -> None:
    """Waits until one of them is set."""
    waiters = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()


async def in_thread(function: Callable[[], Any]) -> Any:
    """Its result. A daemon thread, unlike asyncio's: a signal may end the process while it still works."""
    future, loop = asyncio.get_running_loop().create_future(), asyncio.get_running_loop()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def work() -> None:
        try:
            outcome = (future.set_result, function())
        except BaseException as error:
            outcome = (future.set_exception, error)
        loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await future


def check_port_is_free(config: ServerConfig) -> None:
    """Raises RefusedError; gRPC's own refusal names no cause and logs in its core."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RefusedError(
                f"port {config.port} on {config.host} is in use; stop what listens there, or choose another --port"
            ) from error
        raise RefusedError(f"cannot listen on {config.address}: {error.strerror or error}") from error
