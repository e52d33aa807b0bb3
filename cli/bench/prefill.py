"""slipstream bench prefill: time prompts until their first token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import JsonFlag, Platform, check_positive, finish, integers, words


@dataclass(frozen=True, kw_only=True)
class BenchPrefill:
    """Time a prompt until its first token is on the host (ms), beside transformers in turns. Comma lists sweep.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}. Ends with status
    1 if the baseline's tokens are others than ours.
    """

    model: str = "embedded"
    """`embedded`, a checkpoint that `serve` takes, or a preset with random weights (llama-3.1-8b, llama-2-7b, ...)."""
    prompt_tokens: str = "16,64,128,256,512,1000"
    """Prompt lengths (tokens; a comma list sweeps); each is padded to its bucket, the next power of two."""
    cache_length: int = 1024
    """Cache length (tokens); the longest prompt is the largest power of two within it."""
    dtype: str = "auto"
    """auto, float32 or bfloat16 (a comma list sweeps)."""
    quantize_weights: str = "auto"
    """auto (as the checkpoint is), none, int8 or int4 (a comma list sweeps)."""
    versus: Literal["none", "transformers"] = "none"
    """Time this baseline in turns (A B A B): Hugging Face transformers on the same weights, type and cores (CPU)."""
    repeats: int = 2
    """Prompts of one block (prompts); one more before them is not timed."""
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
        # All of it is refused before the slow import.
        longest = EngineConfig(cache_length=self.cache_length).largest_bucket
        for point in self._points(dict):
            if point["prompt_tokens"] > longest:
                raise RefusedError(
                    f"prompt_tokens={point['prompt_tokens']} must be at most {longest}, the largest bucket within "
                    f"cache_length={self.cache_length}; raise --cache-length"
                )
            if self.versus != "none" and point["quantize_weights"] in ("int8", "int4"):
                raise RefusedError(f"versus={self.versus!r} is given float weights; leave out --quantize-weights")
        for name in ("repeats", "pairs", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.prefill import PrefillPlan, PrefillPoint, has_unequal_tokens, run

        plan = PrefillPlan(
            model=self.model,
            cache_length=self.cache_length,
            platform=self.platform,
            tensor_parallel=self.tensor_parallel,
            versus=self.versus,
            repeats=self.repeats,
            pairs=self.pairs,
            threads=self.threads,
        )
        result = run(plan, self._points(PrefillPoint))
        finish(result, self.as_json)
        return 1 if has_unequal_tokens(result) else 0

    def _points(self, point: Callable[..., Any]) -> list[Any]:
        return [
            point(prompt_tokens=prompt_tokens, dtype=dtype, quantize_weights=quantize_weights)
            for dtype in words("dtype", self.dtype, ("auto", "float32", "bfloat16"))
            for quantize_weights in words("quantize_weights", self.quantize_weights, ("auto", "none", "int8", "int4"))
            for prompt_tokens in integers("prompt_tokens", self.prompt_tokens)
        ]
