"""From what became of the requests to the numbers of a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.stats import percentile
from .caller import Record


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a good answer is (ms); None asks for nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything is asked for."""
        return (self.ttft_ms, self.tpot_ms, self.e2e_ms) != (None, None, None)

    def is_met(self, record: Record) -> bool:
        """A latency that an answer does not have (no second token, no TPOT) is met."""
        limits = ((self.ttft_ms, record.ttft_ms), (self.tpot_ms, record.tpot_ms), (self.e2e_ms, record.e2e_ms))
        return all(limit is None or value is None or value <= limit for limit, value in limits)


def report(blocks: Sequence[Sequence[Record]], slo: Slo) -> dict[str, Any]:
    """Numbers of one load, which was run in one block or in several. Latencies are those of completed requests; the
    time is each block's, from its first request's due moment to its last one's end. Goodput is null without an SLO,
    cached tokens where the server does not tell them."""
    records = [record for block in blocks for record in block]
    completed = [record for record in records if record.status == "completed"]
    seconds = sum(max(record.end for record in block) - min(record.due for record in block) for block in blocks)
    tokens = sum(record.tokens for record in completed)
    cached = [record.cached_tokens for record in completed if record.cached_tokens is not None]
    good = sum(slo.is_met(record) for record in completed)
    failed = [record for record in records if record.status == "failed"]
    return {
        "requests": len(records),
        "completed": len(completed),
        "rejected": sum(record.status == "rejected" for record in records),
        "failed": len(failed),
        "first_failure": failed[0].detail if failed else None,
        "seconds": round(seconds, 4),
        "prompt_tokens": sum(record.prompt_tokens for record in completed),
        "cached_tokens": sum(cached) if cached else None,
        "output_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(completed) / seconds, 4),
        "goodput_requests_per_second": round(good / seconds, 4) if slo.is_set else None,
        "ttft_ms": _latency([record.ttft_ms for record in completed]),
        "tpot_ms": _latency([record.tpot_ms for record in completed]),
        "itl_ms": _latency([gap for record in completed for gap in record.itl_ms]),
        "e2e_ms": _latency([record.e2e_ms for record in completed]),
    }


def _latency(values: Sequence[float | None]) -> dict[str, float | None]:
    """Percentiles of those there are."""
    known = [value for value in values if value is not None]
    percentiles = {f"p{q}": percentile(known, q) for q in (50, 90, 99)}
    return {name: None if value is None else round(value, 3) for name, value in percentiles.items()}
