"""The flags of `slipstream bench start`."""

from dataclasses import dataclass
from typing import Literal

from .flags import CacheLength, Hosted, Json, check_positive


@dataclass(frozen=True, kw_only=True)
class StartOptions(Hosted):
    """Time a command in fresh processes, from its start to its first token or to SERVING (seconds), and its stages.

    Each run is a pair: cold (no compiled program on disk), then warm. The model is fetched before the clock runs.
    """

    cache_length: CacheLength = 1024
    command: Literal["generate", "serve"] = "generate"
    """generate: until the first token of one prompt. serve: until SERVING, with every program compiled."""
    prompt: str = "Hello"
    """What generate is asked (text)."""
    runs: int = 3
    """Pairs of a cold and a warm run (pairs)."""
    timeout_s: float = 600.0
    """How long one run may take (seconds)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "runs", "timeout_s")
        _ = self.engine  # refused before the slow import
