"""slipstream bench jetstream: JetStream's orchestrator beside ours."""

from dataclasses import dataclass

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import JsonFlag, Platform, check_positive, finish


@dataclass(frozen=True, kw_only=True)
class BenchJetStream:
    """JetStream's orchestrator beside ours: two servers on the same engine, the same load in turns (A B A B)."""

    model: str = "embedded"
    """`embedded` or a model that `serve` takes."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 256
    """Cache length (tokens a slot)."""
    in_flight: int = 8
    """Requests in flight, always (requests)."""
    requests: int = 32
    """Requests of one block (requests)."""
    prompt_tokens: int = 64
    """Length of every prompt (tokens)."""
    output_tokens: int = 32
    """Longest answer (tokens)."""
    pairs: int = 3
    """Blocks of each of the two (blocks)."""
    cancels: int = 3
    """Cancelled answers of each of the two (requests)."""
    cancelled_tokens: int = 128
    """Length of the answers of which one is cancelled (tokens)."""
    seed: int = 0
    """Same seed, same prompts (a number)."""
    timeout_s: float = 120.0
    """How long one request may take (seconds)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("in_flight", "requests", "prompt_tokens", "output_tokens", "pairs", "cancels", "cancelled_tokens"):
            check_positive(name, getattr(self, name))
        longest = self.prompt_tokens + max(self.output_tokens, self.cancelled_tokens)
        if longest > self._engine().chosen[1]:
            raise RefusedError(
                f"prompt and answer of {longest} tokens exceed cache_length={self.cache_length}; raise --cache-length"
            )

    def run(self) -> int:
        from ...benchmarks.jetstream import JetStreamPlan, run

        plan = JetStreamPlan(
            engine=self._engine(),
            in_flight=self.in_flight,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            pairs=self.pairs,
            cancels=self.cancels,
            cancelled_tokens=self.cancelled_tokens,
            seed=self.seed,
            timeout_s=self.timeout_s,
        )
        return finish(run(plan), self.as_json)

    def _engine(self) -> EngineConfig:
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)
