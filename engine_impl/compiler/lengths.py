"""Mixes of requests by their lengths: shares of whole numbers of tokens, worked out, nothing drawn."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..errors import RefusedError

SHAREGPT_MEAN = (161, 338)
"""Mean prompt and answer of ShareGPT (tokens): Kwon et al., arXiv 2309.06180, figure 11."""
SHAREGPT_SIGMA = (1.2, 0.9)
"""Our log-normal stand-in for its spread: many short, few very long."""
SHAREGPT_LIMITS = (4, 1024)
"""Shorter and longer ones become these (tokens)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LengthMix:
    """Prompts and answers, each drawn without regard to the other.

    `share[n]` is the share of requests whose prompt, or answer, has n tokens; it sums to 1.
    """

    name: str
    prompt_share: np.ndarray
    answer_share: np.ndarray

    @property
    def prompt_mean(self) -> float:
        """tokens"""
        return _mean(self.prompt_share)

    @property
    def answer_mean(self) -> float:
        """tokens"""
        return _mean(self.answer_share)

    @property
    def longest(self) -> int:
        """Prompt and answer together (tokens)."""
        return len(self.prompt_share) + len(self.answer_share) - 2

    @property
    def live_share(self) -> np.ndarray:
        """live_share[n]: the share of the requests in a decode step that have n tokens in the cache.

        A request takes part in as many steps as its answer has tokens, so long answers are met more often than they
        are asked for. In its steps it has its prompt and 0, 1, ... tokens of its answer.
        """
        longer = 1 - np.cumsum(self.answer_share)[:-1]  # longer[n]: answers of more than n tokens
        size = len(self.prompt_share) + len(longer) - 1
        both = np.fft.rfft(self.prompt_share, size) * np.fft.rfft(longer / self.answer_mean, size)
        return np.maximum(np.fft.irfft(both, size), 0)


def length_mix(spec: str) -> LengthMix:
    """sharegpt, uniform:LOW-HIGH,LOW-HIGH or fixed:PROMPT,ANSWER (tokens; both ends included).

    Raises RefusedError for anything else.
    """
    kind, _, rest = spec.partition(":")
    if kind == "sharegpt" and not rest:
        prompt, answer = (_log_normal(*column) for column in zip(SHAREGPT_MEAN, SHAREGPT_SIGMA, strict=True))
        return LengthMix(name=spec, prompt_share=prompt, answer_share=answer)
    ranges = [_range(kind, words) for words in rest.split(",")]
    if len(ranges) != 2 or None in ranges:
        raise RefusedError(
            f"lengths={spec!r} must be sharegpt, uniform:LOW-HIGH,LOW-HIGH or fixed:PROMPT,ANSWER, prompts first "
            "(tokens, at least 1), such as uniform:100-300,1-1024"
        )
    prompt, answer = (_uniform(*of) for of in ranges if of is not None)
    return LengthMix(name=spec, prompt_share=prompt, answer_share=answer)


def _range(kind: str, words: str) -> tuple[int, int] | None:
    numbers = words.split("-")
    if not all(number.isdecimal() for number in numbers):
        return None
    match kind, [int(number) for number in numbers]:
        case "fixed", [length] if length > 0:
            return length, length
        case "uniform", [low, high] if 0 < low <= high:
            return low, high
    return None


def _uniform(low: int, high: int) -> np.ndarray:
    share = np.zeros(high + 1)
    share[low:] = 1 / (high - low + 1)
    return share


def _log_normal(mean: float, sigma: float) -> np.ndarray:
    """Rounded to whole tokens, and cut to SHAREGPT_LIMITS."""
    low, high = SHAREGPT_LIMITS
    log = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    below = np.array([0.0, *(log.cdf(math.log(n + 0.5)) for n in range(low, high)), 1.0])
    return np.concatenate([np.zeros(low), np.diff(below)])


def _mean(share: np.ndarray) -> float:
    return float(share @ np.arange(len(share)))
