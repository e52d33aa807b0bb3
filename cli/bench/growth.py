"""slipstream bench growth: how costs grow."""

from dataclasses import dataclass
from pathlib import Path

from .flags import JsonFlag, Platform, check_positive, finish, integers


@dataclass(frozen=True, kw_only=True)
class BenchGrowth:
    """How costs grow: a step with live tokens, cache length and slots, insert with its bucket, the host with slots."""

    model: str = "embedded"
    """`embedded`, the path of a GGUF file, or a preset with random weights."""
    cache_lengths: str = "1024,4096"
    """Cache lengths of the live-token curves (tokens; a comma list). The shortest is also the slot curve's."""
    live_tokens: str = "64,256,512,768,960"
    """Live tokens of each slot (tokens; a comma list); those beyond a cache are left out of its curve."""
    slots: str = "1,2,4,8,16,32"
    """Slots of the slot curve and of the host curve (requests; a comma list)."""
    base_slots: int = 8
    """Slots of the live-token curves (requests)."""
    steps: int = 8
    """Steps of one block (steps)."""
    blocks: int = 3
    """Blocks a point (blocks)."""
    threads: int | None = None
    """CPU cores that this process may use (cores). Default: all."""
    platform: Platform = "auto"
    """Devices to run on."""
    plot: Path | None = None
    """Draw the curves there (.svg or .png)."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("cache_lengths", "live_tokens", "slots"):
            integers(name, getattr(self, name))
        for name in ("base_slots", "steps", "blocks", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.growth import GrowthPlan, run

        plan = GrowthPlan(
            model=self.model,
            cache_lengths=tuple(integers("cache_lengths", self.cache_lengths)),
            live_tokens=tuple(integers("live_tokens", self.live_tokens)),
            slots=tuple(integers("slots", self.slots)),
            base_slots=self.base_slots,
            steps=self.steps,
            blocks=self.blocks,
            threads=self.threads,
            platform=self.platform,
        )
        return finish(run(plan, self.plot), self.as_json)
