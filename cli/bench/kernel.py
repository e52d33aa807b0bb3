"""slipstream bench kernel: time decode attention and the flush alone."""

from dataclasses import dataclass

from .flags import Dtype, JsonFlag, Platform, check_positive, finish, integers


@dataclass(frozen=True, kw_only=True)
class BenchKernel:
    """Time decode attention and the flush alone (µs), beside other implementations that this backend runs."""

    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 1024
    """Cache length (tokens a slot)."""
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
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        integers("live_tokens", self.live_tokens)
        for name in ("slots", "cache_length", "layers", "heads", "kv_heads", "head_dim", "repeats"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.kernel import KernelPlan, run

        plan = KernelPlan(
            slots=self.slots,
            cache_length=self.cache_length,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            repeats=self.repeats,
            platform=self.platform,
        )
        return finish(run(plan, integers("live_tokens", self.live_tokens)), self.as_json)
