"""The flags of `slipstream bench growth`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import Json, Model, Platform, Threads, check_positive, facts, integers


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """How costs grow: a step with live tokens, cache length and slots, insert with its piece, the host with slots."""

    model: Model = "embedded"
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
    """Blocks per point (blocks)."""
    threads: Threads = None
    platform: Platform = "auto"
    plot: Path | None = None
    """Draw the curves there (.svg or .png)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "base_slots", "steps", "blocks", "threads")
        for cache_length in self.lengths:
            self.fitting(cache_length)
            self.config(self.base_slots, cache_length)
        for slots in self.slot_counts:
            self.config(slots, self.shortest)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cache lengths (tokens)."""
        return tuple(integers("cache_lengths", self.cache_lengths))

    @property
    def shortest(self) -> int:
        """The shortest of them (tokens)."""
        return min(self.lengths)

    @property
    def slot_counts(self) -> tuple[int, ...]:
        """Slots of the slot curve and of the host curve (requests)."""
        return tuple(integers("slots", self.slots))

    @property
    def slot_curve_live_tokens(self) -> int:
        """The second number of live tokens that fits into the shortest cache, if there are two."""
        return self.fitting(self.shortest)[:2][-1]

    def fitting(self, cache_length: int) -> tuple[int, ...]:
        """The live tokens around which a block of steps fits. Raises RefusedError when there are none."""
        live_tokens = tuple(integers("live_tokens", self.live_tokens))
        before, after = self.steps // 2, (self.steps + 1) // 2
        found = tuple(live for live in live_tokens if before < live <= cache_length - after)
        if not found:
            raise RefusedError(
                f"none of {live_tokens=} fits into {cache_length=} with {self.steps} steps around it: they must be "
                f"above {before} and at most {cache_length - after}"
            )
        return found

    def config(self, slots: int, cache_length: int) -> EngineConfig:
        """Raises RefusedError for sizes that no engine has."""
        return EngineConfig(
            model=self.model,
            slots=slots,
            cache_length=cache_length,
            cache_tokens=slots * cache_length,
            platform=self.platform,
        )

    def facts(self) -> dict[str, Any]:
        """For the result's JSON, the lists as numbers."""
        lists = {name: integers(name, getattr(self, name)) for name in ("cache_lengths", "live_tokens", "slots")}
        return facts(self) | lists
