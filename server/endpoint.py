"""HTTP for those who watch the server: /metrics for Prometheus, /healthz and /readyz for whoever knows no gRPC."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AddressFamily, getaddrinfo
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, disable_created_metrics, generate_latest

from ..engine_impl.errors import RefusedError
from .config import join_address

IDLE_S = 10.0
"""How long a connection may be silent (seconds), after which it is closed."""

POLL_S = 0.1
"""How often http.server looks whether it is to stop (seconds)."""

TEXT = "text/plain; charset=utf-8"


class Endpoint:
    """Listens from the moment it is made; close() it."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
        """`is_ready` decides /readyz. Raises RefusedError when the port cannot be had."""

        class Handler(BaseHTTPRequestHandler):
            timeout = IDLE_S

            def do_GET(self) -> None:
                match self.path.partition("?")[0]:
                    case "/metrics":
                        self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                    case "/healthz":
                        self._answer(200, TEXT, b"alive\n")
                    case "/readyz":
                        self._answer(200, TEXT, b"ready\n") if is_ready() else self._answer(503, TEXT, b"not ready\n")
                    case _:
                        self._answer(404, TEXT, b"there are /metrics, /healthz and /readyz\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """A scrape every few seconds is no news."""

        disable_created_metrics()  # a second series for each, with its time of birth

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        try:
            family, _, _, _, address = getaddrinfo(host, port)[0]
            Server.address_family = AddressFamily(family)
            self._server = Server(address[:2], Handler)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            raise RefusedError(
                f"cannot serve metrics on {join_address(host, port)}: {error.strerror or error}; "
                "choose another --metrics-port"
            ) from error
        self.address = join_address(host, self._server.server_address[1])
        """host:port; the port is the real one."""
        threading.Thread(target=self._server.serve_forever, args=[POLL_S], name="metrics", daemon=True).start()

    def close(self) -> None:
        """Frees the port; may take POLL_S."""
        self._server.shutdown()
        self._server.server_close()
