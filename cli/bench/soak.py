"""slipstream bench soak: is anything lost."""

from dataclasses import dataclass

from ...engine_impl.config import EngineConfig
from ...server.config import ServerConfig
from .flags import JsonFlag, Platform, check_positive, finish


@dataclass(frozen=True, kw_only=True)
class BenchSoak:
    """Thousands of mixed requests against a server in this process: answers, cancels, deadlines, cut connections,
    nonsense. Ends with status 1 if a slot, an answer or memory is lost.
    """

    model: str = "embedded"
    """`embedded` or the path of a model."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 256
    """Cache length (tokens a slot)."""
    requests: int = 3000
    """Requests in all (requests)."""
    in_flight: int = 42
    """Requests under way at any time (requests)."""
    max_queued: int = 32
    """Requests that may wait for a slot (requests); what is beyond is refused, which is part of the test."""
    max_seconds: float = 600.0
    """No request is sent after this (seconds)."""
    prompts: int = 12
    """Different prompts (prompts)."""
    prompt_tokens: int = 48
    """Longest prompt (tokens)."""
    answer_tokens: int = 24
    """Longest answer (tokens)."""
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out)."""
    seed: int = 0
    """Same seed, same requests (a number)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("requests", "in_flight", "max_seconds", "prompts", "prompt_tokens", "answer_tokens"):
            check_positive(name, getattr(self, name))
        self._configs()

    def _configs(self) -> tuple[EngineConfig, ServerConfig]:
        engine = EngineConfig(
            model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform
        )
        return engine, ServerConfig(port=0, grace_s=1.0, max_queued=self.max_queued)

    def run(self) -> int:
        from ...benchmarks.load.hosted import hosted
        from ...benchmarks.load.workload import id_range
        from ...benchmarks.soak import SoakPlan, run
        from ...engine_impl.loading import load_engine

        engine, server = self._configs()
        plan = SoakPlan(
            requests=self.requests,
            in_flight=self.in_flight,
            max_seconds=self.max_seconds,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            ids=id_range(self.token_ids),
            seed=self.seed,
        )
        with hosted(*load_engine(engine), server) as serving:
            result = run(serving, plan)
        finish(result, self.as_json)
        return 1 if result["faults"] else 0
