"""Percentiles, and the ratio of two things that were timed in turns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (q from 0 to 100), interpolated between neighbours; None of nothing."""
    return float(np.percentile(values, q)) if values else None


@dataclass(frozen=True)
class Ratio:
    """Baseline time over ours, pair by pair: above 1, ours is faster."""

    pairs: tuple[float, ...]

    @classmethod
    def of(cls, ours: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> "Ratio":
        """From the step times of each pair's two blocks: the quotient of their medians."""
        return cls(tuple(float(np.median(b) / np.median(a)) for a, b in zip(ours, baseline, strict=True)))

    def json(self) -> dict[str, object]:
        """The median, the extremes and all pairs in the order they were run."""
        return {
            "ratio_p50": round(float(np.median(self.pairs)), 4),
            "ratio_min": round(min(self.pairs), 4),
            "ratio_max": round(max(self.pairs), 4),
            "pairs": [round(pair, 4) for pair in self.pairs],
        }


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares y = intercept + slope * x: (slope, intercept)."""
    gradient, intercept = np.polyfit(x, y, 1)
    return float(gradient), float(intercept)
