"""One line on a terminal that tells every few seconds how the server does. On no terminal, nothing at all."""

import asyncio
import sys
import time
from statistics import median
from typing import TextIO

from .metrics import Metrics, Outcome

EVERY_S = 3.0


class StatusLine:
    """A line that is written over. Used from several threads: each write is one call."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` is stderr unless said otherwise."""
        self._stream = stream or sys.stderr
        self.is_shown = self._stream is not None and self._stream.isatty()

    def show(self, text: str) -> None:
        if self.is_shown:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()

    def clear(self) -> None:
        self.show("")


class Status:
    """What the line says."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tokens, self._at = 0.0, time.monotonic()

    def text(self) -> str:
        """Tokens per second are those since the last call: a step counts one for every slot in use, a prefill one."""
        tokens, now = self._value("decode_slot_steps_total") + self._value("prefill_seconds_count"), time.monotonic()
        speed = (tokens - self._tokens) / max(now - self._at, 1e-9)
        self._tokens, self._at = tokens, now
        times = self._metrics.recent_ttft_s
        ttft = f"{median(times) * 1000:.0f} ms" if times else "-"
        rejected = self._value("requests_total", outcome=Outcome.REJECTED.value)
        return (
            f"slots {self._value('slots_in_use'):.0f}/{self._value('slots'):.0f} · "
            f"queue {self._value('queue_depth'):.0f} · {speed:.0f} tokens/s · TTFT p50 {ttft} · rejected {rejected:.0f}"
        )

    async def run(self, line: StatusLine) -> None:
        """Until cancelled; leaves no line behind."""
        try:
            while True:
                await asyncio.to_thread(line.show, self.text())  # a terminal may stand still
                await asyncio.sleep(EVERY_S)
        finally:
            line.clear()

    def _value(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"slipstream_{name}", labels) or 0.0
