"""The flags of `slipstream bench prefill`."""

from dataclasses import dataclass
from typing import Literal

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from .flags import Dtype, Json, Timed, check_positive, integers


@dataclass(frozen=True, kw_only=True)
class PrefillPoint:
    """What one row of the table measures."""

    prompt_tokens: int
    dtype: Dtype
    quantize_weights: Literal["auto", "none", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(Timed):
    """Time a prompt until its first token is on the host (ms), beside transformers in turns. Comma lists sweep.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}. Ends with status
    1 if the baseline's tokens are others than ours.
    """

    prompt_tokens: str = "16,64,128,256,512,1000"
    """Prompt lengths (tokens; a comma list sweeps)."""
    cache_length: int = 1024
    """Cache length (tokens), and the longest prompt."""
    prefill_chunk: int | None = None
    """Tokens of a prompt that are computed together (tokens). Default: as the server's."""
    versus: Literal["none", "transformers", "xla"] = "none"
    """Time this baseline in turns (A B A B): Hugging Face transformers on the same weights, type and cores (CPU); XLA's
    own products in float32 instead of our native ones, on weights of the same values (CPU)."""
    repeats: int = 2
    """Prompts of one block (prompts); one more before them is not timed."""
    as_json: Json = False

    def __post_init__(self) -> None:
        for point in self.points:
            self.config(point)
            if point.prompt_tokens > self.cache_length:
                raise RefusedError(
                    f"prompt_tokens={point.prompt_tokens} must be at most cache_length={self.cache_length}; raise "
                    "--cache-length"
                )
            if self.versus == "transformers" and point.quantize_weights in ("int8", "int4"):
                raise RefusedError(f"versus={self.versus!r} is given float weights; leave out --quantize-weights")
        check_positive(self, "repeats", "pairs", "threads")

    @property
    def points(self) -> list[PrefillPoint]:
        """The sweep: every combination."""
        return [
            PrefillPoint(prompt_tokens=prompt_tokens, dtype=dtype, quantize_weights=quantize_weights)
            for dtype, quantize_weights in self.weights()
            for prompt_tokens in integers("prompt_tokens", self.prompt_tokens)
        ]

    def config(self, point: PrefillPoint) -> EngineConfig:
        """Raises RefusedError for a cache length that no engine has."""
        return EngineConfig(
            model=self.model,
            slots=1,
            cache_length=self.cache_length,
            cache_tokens=self.cache_length,
            prefill_chunk=self.prefill_chunk,
            dtype=point.dtype,
            platform=self.platform,
            tensor_parallel=self.tensor_parallel,
            quantize_weights=point.quantize_weights,
        )
