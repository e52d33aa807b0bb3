"""The flags of `slipstream bench accuracy`."""

from dataclasses import dataclass, field
from typing import Any

from .flags import Json, Platform, ServedModel, TensorParallel, Threads, check_positive, words


@dataclass(frozen=True)
class Mode:
    """Coarser numbers, and what they may cost."""

    options: dict[str, Any] = field(default_factory=dict)
    """of EngineConfig"""
    goal: float | None = None
    """the perplexity over float32's, at most"""


REFERENCE = "float32"
MODES = {
    REFERENCE: Mode(),
    "bfloat16": Mode({"dtype": "bfloat16"}, 1.005),
    "bfloat16+int8": Mode({"dtype": "bfloat16", "quantize_weights": "int8"}),
    "int8": Mode({"quantize_weights": "int8"}, 1.005),
    "int8x8": Mode({"quantize_weights": "int8", "quantize_activations": "int8"}),
    "int4-32": Mode({"quantize_weights": "int4", "quantize_block": 32}, 1.01),
    "int4-64": Mode({"quantize_weights": "int4", "quantize_block": 64}),
    "int4-128": Mode({"quantize_weights": "int4", "quantize_block": 128}),
    "kv8": Mode({"quantize_kv": "int8"}, 1.005),
    "int8+kv8": Mode({"quantize_weights": "int8", "quantize_kv": "int8"}),
}


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """Measure what coarser numbers cost (perplexity, divergence, greedy answers) and save (bytes), beside float32.

    The text comes with CPython. One engine is loaded at a time.
    """

    model: ServedModel = "embedded"
    modes: str = "bfloat16,bfloat16+int8,int8,int8x8,int4-32,int4-64,int4-128,kv8,int8+kv8"
    """What is measured beside float32 (a comma list): bfloat16 is all that is not quantised, int8 and int4-BLOCK are
    weights, int8x8 rounds activations too, kv8 is the cache."""
    tokens: int = 4096
    """Tokens of the text whose perplexity is measured by prefill (tokens); 1024 are decoded in any case."""
    threads: Threads = None
    tensor_parallel: TensorParallel = None
    platform: Platform = "auto"
    as_json: Json = False

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "threads")
        _ = self.measured  # refused before the slow import

    @property
    def measured(self) -> list[str]:
        """Names of MODES, the reference first."""
        asked = words("modes", self.modes, tuple(MODES))
        return [REFERENCE, *(name for name in asked if name != REFERENCE)]
