"""The flags of `slipstream bench start`."""

from dataclasses import dataclass, replace
from typing import Literal

from ...engine_impl.config import EngineConfig
from .flags import CacheLength, Dtype, Hosted, Json, check_positive


@dataclass(frozen=True, kw_only=True)
class StartOptions(Hosted):
    """Time a command in fresh processes, from its start to its first token or to SERVING (seconds), and its stages.

    Each run is a pair: cold (no compiled program on disk, nothing of the model's files in memory), then warm. The model
    is fetched before the clock runs.
    """

    cache_length: CacheLength = 1024
    command: Literal["generate", "serve"] = "generate"
    """generate: until the first token of one prompt. serve: until SERVING, with every program compiled."""
    prompt: str = "Hello"
    """What generate is asked (text)."""
    runs: int = 3
    """Pairs of a cold and a warm run (pairs)."""
    dtype: Dtype = "auto"
    """The type to compute in, as `serve` has it."""
    random_gib: float | None = None
    """Instead of --model a Llama of this size with random weights, float32 or as --dtype says, written to the folder of
    temporary files (GiB)."""
    weight_cache: bool = False
    """With --weight-cache: starts read what one before them has kept, also on the temporary files' disk."""
    timeout_s: float = 600.0
    """How long one run may take (seconds)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "runs", "timeout_s", "random_gib")
        _ = self.engine  # refused before the slow import

    @property
    def engine(self) -> EngineConfig:
        """Raises RefusedError for sizes that no engine has."""
        return replace(super().engine, dtype=self.dtype)
