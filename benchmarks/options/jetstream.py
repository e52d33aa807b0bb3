"""The flags of `slipstream bench jetstream`."""

from dataclasses import dataclass

from ...engine_impl.errors import RefusedError
from .flags import Hosted, Json, Pairs, Seed, check_positive


@dataclass(frozen=True, kw_only=True)
class JetStreamOptions(Hosted):
    """JetStream's orchestrator beside ours: two servers on the same engine, the same load in turns (A B A B)."""

    in_flight: int = 8
    """Requests in flight, always (requests)."""
    requests: int = 32
    """Requests of one block (requests)."""
    prompt_tokens: int = 64
    """Length of every prompt (tokens)."""
    output_tokens: int = 32
    """Longest answer (tokens)."""
    pairs: Pairs = 3
    cancels: int = 3
    """Cancelled answers of each of the two (requests)."""
    cancelled_tokens: int = 128
    """Length of the answers of which one is cancelled (tokens)."""
    seed: Seed = 0
    timeout_s: float = 120.0
    """How long one request may take (seconds)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(
            self, "in_flight", "requests", "prompt_tokens", "output_tokens", "pairs", "cancels", "cancelled_tokens"
        )
        _ = self.engine  # refused before the slow import
        longest = self.prompt_tokens + max(self.output_tokens, self.cancelled_tokens)
        if longest > self.cache_length:
            raise RefusedError(
                f"prompt and answer of {longest} tokens exceed cache_length={self.cache_length}; raise --cache-length"
            )
