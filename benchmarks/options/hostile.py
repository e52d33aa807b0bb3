"""The flags of `slipstream bench hostile`."""

from dataclasses import dataclass

from ...server.config import ServerConfig
from .flags import Hosted, Json, check_positive


@dataclass(frozen=True, kw_only=True)
class HostileOptions(Hosted):
    """What inputs made to harm do to everybody else: health checks, running streams, other requests, memory. The server
    runs in a process of its own. Ends with status 1 if one of them holds the others up.
    """

    input_bytes: int = ServerConfig().security.max_message_bytes - 65536
    """Size of an input (bytes)."""
    callers: int = 8
    """Callers that send it together, after one alone (callers)."""
    seconds: float = 2.0
    """How long each input is sent again and again (seconds)."""
    only: str = ""
    """Inputs to send (a comma list). Default: all."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "input_bytes", "callers", "seconds")
        _ = self.engine  # refused before the slow import

    @property
    def names(self) -> tuple[str, ...]:
        """Of the inputs to send; empty: all."""
        return tuple(name for name in self.only.split(",") if name)
