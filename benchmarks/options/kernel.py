"""The flags of `slipstream bench kernel`."""

from dataclasses import dataclass

from ...engine_impl.errors import RefusedError
from .flags import CacheLength, Dtype, Json, Platform, Slots, check_positive, integers


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Time decode attention and the flush alone (µs), beside other implementations that this backend runs."""

    slots: Slots = 8
    cache_length: CacheLength = 1024
    live_tokens: str = "192"
    """Tokens that each slot holds (tokens; a comma list sweeps)."""
    layers: int = 30
    """Layers of the cache; attention is timed over all of them, as in a step (layers)."""
    heads: int = 9
    """Query heads (heads)."""
    kv_heads: int = 3
    """kv heads (heads)."""
    head_dim: int = 64
    """Size of a head (values)."""
    dtype: Dtype = "auto"
    """Type of q and the cache. `auto`: float32 on CPUs, else bfloat16."""
    repeats: int = 20
    """Calls that are timed (calls)."""
    platform: Platform = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "slots", "cache_length", "layers", "heads", "kv_heads", "head_dim", "repeats")
        for live in self.lengths:
            if live >= self.cache_length:
                raise RefusedError(f"live_tokens={live} must be below cache_length={self.cache_length}")
        if self.cache_length % 128 or self.heads % self.kv_heads:
            raise RefusedError(
                f"cache_length={self.cache_length} must be a multiple of 128, and heads={self.heads} of "
                f"kv_heads={self.kv_heads}"
            )

    @property
    def lengths(self) -> list[int]:
        """The live tokens of the sweep."""
        return integers("live_tokens", self.live_tokens)
