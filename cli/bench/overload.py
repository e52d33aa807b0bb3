"""slipstream bench overload: what a server costs, and too many requests."""

from dataclasses import dataclass

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import JsonFlag, Platform, check_positive, finish


@dataclass(frozen=True, kw_only=True)
class BenchOverload:
    """What the server costs beside its bare engine, what ten times too many requests do to it, and how soon a
    cancelled slot is used again. The server runs in this process.
    """

    model: str = "embedded"
    """`embedded` or the path of a model."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 512
    """Cache length (tokens a slot)."""
    prompt_tokens: int = 64
    """Prompts (tokens)."""
    answer_tokens: int = 32
    """Longest answers under load (tokens)."""
    requests: int = 160
    """Requests at the usual load, and again at the overload (requests)."""
    factor: float = 10.0
    """Overload: so many times the rate that can be answered (a factor)."""
    max_queued: int = 8
    """Requests that may wait for a slot (requests)."""
    steps: int = 96
    """Decode steps of one block of the comparison with the bare engine (steps)."""
    pairs: int = 3
    """Blocks of each of the two (blocks)."""
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out)."""
    seed: int = 0
    """Same seed, same requests at the same times (a number)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens", "requests", "factor", "max_queued", "steps", "pairs"):
            check_positive(name, getattr(self, name))
        longest = self.prompt_tokens + self.steps + 2 * self.slots
        if longest > self._config().chosen[1]:
            raise RefusedError(
                f"cache_length={self.cache_length} must hold prompt_tokens + steps + 2 * slots = {longest} tokens"
            )

    def _config(self) -> EngineConfig:
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)

    def run(self) -> int:
        from ...benchmarks.load.workload import id_range
        from ...benchmarks.overload import OverloadPlan, run
        from ...engine_impl.loading import load_engine

        plan = OverloadPlan(
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            requests=self.requests,
            factor=self.factor,
            max_queued=self.max_queued,
            steps=self.steps,
            pairs=self.pairs,
            ids=id_range(self.token_ids),
            seed=self.seed,
        )
        return finish(run(*load_engine(self._config()), plan), self.as_json)
