"""slipstream bench start: what a newcomer waits for."""

from dataclasses import dataclass
from typing import Literal

from ...engine_impl.config import EngineConfig
from .flags import JsonFlag, Platform, check_positive, finish


@dataclass(frozen=True, kw_only=True)
class BenchStart:
    """Time a command in fresh processes, from its start to its first token or to SERVING (seconds), and its stages.

    Each run is a pair: cold (no compiled program on disk), then warm.
    """

    command: Literal["generate", "serve"] = "generate"
    """generate: until the first token of one prompt. serve: until SERVING, with every program compiled."""
    model: str = "embedded"
    """`embedded` or a model that `serve` takes; it is fetched before the clock runs."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 1024
    """Cache length (tokens a slot)."""
    prompt: str = "Hello"
    """What generate is asked (text)."""
    runs: int = 3
    """Pairs of a cold and a warm run (pairs)."""
    timeout_s: float = 600.0
    """How long one run may take (seconds)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("runs", "timeout_s"):
            check_positive(name, getattr(self, name))
        self._engine()

    def _engine(self) -> EngineConfig:
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)

    def run(self) -> int:
        from ...benchmarks.start import StartPlan, run

        plan = StartPlan(
            command=self.command,
            engine=self._engine(),
            prompt=self.prompt,
            runs=self.runs,
            timeout_s=self.timeout_s,
        )
        return finish(run(plan), self.as_json)
