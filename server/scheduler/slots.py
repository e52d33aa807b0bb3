"""Whose slot is whose, as arrays: what a step costs the host does not grow with the slots."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...engine_impl.sampling.params import MAX_STOP_TOKEN_IDS
from ..request.request import Request, Sample

NO_STOP = -2
"""Fills the table of stop ids; no token is negative, and -1 is a dead slot's."""


@dataclass(frozen=True)
class Roster:
    """Who sits where, from one change to the next. Frozen: a step in flight keeps the one that it was started with.

    W is the most stop ids that one request can have.
    """

    owner_B: np.ndarray
    """object: a Sample or None"""
    stop_BW: np.ndarray
    """i32, the tokens that end an owner's answer; NO_STOP where there is none"""
    logprobs_B: np.ndarray
    """i32, what each owner asked for: how many of the likeliest tokens; -1 asks for no logprobs"""

    @classmethod
    def empty(cls, slots: int, width: int) -> "Roster":
        return cls(
            np.full(slots, None, object),
            np.full((slots, width), NO_STOP, np.int32),
            np.full(slots, -1, np.int32),
        )

    def having(self, slot: int, sample: Sample | None, stop_ids: Sequence[int] = ()) -> "Roster":
        """With `sample` there, or nobody."""
        owner_B, stop_BW, logprobs_B = self.owner_B.copy(), self.stop_BW.copy(), self.logprobs_B.copy()
        logprobs = sample.request.sampling.logprobs if sample else None
        owner_B[slot] = sample
        stop_BW[slot] = NO_STOP
        stop_BW[slot, : len(stop_ids)] = stop_ids
        logprobs_B[slot] = -1 if logprobs is None else logprobs
        return replace(self, owner_B=owner_B, stop_BW=stop_BW, logprobs_B=logprobs_B)

    def stopped_B(self, token_B: np.ndarray) -> np.ndarray:
        """bool: whose token ends its answer."""
        return (token_B[:, None] == self.stop_BW).any(axis=1)

    @cached_property
    def most_logprobs(self) -> int:
        """The most that an owner asked for; -1: nobody asked."""
        return int(self.logprobs_B.max(initial=-1))

    @cached_property
    def taken(self) -> int:
        """Slots with an owner."""
        return int(np.count_nonzero(self.owner_B))

    @cached_property
    def seats(self) -> list[tuple[int, Sample]]:
        """(slot, sample) of all that are taken: the only walk over the slots, once a roster, and not by the loop."""
        return [(slot, sample) for slot, sample in enumerate(self.owner_B) if sample is not None]


class Slots:
    """The orchestrator's table of slots. One thread."""

    def __init__(self, slots: int, model_stop_ids: Sequence[int]) -> None:
        """`model_stop_ids` end every answer whose request does not ignore them."""
        self._model_stop_ids = tuple(model_stop_ids)
        self.width = MAX_STOP_TOKEN_IDS + len(self._model_stop_ids)
        self.roster = Roster.empty(slots, self.width)
        self.in_use = 0
        self._free = list(range(slots))[::-1]
        self._left_B = np.zeros(slots, np.int64)  # tokens still to be asked of the engine; 0 = free
        self._deadline_B = np.full(slots, np.inf)

    @property
    def free(self) -> int:
        """How many."""
        return len(self._free)

    def give(self, sample: Sample) -> int:
        """A slot, for the tokens after the first."""
        slot, request = self._free.pop(), sample.request
        self.roster = self.roster.having(slot, sample, self.stop_ids(request))
        self._left_B[slot] = request.max_tokens - 1
        self._deadline_B[slot] = np.inf if request.deadline is None else request.deadline
        self.in_use += 1
        sample.slot = slot
        return slot

    def take_back(self, sample: Sample) -> int:
        """The slot that it had."""
        slot = sample.slot
        assert slot is not None
        self.roster = self.roster.having(slot, None)
        self._left_B[slot], self._deadline_B[slot] = 0, np.inf
        self._free.append(slot)
        self.in_use -= 1
        sample.slot = None
        return slot

    def count_step(self) -> list[Sample]:
        """Notes a token more for every owner. Returns those for whom it was the last."""
        live_B = self._left_B > 0
        self._left_B -= live_B
        return list(self.roster.owner_B[live_B & (self._left_B == 0)])

    def overdue(self, now: float) -> list[Sample]:
        """Whose deadline (s of time.monotonic()) has passed."""
        return list(self.roster.owner_B[self._deadline_B <= now])

    def alone(self, sample: Sample) -> Roster:
        """A roster of one, for the token that a prefill brings."""
        return Roster.empty(1, self.width).having(0, sample, self.stop_ids(sample.request))

    def stop_ids(self, request: Request) -> tuple[int, ...]:
        sampling = request.sampling
        return sampling.stop_token_ids + (() if sampling.ignore_eos else self._model_stop_ids)
