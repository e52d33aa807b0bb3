"""What the next turn does: policy alone, decided from the queue, the slots and the clock. Touches no device."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..request.request import Request, Sample
from .slots import Slots


@dataclass(frozen=True)
class StepPlan:
    """One turn of the loop, in this order."""

    expired: tuple[Request, ...]
    """Requests that hold slots past their deadline: to be ended."""
    free: tuple[Sample, ...]
    """Samples whose slots are given back."""
    prefill: Request | None
    """The request to prefill and insert. One a turn: running answers wait for one prefill at most."""
    decode: bool
    """Whether a step is started over all slots."""


def plan(*, waiting: Request | None, slots: Slots, ended: Sequence[Sample], now: float, probe: bool) -> StepPlan:
    """The next turn.

    Args:
        waiting: whose turn it is in the queue. It is prefilled as soon as all its slots are free; nobody overtakes it,
            or a request for many slots might wait for ever.
        slots: as they are now, before this turn.
        ended: samples that ended by themselves since the last turn: cancelled, or at a stop string.
        now: s of time.monotonic().
        probe: whether somebody waits for a step and none is on its way: one is run over empty slots, too.
    """
    overdue = slots.overdue(now)
    free = tuple(dict.fromkeys(sample for sample in [*ended, *overdue] if sample.slot is not None))
    room = slots.free + len(free)
    prefill = waiting if waiting is not None and waiting.slots_needed <= room else None
    in_use = slots.in_use - len(free) + (prefill.slots_needed if prefill is not None else 0)
    return StepPlan(
        expired=tuple(dict.fromkeys(sample.request for sample in overdue)),
        free=free,
        prefill=prefill,
        decode=in_use > 0 or probe,
    )
