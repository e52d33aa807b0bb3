"""The flags of `slipstream bench soak`."""

from dataclasses import dataclass

from ...server.config import ServerConfig
from .flags import Hosted, Json, MaxQueued, Seed, TokenIds, check_positive, id_range


@dataclass(frozen=True, kw_only=True)
class SoakOptions(Hosted):
    """Thousands of mixed requests against a server in this process: answers, cancels, deadlines, cut connections,
    nonsense. Ends with status 1 if a slot, an answer or memory is lost.
    """

    requests: int = 3000
    """Requests in all (requests)."""
    in_flight: int = 42
    """Requests under way at any time (requests)."""
    max_queued: MaxQueued = 32
    max_seconds: float = 600.0
    """No request is sent after this (seconds)."""
    prompts: int = 12
    """Different prompts (prompts)."""
    prompt_tokens: int = 48
    """Longest prompt (tokens)."""
    answer_tokens: int = 24
    """Longest answer (tokens)."""
    token_ids: TokenIds = "300:1000"
    seed: Seed = 0
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "requests", "in_flight", "max_seconds", "prompts", "prompt_tokens", "answer_tokens")
        _ = self.engine, self.server, self.ids  # refused before the slow import

    @property
    def server(self) -> ServerConfig:
        """Raises RefusedError for a queue that no server has."""
        return ServerConfig(port=0, grace_s=1.0, max_queued=self.max_queued)

    @property
    def ids(self) -> tuple[int, int]:
        """The lowest token id of prompts, and one above the highest."""
        return id_range(self.token_ids)
