"""JetStream's own orchestrator on our engine: its Driver, its LLMOrchestrator, its gRPC server.

    load -> warm up -> listen -> SERVING -> drain -> stop

Ours are the engine below it, and around it what a server needs that JetStream's lacks: an address to listen on, TLS, a
bound on the queue, grpc.health.v1, a drain, an end that is not SIGKILL. What it cannot be given is refused.
"""

import asyncio
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import prometheus_client
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from ...engine_impl.jetstream import compat as jetstream_compat
from ...engine_impl.jetstream.engine import create_engine, engine_api
from ...engine_impl.loading import check_share, choose_devices
from ...engine_impl.runtime import timeline
from ..config import ServerConfig
from ..grpc.service import JETSTREAM_SERVICE
from ..net import security, tls
from ..net.ports import check_port_is_free
from ..observe.endpoint import Endpoint
from ..process import first_of, in_thread

with jetstream_compat.importing():
    from jetstream.core import config_lib, orchestrator, server_lib
    from jetstream.core.metrics.prometheus import JetstreamMetricsCollector

log = logging.getLogger(__name__)

MIN_WORKERS = 64
"""Threads of the gRPC server, as JetStream's own `run` takes them (threads)."""

CLOSE_S = 10.0
"""How long JetStream's threads may take to end (seconds)."""


def engines_config(config: EngineConfig, devices: Sequence[Any], prefill_devices: int | None) -> Any:
    """JetStream's own config of its engines: one on all devices, or one for prefill on the first `prefill_devices` and
    one for decode on the others.

    Raises RefusedError for a share that leaves one side without devices.
    """
    create = (partial(create_engine, config=config),)
    if prefill_devices is None:
        return config_lib.ServerConfig(
            interleaved_slices=(f"devices={len(devices)}",), interleaved_engine_create_fns=create
        )
    check_share(prefill_devices, len(devices))
    return config_lib.ServerConfig(
        prefill_slices=(f"devices={prefill_devices}",),
        generate_slices=(f"devices={len(devices) - prefill_devices}",),
        prefill_engine_create_fns=create,
        generate_engine_create_fns=create,
    )


class JetStreamHost:
    """start() it in a thread: it loads. Then drain() and close() it."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, on_dead: Callable[[str], object]) -> None:
        """`on_dead(reason)` is called from the thread of JetStream's that failed."""
        check_supported(server)
        check_port_is_free(server)
        security.warn_if_open(server)
        self._credentials = tls.credentials(server.security) or grpc.insecure_server_credentials()
        # JetStreamServer does not tell which port it got; so a free one is chosen before.
        self._config = replace(server, port=server.port or free_port(server.host))
        self._engine, self._on_dead = engine, on_dead
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._driver: Any = None
        self._server: Any = None
        self._is_ready = False
        self._endpoint: Endpoint | None = None
        if server.watch.metrics_port is not None:
            registry = prometheus_client.REGISTRY  # JetStream's own metrics, under their names
            self._endpoint = Endpoint(server.host, server.watch.metrics_port, registry, lambda: self._is_ready)
            log.info("metrics on http://%s/metrics", self._endpoint.address)

    @property
    def address(self) -> str:
        """host:port"""
        return self._config.address

    def start(self) -> None:
        """Load, compile, listen. May take minutes."""
        devices = choose_devices(self._engine.platform)
        config = engines_config(self._engine, devices, self._config.prefill_devices)
        self._driver = make_driver(config_lib.get_engines(config, devices), self._config, self._on_dead)
        host = self._config.address.rpartition(":")[0]
        workers = max(self._driver.get_total_concurrent_requests(), MIN_WORKERS)
        with jetstream_compat.listening_on(server_lib, host):
            self._server = server_lib.JetStreamServer(self._driver, workers, self._config.port, self._credentials)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server._grpc_server)
        names = (JETSTREAM_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server._grpc_server)
        self._server.start()
        for service in ("", JETSTREAM_SERVICE):
            self._on_loop(self._health.set(service, health_pb2.HealthCheckResponse.SERVING)).result()
        self._is_ready = True

    async def drain(self, force: asyncio.Event) -> None:
        """NOT_SERVING, no new requests; those in flight get the grace to finish, or until somebody forces."""
        self._is_ready = False
        await asyncio.wrap_future(self._on_loop(self._health.enter_graceful_shutdown()))
        stopping = asyncio.wrap_future(self._on_loop(self._server._grpc_server.stop(self._config.grace_s)))
        stopped = asyncio.Event()
        stopping.add_done_callback(lambda _: stopped.set())
        await first_of(stopped, force)
        if not stopped.is_set():
            await asyncio.wrap_future(self._on_loop(self._server._grpc_server.stop(None)))

    def close(self) -> bool:
        """Ends JetStream's threads; whether they did end. The calls are over by then."""
        thread = threading.Thread(target=self._server.stop, name="stop", daemon=True)
        thread.start()
        thread.join(CLOSE_S)
        if self._endpoint is not None:
            self._endpoint.close()
        return not thread.is_alive()

    def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Runs it on the loop of JetStream's server, which has a thread of its own."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._server._loop)


