"""How a server is run: one frozen dataclass, checked once. Imports nothing heavy, the command line reads it first."""

import math
from dataclasses import dataclass
from typing import Literal

from ..engine_impl.errors import RefusedError

MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, how much it lets wait, how it stops."""

    host: str = "127.0.0.1"
    """Address to listen on (name or IP). 0.0.0.0 accepts other machines; there is no authentication."""

    port: int = 9000
    """gRPC port (TCP); 0 takes a free one and prints it."""

    max_queued: int = 256
    """Requests that may wait for a slot (requests); beyond it they get RESOURCE_EXHAUSTED."""

    grace_s: float = 30.0
    """Time that running requests get to finish after the first SIGTERM or Ctrl-C (seconds). A second one ends it."""

    orchestrator: Literal["slipstream", "jetstream"] = "slipstream"
    """Who schedules requests: we, or JetStream's own Driver and gRPC server (google-jetstream 0.2.2) on our engine."""

    disaggregated: bool = False
    """With JetStream's orchestrator: prefill on the first half of the devices, decode on the second."""

    def __post_init__(self) -> None:
        if self.disaggregated and self.orchestrator != "jetstream":
            raise RefusedError("--disaggregated is a mode of JetStream's orchestrator: add --orchestrator jetstream")
        if not self.host:
            raise RefusedError("host='' must be a name or an IP address; 127.0.0.1 is this machine only")
        if not 0 <= self.port <= MAX_PORT:
            raise RefusedError(f"port={self.port} must be from 0 (any free one) to {MAX_PORT}")
        if self.max_queued < 1:
            raise RefusedError(f"max_queued={self.max_queued} must be at least 1: every request passes the queue")
        if not (math.isfinite(self.grace_s) and self.grace_s >= 0):
            raise RefusedError(f"grace_s={self.grace_s} must be 0 (stop at once) or a positive number of seconds")

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets."""
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    """host:port as gRPC reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
