"""The flags of `slipstream bench soak`."""

from dataclasses import dataclass, replace

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from ...server.config import ServerConfig
from .flags import Hosted, Json, MaxQueued, Seed, TokenIds, check_positive, id_range


@dataclass(frozen=True, kw_only=True)
class SoakOptions(Hosted):
    """Thousands of mixed requests against a server in this process: answers, cancels, deadlines, cut connections,
    nonsense. Ends with status 1 if a slot, a page, an answer or memory is lost.
    """

    cache_tokens: int | None = None
    """Tokens of all requests together that the cache holds (tokens). Default: what all slots can hold; with less,
    requests are pre-empted, which their answers must not show."""
    min_preemptions: int = 0
    """Fewer are a fault: the pool was not as tight as it should have been (requests)."""
    requests: int = 3000
    """Requests in all (requests)."""
    hostile: float = 0.0
    """Share of inputs made to harm among the requests, as `bench hostile` sends them (a share of 1)."""
    input_bytes: int = 1 << 20
    """Size of such an input (bytes)."""
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
        check_positive(self, "input_bytes")
        if not 0 <= self.hostile < 1:
            raise RefusedError(f"hostile={self.hostile} must be from 0 to 1, 1 left out")
        if self.min_preemptions < 0:
            raise RefusedError(f"min_preemptions={self.min_preemptions} must be 0 or more")
        _ = self.engine, self.server, self.ids  # refused before the slow import

    @property
    def engine(self) -> EngineConfig:
        """Raises RefusedError for sizes that no engine has."""
        return replace(super().engine, cache_tokens=self.cache_tokens)

    @property
    def server(self) -> ServerConfig:
        """Raises RefusedError for a queue that no server has."""
        http_port = 0 if self.hostile else None
        return ServerConfig(port=0, http_port=http_port, grace_s=1.0, max_queued=self.max_queued)

    @property
    def ids(self) -> tuple[int, int]:
        """The lowest token id of prompts, and one above the highest."""
        return id_range(self.token_ids)
