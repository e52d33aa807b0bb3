"""Results are read, one turn after they were started, and whoever has to know of them is told."""

import time

import numpy as np

from ..delivery.delivery import Delivery
from ..delivery.result import HostResult, PendingResult
from ..observe.metrics import Metrics
from .constraints import Constraints
from .failures import Failures
from .holdings import Holdings
from .probes import Probes
from .widths import Widths


class Results:
    """The loop's. One thread."""

    def __init__(
        self,
        holdings: Holdings,
        widths: Widths,
        constraints: Constraints,
        delivery: Delivery,
        failures: Failures,
        probes: Probes,
        metrics: Metrics | None,
    ) -> None:
        self._holdings, self._widths, self._constraints, self._delivery = holdings, widths, constraints, delivery
        self._failures, self._probes, self._metrics = failures, probes, metrics
        self._read_at = 0.0  # when the latest was read (s of time.monotonic())
        self.step_s = 0.0
        """What the latest step took (seconds)."""

    def read(self, pending: PendingResult) -> None:
        """Waits for the device. Raises what went wrong there."""
        result = pending.read()
        self._count(pending, result)
        if result is None:
            return
        holdings = self._holdings
        last = holdings.slots.read(result, counted=pending.width if pending.is_step else 0)
        self._widths.read(result)
        if pending.is_step and self._metrics is not None:
            count_drafts(self._metrics, result)
        holdings.parked.read(result)
        self._constraints.read(result)
        for sample in (*last, *result.roster.owner_B[result.stopped_B]):
            holdings.free(sample)
        self._delivery.post(result)

    def _count(self, pending: PendingResult, result: HostResult | None) -> None:
        """A result that was read is a success. It took the device from the one before it until now."""
        now = time.monotonic()
        duration_s, self._read_at = now - max(pending.started, self._read_at), now
        self._failures.worked(is_step=pending.is_step)
        if pending.is_step:
            self.step_s = duration_s
            if result is not None and pending.is_timed:
                self._widths.took(pending.roster, pending.width, result.width, duration_s)
            self._probes.answer()
        if self._metrics is not None:
            if pending.is_step:
                self._metrics.step(duration_s, slots=pending.roster.taken)
            elif pending.is_timed:
                self._metrics.prefill(duration_s)


def count_drafts(metrics: Metrics, result: HostResult) -> None:
    """Of a step."""
    rows = int(np.count_nonzero(result.count_B))
    if result.drafted_B is None or result.agreed_B is None or not rows:
        return
    asked_B = np.minimum(result.drafted_B, result.width - 1)
    accepted_B = np.minimum(result.agreed_B, asked_B)
    metrics.tokens(result.count_B.sum() / rows)
    metrics.drafts(accepted=int(accepted_B.sum()), rejected=int((asked_B - accepted_B).sum()))
