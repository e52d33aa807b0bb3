"""How a request wants its tokens chosen. Plain numbers: the wire and the command line build it without JAX."""

import math
from dataclasses import dataclass

from .errors import RefusedError

MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Per-request sampling; the defaults are greedy decoding."""

    temperature: float = 0.0
    """Softmax temperature; 0 is greedy."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds this probability; in (0, 1]."""

    seed: int = 0
    """Same seed, prompt and parameters: same tokens, whatever else runs beside; in [0, 2**32)."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RefusedError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise RefusedError(f"top_k={self.top_k} must be 0 (keep all tokens) or positive")
        if not 0 < self.top_p <= 1:
            raise RefusedError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.seed <= MAX_SEED:
            raise RefusedError(f"seed={self.seed} must be from 0 to {MAX_SEED}")
