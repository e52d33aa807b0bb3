"""The table of slots: who has one, how many tokens are left to ask for, whose time is up."""

from collections.abc import Sequence

import numpy as np

from ...engine_impl.sampling.params import MAX_STOP_TOKEN_IDS
from ..delivery.roster import Roster
from ..request.request import Request, Sample


class Slots:
    """The loop's. One thread."""

    def __init__(self, slots: int, model_stop_ids: Sequence[int]) -> None:
        """`model_stop_ids` end every answer whose request does not ignore them."""
        self._model_stop_ids = tuple(model_stop_ids)
        self._width = MAX_STOP_TOKEN_IDS + len(self._model_stop_ids)
        self.roster = Roster.empty(slots, self._width)
        self.in_use = 0
        self._free = list(range(slots))[::-1]
        # Tokens that an answer may still get; 0 = free. An upper bound while steps are in flight: each is counted as
        # the one token that it brings at least, and settled when it is read.
        self._left_B = np.zeros(slots, np.int64)
        self._deadline_B = np.full(slots, np.inf)

    @property
    def free(self) -> int:
        """How many."""
        return len(self._free)

    def give(self, sample: Sample) -> int:
        """A slot, for the tokens after the first."""
        slot, request = self._free.pop(), sample.request
        self.roster = self.roster.having(slot, sample, self._stop_ids(request))
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
        """A step is started, which brings every owner at least one token. Returns those for whom that is the last."""
        live_B = self._left_B > 0
        self._left_B -= live_B
        return list(self.roster.owner_B[live_B & (self._left_B == 0)])

    def settle(self, roster: Roster, count_B: np.ndarray) -> list[Sample]:
        """A step of this roster is read, which brought `count_B` tokens. Returns whom it brought the last ones."""
        if count_B.max(initial=0) <= 1:
            return []  # as counted
        live_B = (self._left_B > 0) & (roster.owner_B == self.roster.owner_B)
        self._left_B -= live_B * np.maximum(count_B - 1, 0)
        ended_B = live_B & (self._left_B <= 0)
        return list(self.roster.owner_B[ended_B])

    def overdue(self, now: float) -> list[Sample]:
        """Whose deadline (s of time.monotonic()) has passed."""
        return list(self.roster.owner_B[self._deadline_B <= now])

    def alone(self, sample: Sample) -> Roster:
        """A roster of one, for the token that a prefill brings."""
        return Roster.empty(1, self._width).having(0, sample, self._stop_ids(sample.request))

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        asked = request.sampling
        return asked.stop_token_ids + (() if asked.ignore_eos else self._model_stop_ids)
