"""The flags of `slipstream bench step`."""

from dataclasses import dataclass
from typing import Literal

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import Dtype, Json, Timed, check_positive, integers, words

Versus = Literal["none", "eager", "eager-per-layer", "transformers", "transformers-dynamic", "xla"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """What one row of the table measures."""

    slots: int
    cache_length: int
    live_tokens: int
    dtype: Dtype
    quantize_weights: Literal["auto", "none", "int8", "int4"] = "auto"
    quantize_kv: Literal["none", "int8"] = "none"

    @property
    def weights_key(self) -> tuple[object, ...]:
        """Points that have it in common share their weights."""
        return (self.dtype, self.quantize_weights)

    @property
    def engine_key(self) -> tuple[object, ...]:
        """Points that have it in common share an engine."""
        return (*self.weights_key, self.slots, self.cache_length, self.quantize_kv)


@dataclass(frozen=True, kw_only=True)
class StepOptions(Timed):
    """Time decode steps (ms), beside a baseline in turns. Comma lists sweep: every combination is one row.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}. Ends with status
    1 if a baseline's tokens are others than ours.
    """

    slots: str = "8"
    """Slots, all of them live (requests; a comma list sweeps)."""
    cache_length: str = "1024"
    """Cache length (tokens per slot; a comma list sweeps)."""
    live_tokens: str = "192"
    """Tokens that each slot holds, on average over a block of steps (tokens; a comma list sweeps)."""
    quantize_kv: str = "none"
    """none or int8 (a comma list sweeps)."""
    versus: Versus = "none"
    """Time this baseline in turns (A B A B): the eager cache, stacked or an array per layer; Hugging Face transformers
    with a static or a dynamic cache (CPU); XLA's own products and attention in float32 instead of our native ones, on
    weights of the same values (CPU)."""
    attention: bool = False
    """Time decode attention alone too, and tell what the step would take if that took no longer than its bytes."""
    steps: int = 16
    """Steps of one block (steps)."""
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "steps", "pairs", "threads")
        for point in self.points:
            self._check(point)

    @property
    def points(self) -> list[Point]:
        """The sweep: every combination."""
        return [
            Point(
                slots=slots, cache_length=cache_length, live_tokens=live_tokens, dtype=dtype,
                quantize_weights=quantize_weights, quantize_kv=quantize_kv,
            )
            for slots in integers("slots", self.slots)
            for cache_length in integers("cache_length", self.cache_length)
            for dtype, quantize_weights in self.weights()
            for quantize_kv in words("quantize_kv", self.quantize_kv, ("none", "int8"))
            for live_tokens in integers("live_tokens", self.live_tokens)
        ]  # fmt: skip

    def config(self, point: Point) -> EngineConfig:
        """Raises RefusedError for sizes that no engine has."""
        return EngineConfig(
            model=self.model,
            slots=point.slots,
            cache_length=point.cache_length,
            cache_tokens=point.slots * point.cache_length,
            dtype=point.dtype,
            platform=self.platform,
            tensor_parallel=self.tensor_parallel,
            quantize_weights=point.quantize_weights,
            quantize_kv=point.quantize_kv,
        )

    def _check(self, point: Point) -> None:
        """Raises RefusedError unless a block fits around the live tokens, and the baseline knows the quantisation."""
        is_quantized = "int8" in point.quantize_kv or point.quantize_weights in ("int8", "int4")
        if self.versus.startswith("transformers") and is_quantized:
            raise RefusedError(
                f"versus={self.versus!r} is given float weights and a float cache; leave out --quantize-weights and "
                "--quantize-kv, or use --versus eager, which takes quantised weights"
            )
        if self.versus.startswith("eager") and point.quantize_kv != "none":
            raise RefusedError(
                f"versus={self.versus!r} stores rows as they are, not as quantize_kv={point.quantize_kv!r}; leave it "
                "out"
            )
        longest = point.cache_length - (self.steps + 1) // 2
        if not self.steps // 2 < point.live_tokens <= longest:
            raise RefusedError(
                f"live_tokens={point.live_tokens} must be above {self.steps // 2} and at most {longest}: {self.steps} "
                f"steps around it fit into cache_length={point.cache_length}; choose others, or fewer --steps"
            )
