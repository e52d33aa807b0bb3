"""How many requests of a mix of lengths decode together in a pool of pages, and the tokens/s that the chips allow them.

Arithmetic, nothing is compiled or drawn. With n requests in a step, E their mean, per chip:

    pool     n E[pages held] + z sqrt(n) sd[pages held] = pages of the pool, z = 2.33: a sum of n independent requests
             is above it in 1 % of moments, and then one has to be pre-empted
    step     max(weights' bytes / bandwidth, rows * a row's multiplications / peak) + n E[pages read] * a page's bytes
             / bandwidth: attention's bytes are not moved while the weights' are
    rows     n of decoding alone; with the prompts of the requests that come after them n (1 + E[prompt] / E[answer])
    ceiling  n / step

What a chip does not reach: the peak at few rows; the time between programs; attention of prompts.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..config import TILE
from ..errors import RefusedError
from .budget import Budget
from .lengths import LengthMix

OVERFLOW = 0.01
"""Share of the moments in which the requests' pages may be more than the pool has."""


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What a step costs one chip (seconds)."""

    weights: float
    """all weights from HBM"""
    row: float
    """one row through all matrices"""
    page: float
    """one page from HBM, of all layers"""

    @classmethod
    def of(cls, budget: Budget) -> "StepCosts":
        """By a plan's bytes and its chip's rates."""
        bandwidth = budget.chip.hbm_bandwidth
        return cls(
            weights=budget.read_bytes / bandwidth,
            row=budget.row_seconds,
            page=budget.cache_bytes / budget.engine.layout.pages / bandwidth,
        )

    def step(self, rows: float, pages: float) -> float:
        """Of so many rows, whose attention reads so many pages."""
        return max(self.weights, rows * self.row) + pages * self.page


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """A pool under a mix of lengths."""

    lengths: str
    prompt_tokens: float
    answer_tokens: float
    """means of the requests that are sent"""
    live_tokens: float
    """mean of what a request has in the cache while it decodes"""
    pool_tokens: int
    page_rows: int
    requests: int
    """decode together in the pool, their pages given as they grow"""
    whole_requests: int
    """had each the pages of the mix's longest request from the start"""
    running: int
    """`requests`, at most the slots; the numbers below are of so many"""
    step_ms: float
    """decoding alone"""
    decode_tokens_per_second: float
    """decoding alone"""
    tokens_per_second_ceiling: float
    """with the multiplications of their prompts"""


def headroom(
    mix: LengthMix,
    costs: StepCosts,
    *,
    pages: int,
    page_rows: int,
    slots: int,
    windows: tuple[int | None, ...] = (None,),
) -> Headroom:
    """Of a pool of `pages` pages; `windows` as ModelConfig.windows has them, one a layer or one for all."""
    live_share = mix.live_share
    live = np.arange(len(live_share))
    held = live // page_rows + 1  # the step's own row needs its place too
    read_mean = float(np.mean([live_share @ _pages_read(live, page_rows, window) for window in windows]))
    requests = fitting(live_share, held, pages)
    running = min(requests, slots)
    decoding = costs.step(running, running * read_mean)
    all_rows = running * (1 + mix.prompt_mean / mix.answer_mean)
    return Headroom(
        lengths=mix.name,
        prompt_tokens=mix.prompt_mean,
        answer_tokens=mix.answer_mean,
        live_tokens=float(live_share @ live),
        pool_tokens=pages * page_rows,
        page_rows=page_rows,
        requests=requests,
        whole_requests=pages // -(-mix.longest // page_rows),
        running=running,
        step_ms=decoding * 1e3,
        decode_tokens_per_second=running / decoding,
        tokens_per_second_ceiling=running / costs.step(all_rows, running * read_mean),
    )


def headroom_of(budget: Budget, mix: LengthMix) -> Headroom:
    """Of a plan's engine, with its pool, its slots and its chips.

    Raises RefusedError where requests of the mix are longer than the cache length.
    """
    layout = budget.engine.layout
    if mix.longest > layout.length:
        raise RefusedError(
            f"lengths={mix.name!r} has requests of {mix.longest} tokens, and cache_length={layout.length}; add "
            f"--cache-length {-(-mix.longest // TILE) * TILE}, or ask for shorter ones"
        )
    return headroom(
        mix,
        StepCosts.of(budget),
        pages=layout.pages,
        page_rows=layout.page_rows,
        slots=layout.slots,
        windows=budget.engine.model.config.window_of_layer,
    )


def fitting(share: np.ndarray, held: np.ndarray, pages: int) -> int:
    """The most independent requests, each of which holds `held[n]` pages with the chance `share[n]`, that together hold
    more than `pages` in OVERFLOW of the moments; their sum is taken as normal. One, where the longest fits."""
    mean = float(share @ held)
    deviation = math.sqrt(max(0.0, float(share @ held**2) - mean**2))
    spread = NormalDist().inv_cdf(1 - OVERFLOW) * deviation
    # mean n + spread sqrt(n) = pages, solved for sqrt(n)
    root = (math.sqrt(spread**2 + 4 * mean * pages) - spread) / (2 * mean)
    return max(math.floor(root**2 + 1e-9), int(held[-1] <= pages))


def _pages_read(live: np.ndarray, page_rows: int, window: int | None) -> np.ndarray:
    """Pages with a row that a layer's step sees, its own row not among them."""
    first = np.zeros_like(live) if window is None else np.maximum(live - (window - 1), 0)
    return -(-live // page_rows) - first // page_rows
