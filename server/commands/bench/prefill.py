"""slipstream bench prefill: time prompts until their first token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ....engine_impl.config import EngineConfig
from .flags import JsonFlag, Platform, check_positive, finish, integers, words


@dataclass(frozen=True, kw_only=True)
class BenchPrefill:
    """Time a prompt until its first token is on the host (ms), beside transformers in turns. Comma lists sweep.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}.
    """

    model: str = "embedded"
    """`embedded`, the path of a GGUF file, or a preset with random weights (llama-3.1-8b, llama-2-7b, ...)."""
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
        self._points(dict)  # refused before the slow import
        EngineConfig(cache_length=self.cache_length)
        for name in ("repeats", "pairs", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ....benchmarks.prefill import PrefillPlan, PrefillPoint, run

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
        return finish(run(plan, self._points(PrefillPoint)), self.as_json)

    def _points(self, point: Callable[..., Any]) -> list[Any]:
        return [
            point(prompt_tokens=prompt_tokens, dtype=dtype, quantize_weights=quantize_weights)
            for dtype in words("dtype", self.dtype, ("auto", "float32", "bfloat16"))
            for quantize_weights in words("quantize_weights", self.quantize_weights, ("auto", "none", "int8", "int4"))
            for prompt_tokens in integers("prompt_tokens", self.prompt_tokens)
        ]
