"""What others reach a server by: gRPC, HTTP, health checks and metrics. It knows nothing of engines."""

import asyncio
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..engine_impl.errors import RefusedError
from .address import join_address
from .config import ServerConfig
from .gateway import Gateway
from .grpc import adapters
from .grpc.adapters import AdapterService
from .grpc.interceptors import interceptors
from .grpc.service import JETSTREAM_SERVICE, SERVICE, GrpcService, add_to
from .http.server import HttpServer
from .net import tls
from .net.connections import most_connections
from .net.ports import check_port_is_free, free_path
from .net.security import Guard, warn_if_open
from .observe.endpoint import Endpoint
from .observe.metrics import Metrics

log = logging.getLogger(__name__)

KEEPALIVE_S = 20.0
"""How long a connection may be silent before it is pinged (seconds); half of it later it counts as cut."""

HANDSHAKE_S, IDLE_S = 10.0, 300.0
"""How long a gRPC connection may take to begin, and be without a call (seconds); clients begin the next call on a new
one."""


class Doors:
    """open() them, tell with set_ready() whether there is an engine behind, close() them."""

    def __init__(self, config: ServerConfig, gateway: Gateway, metrics: Metrics) -> None:
        """Raises RefusedError for a token file or certificates that cannot be used."""
        self.address = config.address
        """host:port of gRPC; the port is the real one once open."""
        self.endpoint: Endpoint | None = None
        """/metrics, if there is one."""
        self.is_ready = False
        """Whether health checks are answered with SERVING."""
        self._config, self._metrics = config, metrics
        guard = Guard(config.security, is_local=config.is_local)
        self.grpc = GrpcService(gateway, guard, config.chat)
        self._adapter_calls = AdapterService(gateway, guard)
        self._http = HttpServer(gateway, guard, config, lambda: self.is_ready) if config.has_http else None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
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
        """host:port of OpenAI's endpoints, once open; None when they are not served."""
        return None if self._http is None else self._http.address

    async def open(self) -> None:
        """NOT_SERVING, for now. Raises RefusedError for a port that is in use or not here; then none is open."""
        await self.set_ready(False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_to(self._server, self.grpc)
        adapters.add_to(self._server, self._adapter_calls)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        check_port_is_free(self._config)
        try:
            await self._open()
        except BaseException:
            await self.close(0)
            raise
        warn_if_open(self._config)

    async def _open(self) -> None:
        if self._config.watch.metrics_port is not None:
            self.endpoint = Endpoint(
                self._config.host, self._config.watch.metrics_port, self._metrics.registry, lambda: self.is_ready
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

    async def set_ready(self, is_ready: bool) -> None:
        """What health checks, /readyz and metrics tell from now on."""
        self.is_ready = is_ready
        self._metrics.serving(is_ready)
        status = health_pb2.HealthCheckResponse
        for service in ("", SERVICE, JETSTREAM_SERVICE):
            await self._health.set(service, status.SERVING if is_ready else status.NOT_SERVING)

    async def begin_to_close(self) -> None:
        """NOT_SERVING for good, whatever set_ready() tells; calls go on."""
        self.is_ready = False
        self._metrics.serving(False)
        await self._health.enter_graceful_shutdown()

    async def close(self, flush_s: float) -> None:
        """Calls that are not over have so long to say their last (seconds)."""
        closing = [self._server.stop(flush_s)]
        if self._http is not None:
            closing.append(self._http.close())
        await asyncio.gather(*closing)
        if self.endpoint is not None:
            await asyncio.to_thread(self.endpoint.close)
