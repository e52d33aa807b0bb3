"""The table of slots: who has one, what his text is, how many tokens are left to ask for, whose time is up."""

from collections.abc import Sequence

import numpy as np

from ...engine_impl.sampling.params import MAX_STOP_TOKEN_IDS
from ..delivery.result import HostResult
from ..delivery.roster import Roster
from ..request.request import Request, Sample

NO_SLOT = -1
"""In the roster of samples that have none."""


class Slots:
    """The loop's. One thread. A sample reserves its slot, and decodes from when it is seated."""

    def __init__(self, slots: int, model_stop_ids: Sequence[int], *, cache_length: int) -> None:
        """`model_stop_ids` end every answer whose request does not ignore them. `cache_length`: of a text (tokens)."""
        self._model_stop_ids = tuple(model_stop_ids)
        self._stop_width = MAX_STOP_TOKEN_IDS + len(self._model_stop_ids)
        self._cache_length = cache_length
        self.roster = Roster.empty(slots, self._stop_width)
        """Who decodes."""
        self.live = self.roster.of(np.array([], np.int32))
        """The same, of the slots that have an owner alone."""
        self._free = list(range(slots))[::-1]
        self._slots = slots
        # Tokens that an answer may still get; 0 = nobody decodes. An upper bound while steps are in flight: each is
        # counted as the one token that it brings at least, and settled when it is read.
        self._left_B = np.zeros(slots, np.int64)
        # Rows in the cache. An upper bound likewise: a step in flight counts as the most that it may bring.
        self._rows_B = np.zeros(slots, np.int64)
        self._text_BS = np.zeros((slots, cache_length), np.int32)  # the system gives memory to what is written
        self._known_B = np.zeros(slots, np.int64)  # tokens of the text that were read
        self._deadline_B = np.full(slots, np.inf)
        self._waits_B = np.zeros(slots, bool)  # which of its tokens may come next is not known yet

    @property
    def free(self) -> int:
        """How many."""
        return len(self._free)

    @property
    def due(self) -> Roster:
        """Of those who decode, whom the next step can bring a token: one whose answer has a grammar waits until its
        last token was read, see constraints.py."""
        if not self._waits_B.any():
            return self.live
        decodes_B = self.roster.owner_B != None  # noqa: E711
        return self.roster.of(np.flatnonzero(decodes_B & ~self._waits_B).astype(np.int32))

    @property
    def in_use(self) -> int:
        """How many."""
        return self._slots - self.free

    def reserve(self, sample: Sample) -> int:
        """A slot, in which the sample does not decode yet."""
        sample.slot = self._free.pop()
        return sample.slot

    def seat(self, sample: Sample, text_T: np.ndarray) -> None:
        """The sample decodes from now on. The rows of `text_T` (i32, prompt and what of the answer there is) are in
        the cache; the token behind them is chosen and will be read."""
        slot, request, known = sample.slot, sample.request, len(text_T)
        assert slot is not None
        self._change(slot, sample)
        self._text_BS[slot, :known] = text_T
        self._rows_B[slot] = self._known_B[slot] = known
        self._left_B[slot] = request.max_tokens - (known - len(request.prompt_ids)) - 1
        self._deadline_B[slot] = np.inf if request.deadline is None else request.deadline
        self._waits_B[slot] = sample.constraint is not None

    def take_back(self, sample: Sample) -> int:
        """The slot that it had."""
        slot = sample.slot
        assert slot is not None
        self._change(slot, None)
        self._left_B[slot], self._deadline_B[slot], self._waits_B[slot] = 0, np.inf, False
        self._free.append(slot)
        sample.slot = None
        return slot

    def text(self, sample: Sample) -> np.ndarray:
        """Prompt and answer of a sample that decodes, as far as they were read (i32, a copy). All of it but the last
        token has its rows in the cache."""
        return self._text_BS[sample.slot, : self._known_B[sample.slot]].copy()

    def rows_wanted(self, width: int) -> np.ndarray:
        """How many rows each live slot may have behind a step that brings it at most so many tokens."""
        rows_N = self._rows_B[self.live.slot_B] + width
        return np.minimum(rows_N, self._cache_length)

    def go_on(self, sample: Sample) -> None:
        """What may come next is known of a sample that waited for it."""
        if sample.slot is not None:
            self._waits_B[sample.slot] = False

    def count_step(self, roster: Roster, width: int) -> list[Sample]:
        """A step of these is started, which brings each at least one token and at most `width`. Returns those for whom
        that is the last."""
        slot_M = roster.slot_B[self._left_B[roster.slot_B] > 0]
        self._left_B[slot_M] -= 1
        self._rows_B[slot_M] += width
        self._waits_B[roster.slot_B] = roster.is_constrained_B
        return list(self.roster.owner_B[slot_M[self._left_B[slot_M] == 0]])

    def read(self, result: HostResult, *, counted: int) -> list[Sample]:
        """Takes in what was read. Returns whom a step brought the last tokens, which were not counted as such.

        `counted`: the width by which `count_step` counted the step, which may have been a narrower one; 0: a prefill's.
        """
        roster, count_N = result.roster, result.count_B
        seated_N = (roster.owner_B == self.roster.owner_B[roster.slot_B]) & (self._left_B[roster.slot_B] > 0)
        slot_M, count_M, token_MW = roster.slot_B[seated_N], count_N[seated_N], result.token_BW[seated_N]
        for step in range(int(count_M.max(initial=0))):
            brought_M = count_M > step
            at_M = np.minimum(self._known_B[slot_M] + step, self._cache_length - 1)
            self._text_BS[slot_M[brought_M], at_M[brought_M]] = token_MW[brought_M, step]
        self._known_B[slot_M] = np.minimum(self._known_B[slot_M] + count_M, self._cache_length)
        if not counted:
            return []
        self._rows_B[slot_M] += count_M - counted
        self._left_B[slot_M] = np.maximum(self._left_B[slot_M] - np.maximum(count_M - 1, 0), 0)
        return list(self.roster.owner_B[slot_M[self._left_B[slot_M] == 0]])

    def overdue(self, now: float) -> list[Sample]:
        """Who decodes though his deadline (s of time.monotonic()) has passed."""
        return list(self.roster.owner_B[self._deadline_B <= now])

    def of(self, samples: Sequence[Sample | None]) -> Roster:
        """A roster of these, for the tokens that a prefill brings; None is a row of nobody's."""
        roster = Roster.empty(len(samples), self._stop_width)
        roster.slot_B[:] = NO_SLOT
        for row, sample in enumerate(samples):
            if sample is not None:
                roster = roster.having(row, sample, self._stop_ids(sample.request))
                roster.slot_B[row] = NO_SLOT if sample.slot is None else sample.slot
        return roster

    def _change(self, slot: int, sample: Sample | None) -> None:
        self.roster = self.roster.having(slot, sample, self._stop_ids(sample.request) if sample else ())
        self.live = self.roster.of(np.flatnonzero(self.roster.owner_B != None).astype(np.int32))  # noqa: E711

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        asked = request.sampling
        return asked.stop_token_ids + (() if asked.ignore_eos else self._model_stop_ids)
