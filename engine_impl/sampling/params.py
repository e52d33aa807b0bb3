"""How a request wants its tokens chosen. Plain numbers: the wire and the command line build it without JAX."""

import math
from dataclasses import dataclass

from ..errors import RefusedError

MAX_SEED = 2**32 - 1
MAX_TOP_K = 2**31 - 1

MAX_LOGPROBS = 20
"""P: most alternatives whose log-probability a request may ask for, a token."""

MAX_PENALTY = 2.0
"""Largest presence and frequency penalty, either way."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Per-request sampling; the defaults are greedy decoding.

    In this order: penalties on the model's logits, temperature, top_k, top_p, min_p. Penalties also move greedy tokens.
    """

    temperature: float = 0.0
    """Softmax temperature; 0 is greedy."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens that holds this probability; in (0, 1]."""

    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability; in [0, 1], 0 keeps all."""

    seed: int = 0
    """Same seed, prompt and parameters: same tokens, whatever else runs beside; in [0, 2**32)."""

    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens of the prompt and the answer (Keskar et al.,
    arXiv 1909.05858); above 0, 1 changes nothing."""

    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has; in [-2, 2]."""

    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer has it; in [-2, 2]."""

    logprobs: int | None = None
    """Log-probabilities under the model itself, before all of the above. None: none; 0: each chosen token's; k: the k
    likeliest tokens' too; at most MAX_LOGPROBS."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RefusedError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise RefusedError(f"top_k={self.top_k} must be from 0 (keep all tokens) to {MAX_TOP_K}")
        if not 0 < self.top_p <= 1:
            raise RefusedError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise RefusedError(f"min_p={self.min_p} must be from 0 (keep all tokens) to 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise RefusedError(f"seed={self.seed} must be from 0 to {MAX_SEED}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise RefusedError(f"repetition_penalty={self.repetition_penalty} must be positive (1 is none)")
        for name in ("presence_penalty", "frequency_penalty"):
            penalty = getattr(self, name)
            if not -MAX_PENALTY <= penalty <= MAX_PENALTY:
                raise RefusedError(f"{name}={penalty} must be from {-MAX_PENALTY:g} to {MAX_PENALTY:g} (0 is none)")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RefusedError(
                f"logprobs={self.logprobs} must be from 0 (the chosen token's alone) to {MAX_LOGPROBS}, or left out"
            )