def make_driver(engines: Any, config: ServerConfig, on_dead: Callable[[str], object]) -> Any:
    """JetStream's Driver over these engines; its threads run."""
    prefill = engines.prefill_engines + engines.interleaved_engines
    generate = engines.generate_engines + engines.interleaved_engines
    with jetstream_compat.failures_to(orchestrator, on_dead):
        driver = orchestrator.Driver(
            prefill_engines=prefill,
            generate_engines=generate,
            prefill_params=[engine.load_params() for engine in prefill],
            generate_params=[engine.load_params() for engine in generate],
            interleaved_mode=bool(engines.interleaved_engines),
            jax_padding=False,
            metrics_collector=JetstreamMetricsCollector() if config.watch.metrics_port is not None else None,
        )
    for engine, free in zip(generate, driver._generate_slots, strict=True):
        engine.idle_slots = partial(waiting_in, free)
    # Its RESOURCE_EXHAUSTED comes from a full queue, and its queue has no bound: the branch would never be taken.
    driver._prefill_backlog.maxsize = config.max_queued
    return driver


def waiting_in(slots: queue.Queue[int]) -> list[int]:
    """What the queue holds, without taking it."""
    with slots.mutex:
        return list(slots.queue)


def check_supported(config: ServerConfig) -> None:
    """Raises RefusedError for JetStream's last source, and for a flag that JetStream's server has no place for: above
    all none that protects."""
    if jetstream_compat.is_last_source(engine_api):
        raise RefusedError(
            f"--orchestrator jetstream runs {jetstream_compat.PACKAGE} {jetstream_compat.RELEASE}; start the last "
            "source's own server, with slipstream.engine_impl.jetstream.create_engine in its ServerConfig"
        )
    plain = ServerConfig()
    asked = {
        "--http-port": config.http_port is not None,
        "--http-listen": bool(config.http_listen),
        "--listen": bool(config.listen),
        "--max-queued-tokens": config.max_queued_tokens != plain.max_queued_tokens,
        "--no-prefix-cache": not config.prefix_cache,
        "--served-model-name": bool(config.served_model_name),
        "--tool-format": config.chat.tool_format != plain.chat.tool_format,
        "--reasoning-format": config.chat.reasoning_format != plain.chat.reasoning_format,
        "--auth-token-file": config.security.auth_token_file is not None,
        "--admin-token-file": config.security.admin_token_file is not None,
        "--allow-origin": bool(config.security.allow_origin),
        "--no-isolate-prefixes": not config.security.isolate_prefixes,
        "--max-streams-per-client": config.security.max_streams_per_client is not None,
        "--max-message-bytes": config.security.max_message_bytes != plain.security.max_message_bytes,
        "--profile": config.watch.profile is not None,
        "--otlp-endpoint": config.watch.otlp_endpoint is not None,
    }
    if flags := [flag for flag, is_asked in asked.items() if is_asked]:
        raise RefusedError(f"{', '.join(flags)}: not with JetStream's server; serve with --orchestrator slipstream")


def free_port(host: str) -> int:
    """A TCP port that nobody listens on."""
    family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.bind(address)
        return probe.getsockname()[1]


async def host(engine: EngineConfig, server: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT. Returns the process's exit status: 0, or 1 when a thread of JetStream's died."""
    loop = asyncio.get_running_loop()
    stop, force = asyncio.Event(), asyncio.Event()
    dead_reason: str | None = None
    is_ready = False

    def on_signal() -> None:
        if not is_ready:
            log.info("stopped before the server was ready")
            os._exit(0)  # nothing is in flight, and a compilation cannot be interrupted
        if stop.is_set():
            force.set()
        stop.set()

    def on_dead(reason: str) -> None:
        nonlocal dead_reason
        dead_reason = dead_reason or reason
        loop.call_soon_threadsafe(force.set)
        loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    hosted = JetStreamHost(engine, server, on_dead)
    await in_thread(hosted.start)
    is_ready = True
    startup = timeline.THIS_PROCESS.startup()
    log.info("ready after %.1f s", startup.seconds, extra={"fields": startup.as_json()})
    print(f"SERVING on {hosted.address}", flush=True)
    await stop.wait()
    log.info("stopping: NOT_SERVING, new requests are refused")
    await hosted.drain(force)
    has_ended = await asyncio.to_thread(hosted.close)
    if dead_reason is not None:
        log.error(dead_reason)
    log.info("stopped")
    status = 0 if dead_reason is None else 1
    if not has_ended:
        log.warning("JetStream's threads do not end; leaving without them")
        logging.shutdown()
        os._exit(status)
    return status
