"""slipstream bench step: time decode steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .flags import JsonFlag, Platform, check_positive, finish, integers, words


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Time decode steps (ms), beside a baseline in turns. Comma lists sweep: every combination is one row.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}. Ends with status
    1 if a baseline's tokens are others than ours.
    """

    model: str = "embedded"
    """`embedded`, a checkpoint that `serve` takes, or a preset with random weights (llama-3.1-8b, llama-2-7b, ...)."""
    slots: str = "8"
    """Slots, all of them live (requests; a comma list sweeps)."""
    cache_length: str = "1024"
    """Cache length (tokens a slot; a comma list sweeps)."""
    live_tokens: str = "192"
    """Tokens that each slot holds, on average over a block of steps (tokens; a comma list sweeps)."""
    dtype: str = "auto"
    """auto, float32 or bfloat16 (a comma list sweeps)."""
    quantize_weights: str = "auto"
    """auto (as the checkpoint is), none, int8 or int4 (a comma list sweeps)."""
    quantize_kv: str = "none"
    """none or int8 (a comma list sweeps)."""
    versus: Literal["none", "eager", "eager-per-layer", "transformers", "transformers-dynamic"] = "none"
    """Time this baseline in turns (A B A B): the eager cache, stacked or an array a layer; Hugging Face transformers
    with a static or a dynamic cache (CPU)."""
    attention: bool = False
    """Time decode attention alone too, and tell what the step would take if that took no longer than its bytes."""
    steps: int = 16
    """Steps of one block (steps)."""
    pairs: int = 5
    """Blocks of each of the two (blocks)."""
    threads: int | None = None
    """CPU cores that this process, baseline included, may use (cores). Default: all."""
    tensor_parallel: int | None = None
    """Devices that share the model (devices). Default: as `serve` chooses."""
    platform: Platform = "auto"
    """Devices to run on. `auto` takes a TPU or GPU where there is one, else the CPU."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        self._points(dict)  # refused before the slow import
        for name in ("steps", "pairs", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.step import Point, StepPlan, has_unequal_tokens, run

        plan = StepPlan(
            model=self.model,
            platform=self.platform,
            tensor_parallel=self.tensor_parallel,
            versus=self.versus,
            steps=self.steps,
            pairs=self.pairs,
            threads=self.threads,
            attention=self.attention,
        )
        result = run(plan, self._points(Point))
        finish(result, self.as_json)
        return 1 if has_unequal_tokens(result) else 0

    def _points(self, point: Callable[..., Any]) -> list[Any]:
        return [
            point(
                slots=slots, cache_length=cache_length, live_tokens=live_tokens, dtype=dtype,
                quantize_weights=quantize_weights, quantize_kv=quantize_kv,
            )
            for slots in integers("slots", self.slots)
            for cache_length in integers("cache_length", self.cache_length)
            for dtype in words("dtype", self.dtype, ("auto", "float32", "bfloat16"))
            for quantize_weights in words("quantize_weights", self.quantize_weights, ("auto", "none", "int8", "int4"))
            for quantize_kv in words("quantize_kv", self.quantize_kv, ("none", "int8"))
            for live_tokens in integers("live_tokens", self.live_tokens)
        ]  # fmt: skip
