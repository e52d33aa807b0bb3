"""The flags of `slipstream bench overload`."""

from dataclasses import dataclass

from ...engine_impl.errors import RefusedError
from .flags import CacheLength, Hosted, Json, MaxQueued, Pairs, Seed, TokenIds, check_positive, id_range


@dataclass(frozen=True, kw_only=True)
class OverloadOptions(Hosted):
    """What the server costs beside its bare engine, what ten times too many requests do to it, and how soon a
    cancelled slot is used again. The server runs in this process.
    """

    cache_length: CacheLength = 512
    prompt_tokens: int = 64
    """Prompts (tokens)."""
    answer_tokens: int = 32
    """Longest answers under load (tokens)."""
    requests: int = 160
    """Requests at the usual load, and again at the overload (requests)."""
    factor: float = 10.0
    """Overload: so many times the rate that can be answered (a factor)."""
    max_queued: MaxQueued = 8
    steps: int = 96
    """Decode steps of one block of the comparison with the bare engine (steps)."""
    pairs: Pairs = 3
    token_ids: TokenIds = "300:1000"
    seed: Seed = 0
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "prompt_tokens", "answer_tokens", "requests", "factor", "max_queued", "steps", "pairs")
        _ = self.engine  # refused before the slow import
        longest = self.prompt_tokens + self.steps + 2 * self.slots
        if longest > self.cache_length:
            raise RefusedError(
                f"cache_length={self.cache_length} must hold prompt_tokens + steps + 2 * slots = {longest} tokens"
            )
        _ = self.ids

    @property
    def ids(self) -> tuple[int, int]:
        """The lowest token id of prompts, and one above the highest."""
        return id_range(self.token_ids)
