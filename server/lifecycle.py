"""A server's life, one ordered block: listen (NOT_SERVING) -> load -> warm up -> SERVING -> drain -> stop.

The port comes first, so that a port in use is known before minutes of loading, and health checks have an answer.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..engine_impl.api import AnyEngine
from ..engine_impl.errors import RefusedError
from ..engine_impl.hosts import Peers
from ..engine_impl.runtime import allocator, timeline
from ..engine_impl.runtime.compilations import programs
from .adapters.store import AdapterStore
from .address import join_address
from .config import ServerConfig
from .errors import UnavailableError
from .gateway import Gateway
from .grpc import adapters
from .grpc.adapters import AdapterService
from .grpc.interceptors import interceptors
from .grpc.service import JETSTREAM_SERVICE, SERVICE, GrpcService, add_to
from .http.server import HttpServer
from .net import tls
from .net.complaints import Complaints
from .net.connections import most_connections
from .net.ports import FLUSH_S, check_port_is_free, free_path
from .net.security import Guard, warn_if_open
from .observe.endpoint import Endpoint
from .observe.metrics import Metrics
from .observe.profile import Profile
from .observe.status import Status, StatusLine
from .observe.traces import Traces
from .request.chat import dialect_of
from .scheduler.orchestrator import Orchestrator

log = logging.getLogger(__name__)

Load = Callable[[], tuple[AnyEngine, Any]]
"""Builds the engine and its params; may take minutes."""

UNUSED = {
    signal.SIGUSR1: "serve with --profile to trace requests",
    signal.SIGUSR2: "means nothing here",
    signal.SIGHUP: "certificates and tokens are read again whenever their files change",
}
"""Signals that would end the process, and what is logged instead."""

SWITCH_S = 0.0005
"""After how long a thread that computes in Python lets another one on (seconds): a tenth of Python's usual. A step of
the engine needs the interpreter several times, and may wait so long each time while others are being answered."""

KEEPALIVE_S = 20.0
"""How long a connection may be silent before it is pinged (seconds); half of it later it counts as cut."""

HANDSHAKE_S, IDLE_S = 10.0, 300.0
"""How long a gRPC connection may take to begin, and be without a call (seconds); clients begin the next call on a new
one."""


MEMORY_S = 10.0
"""How often an idle server returns memory to the system (seconds)."""


class Serving:
    """`async with Serving(load, config) as serving:` serves inside the block and drains on leaving it."""

    def __init__(
        self, load: Load, config: ServerConfig, line: StatusLine | None = None, peers: Peers | None = None
    ) -> None:
        """`load` returns (engine, params); it is called in a thread of its own. `peers`: the other hosts of the engine.

        Raises RefusedError for a token file or certificates that cannot be used.
        """
        self.stop_requested = asyncio.Event()
        """Set by whoever wants the server to stop: a signal, a dead engine."""
        self.force_requested = asyncio.Event()
        """Set to end the drain at once."""
        self.dead_reason: str | None = None
        """Why the engine was given up."""
        self.is_ready = False
        """Whether health checks are answered with SERVING."""
        self._has_begun = False  # requests may be there, whatever health checks say now
        self.orchestrator: Orchestrator[Any, Any, Any] | None = None
        self.metrics = Metrics()
        self.address = config.address
        """host:port; the port is the real one after entering."""
        self.endpoint: Endpoint | None = None
        """/metrics, if there is one."""
        self.profile: Profile | None = None
        """--profile, if it is asked for."""
        self._load, self._config, self._line, self._peers = load, config, line, peers
        if config.watch.profile is not None:
            self.profile = Profile(config.watch.profile, config.watch.profile_s)
        self._traces = None if config.watch.otlp_endpoint is None else Traces(config.watch.otlp_endpoint)
        self.adapters = AdapterStore(config.lora.adapter_dir, config.lora.max_host_adapters)
        on_call = (lambda: None) if self.profile is None else self.profile.on_call
        self._gateway = Gateway(on_call, self._traces, self.adapters)
        guard = Guard(config.security, is_local=config.is_local)
        self._grpc = GrpcService(self._gateway, guard, config.chat)
        self._adapter_calls = AdapterService(self._gateway, guard)
        self._http = HttpServer(self._gateway, guard, config, lambda: self.is_ready) if config.has_http else None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._watchers: list[asyncio.Task[None]] = []
        self._credentials = tls.credentials(config.security)
        self._server = grpc.aio.server(
            interceptors=interceptors(guard),
            options=[
                # Without it a second server on the same port starts, and the kernel deals connections to both.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.security.max_message_bytes),
                # A peer that vanished without a word is noticed, and its slot freed.
                ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
                ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_S * 500)),
                # Connections that ask for nothing take no file descriptor that the other door needs.
                ("grpc.max_allowed_incoming_connections", most_connections()),
                ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1000)),
                ("grpc.max_connection_idle_ms", round(IDLE_S * 1000)),
            ],
        )

    @property
    def http_address(self) -> str | None:
        """host:port of OpenAI's endpoints, after entering; None when they are not served."""
        return None if self._http is None else self._http.address

    async def __aenter__(self) -> Self:
        await self._listen()
        if self._peers is not None:
            soon = asyncio.get_running_loop().call_soon_threadsafe
            self._peers.watch(partial(soon, self._on_lost), partial(soon, self._on_leaving))
        try:
            await self._load_and_warm_up()
            self._has_begun = True
            await self._set_ready(True)
            self._start_watchers()
        except BaseException:
            await self._stop_watchers()
            await self._close_orchestrator()
            await self._close_ports(0)
            raise
        return self

    async def __aexit__(self, *exc_info) -> None:
        log.info("stopping: NOT_SERVING, new requests are refused")
        await self._stop_watchers()
        self.is_ready = False
        self.metrics.serving(False)
        await self._health.enter_graceful_shutdown()
        self._gateway.close("the server is stopping")
        await self._drain()
        await self._close_orchestrator()
        if self._peers is not None and self.dead_reason is None:
            await asyncio.to_thread(self._peers.stop)
        if self.profile is not None:
            await self.profile.close()
        await self._close_ports(FLUSH_S)
        log.info("stopped")

    async def _listen(self) -> None:
        await self._set_ready(False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_to(self._server, self._grpc)
        adapters.add_to(self._server, self._adapter_calls)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        check_port_is_free(self._config)
        try:
            await self._open_ports()
        except BaseException:
            await self._close_ports(0)
            raise
        warn_if_open(self._config)

    async def _open_ports(self) -> None:
        if self._config.watch.metrics_port is not None:
            self.endpoint = Endpoint(
                self._config.host, self._config.watch.metrics_port, self.metrics.registry, lambda: self.is_ready
            )
            log.info("metrics on http://%s/metrics", self.endpoint.address)
        if self._http is not None:
            await self._http.open()
            log.info("OpenAI's endpoints on %s/v1", self._http.url)
        self.address = join_address(self._config.host, self._add_port(self._config.address))
        for address in self._config.more_grpc:
            if address.path:
                free_path(address.path, "--listen")
            port = self._add_port(str(address))
            log.info("gRPC on %s, too", address if address.path else join_address(address.host, port))
        await self._server.start()

    def _add_port(self, address: str) -> int:
        """Raises RefusedError."""
        try:
            if self._credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise RefusedError(f"cannot listen on {address}: {error}") from error

    async def _close_orchestrator(self) -> None:
        """If it has come so far."""
        if self.orchestrator is not None:
            await asyncio.to_thread(self.orchestrator.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def _close_ports(self, flush_s: float) -> None:
        closing = [self._server.stop(flush_s)]
        if self._http is not None:
            closing.append(self._http.close())
        await asyncio.gather(*closing)
        if self.endpoint is not None:
            await asyncio.to_thread(self.endpoint.close)

    async def _load_and_warm_up(self) -> None:
        start = time.monotonic()
        engine, params = await in_thread(self._load)
        log.info("loaded %s in %.1f s; compiling", engine.model_name, time.monotonic() - start)
        await in_thread(lambda: dialect_of(engine.get_tokenizer().template_facts, self._config.chat))  # may be refused
        self.adapters.open(engine.read_adapter, (*self._config.served_model_name, engine.model_name))
        for name, path in self._config.lora.named.items():
            await self.adapters.load(name, path)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self.orchestrator = Orchestrator(
            engine,
            params,
            max_queued=self._config.max_queued,
            max_queued_tokens=self._config.max_queued_tokens,
            prefix_cache=self._config.prefix_cache,
            step_timeout_s=self._config.step_timeout_s,
            metrics=self.metrics,
            on_ready=partial(loop.call_soon_threadsafe, ready.set),
            on_dead=partial(loop.call_soon_threadsafe, self._on_dead),
        )
        self.orchestrator.start()
        await first_of(ready, self.stop_requested)
        if self.dead_reason is not None:
            raise UnavailableError(self.dead_reason)
        self.metrics.watch_devices(list(engine.devices), lambda: programs().made)
        if self._traces is not None:
            self._traces.start(engine.model_name)
        self._gateway.open(engine, self.orchestrator)
        startup = timeline.THIS_PROCESS.startup()
        self.metrics.started(startup.stages)
        log.info(
            "ready after %.1f s: compiled %d programs, %d from the cache",
            startup.seconds,
            startup.programs.compiled,
            startup.programs.found,
            extra={"fields": startup.as_json()},
        )

    @property
    def hangs(self) -> bool:
        """Whether the end of the process would wait for a device, or for hosts that are gone."""
        orchestrator_hangs = self.orchestrator is not None and self.orchestrator.hangs
        return orchestrator_hangs or (self._peers is not None and self.dead_reason is not None)

    def _on_lost(self, reason: str) -> None:
        """One of the other hosts. Nothing that is started on the devices would end; requests do, during a drain too."""
        if self.orchestrator is not None and self._has_begun:
            self.orchestrator.give_up(reason)
        else:
            log.error("the group is given up: %s", reason)
            leave_at_once(1)

    def _on_leaving(self, reason: str) -> None:
        log.info("draining: %s", reason)
        self.stop_requested.set()

    def _on_dead(self, reason: str) -> None:
        self.dead_reason = reason
        self._gateway.close(reason)
        self.stop_requested.set()

    def _start_watchers(self) -> None:
        if self.profile is not None:
            self.profile.arm()
        self._watchers.append(asyncio.create_task(self._give_back()))
        if self._config.probe_interval_s:
            self._watchers.append(asyncio.create_task(self._probe()))
        if self._line is not None and self._line.is_shown:
            self._watchers.append(asyncio.create_task(Status(self.metrics).run(self._line)))

    async def _stop_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def _give_back(self) -> None:
        """What requests have left behind, while there are none."""
        while True:
            await asyncio.sleep(MEMORY_S)
            if not self._gateway.calls:
                await asyncio.to_thread(allocator.give_back)

    async def _probe(self) -> None:
        """Ready as long as the device answers."""
        assert self.orchestrator is not None
        while True:
            await asyncio.sleep(self._config.probe_interval_s)
            try:
                await asyncio.to_thread(self.orchestrator.probe, self._config.probe_timeout_s)
            except UnavailableError as error:
                if self.is_ready:
                    log.error("NOT_SERVING: %s", error)
                    await self._set_ready(False)
            else:
                if not self.is_ready:
                    log.info("SERVING: the engine answers again")
                    await self._set_ready(True)

    async def _drain(self) -> None:
        """Until the calls in flight are answered, the grace is over or somebody forces."""
        deadline = time.monotonic() + self._config.grace_s
        while self._gateway.calls and time.monotonic() < deadline and not self.force_requested.is_set():
            await asyncio.sleep(0.01)
        if self._gateway.calls:
            log.warning("cancelling %d requests that are not finished", self._gateway.calls)

    async def _set_ready(self, is_ready: bool) -> None:
        self.is_ready = is_ready
        self.metrics.serving(is_ready)
        status = health_pb2.HealthCheckResponse
        for service in ("", SERVICE, JETSTREAM_SERVICE):
            await self._health.set(service, status.SERVING if is_ready else status.NOT_SERVING)


async def serve(load: Load, config: ServerConfig, line: StatusLine | None = None, peers: Peers | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit status: 0, or 1 when the engine was given up; one that
    hangs ends the process."""
    sys.setswitchinterval(SWITCH_S)
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
        gc.freeze()  # what is there stays: a request of many small objects must not have all of it looked through
        say(f"SERVING on {serving.address}")
        await serving.stop_requested.wait()
    if serving.dead_reason is not None:
        log.error(serving.dead_reason)
        if serving.hangs:
            leave_at_once(1)
        return 1
    return 0


def leave_at_once(status: int) -> None:
    """Ends the process: what still runs, on whatever device, is not waited for."""
    logging.shutdown()
    os._exit(status)


def say(text: str) -> None:
    """A line on stdout, if anybody reads it: in one piece, as the log may go to the same place."""
    try:
        print(f"{text}\n", end="", flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or Python complains again at its end


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
