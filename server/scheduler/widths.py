"""How many tokens a slot the next step is computed for: what drafts came to lately, against what steps took.

A draft is likely right where the one before it was: an answer that copies goes on copying. So two shares are kept, of
drafts that were right behind a right one and behind a wrong one, and for each slot which of the two it stands behind.
Also a step of width 1 tells whether its slots' first drafts would have been right: a text that has nothing to copy
never pays for a wide step to find that out. Of an answer with a grammar the tokens that must come are known, and no
others are drafted.
"""

from collections.abc import Sequence

import numpy as np

from ..delivery.result import HostResult
from ..delivery.roster import Roster

GAIN = 1.03
"""A wide step must promise so many times the tokens a second of a narrower one: estimates are noisy."""
ROW_COSTS = 0.1
"""Before it was measured, each token of the width beside the first is held to lengthen a step by this share."""
FADES = 0.005
"""What was measured of a width counts by this share less with each step of another: it is tried again in the end."""
NEWEST = 0.2
"""The share of the latest step in the mean time of a width's steps."""
FORGETS = 0.98
"""What an earlier draft counts, one step later."""


class Widths:
    """The loop's. One thread."""

    def __init__(self, widths: Sequence[int], slots: int) -> None:
        """`widths` as in Engine."""
        self._widths = widths
        self._is_right_B = np.zeros(slots, bool)  # the slot's latest draft
        # Drafts that were right, and all: [behind a wrong one, behind a right one].
        self._right, self._all = np.array([0.0, 1.0]), np.array([1.0, 2.0])
        self._step_s: dict[tuple[int, int], float] = {}  # mean, by (size, width)
        self._counts: dict[tuple[int, int], float] = {}  # how much that counts
        self._widest: dict[int, int] = {}  # that the engine has, by size, where it took a narrower step than asked

    @property
    def are_drafts(self) -> bool:
        """Whether anything drafts."""
        return self._widths[-1] > 1

    def choose(self, roster: Roster) -> int:
        """For a step of these."""
        narrow, *wider = self._widths
        if not wider or ((size := size_of(roster)), narrow) not in self._step_s:
            return narrow
        best, best_rate = narrow, self._tokens(roster, narrow) / self._seconds(size, narrow)
        for width in wider:
            if width > self._widest.get(size, width):
                break
            rate = self._tokens(roster, width) / self._seconds(size, width)
            if rate > best_rate * GAIN:
                best, best_rate = width, rate
        return best

    def read(self, result: HostResult) -> None:
        """What became of a step's drafts."""
        if result.agreed_B is None:
            return
        roster = result.roster
        is_read_N = (result.count_B > 0) & ~roster.is_constrained_B
        slot_N, agreed_N = roster.slot_B[is_read_N], result.agreed_B[is_read_N]
        was_right_N, is_right_N = self._is_right_B[slot_N], agreed_N > 0
        ends_N = is_right_N & (agreed_N < result.width)  # a run that ends within the step ends with a wrong one
        self._right *= FORGETS
        self._all *= FORGETS
        for behind in (0, 1):
            of_N = was_right_N == bool(behind)
            self._right[behind] += np.count_nonzero(is_right_N & of_N)
            self._all[behind] += np.count_nonzero(of_N)
        more = np.maximum(agreed_N - 1, 0).sum()
        self._right[1] += more
        self._all[1] += more + np.count_nonzero(ends_N)
        self._is_right_B[slot_N] = agreed_N == result.width

    def took(self, roster: Roster, asked: int, width: int, seconds: float) -> None:
        """A step of these, which was `width` wide where `asked` was chosen."""
        if not self.are_drafts:
            return
        size = size_of(roster)
        if width < asked:
            self._widest[size] = width
        known_s = self._step_s.get((size, width), seconds)
        self._step_s[size, width] = known_s + NEWEST * (seconds - known_s)
        for other in self._widths:
            self._counts[size, other] = 1 if other == width else self._counts.get((size, other), 0) * (1 - FADES)

    def _tokens(self, roster: Roster, width: int) -> float:
        """That a step brings, as far as can be told."""
        behind_wrong, behind_right = (self._right / np.maximum(self._all, 1e-9)).tolist()
        is_right_N = self._is_right_B[roster.slot_B[~roster.is_constrained_B]]
        rights = int(np.count_nonzero(is_right_N))
        likely = rights * behind_right + (len(is_right_N) - rights) * behind_wrong
        sure = sum(min(len(constraint.forced), width - 1) for _, constraint in roster.constrained)
        return roster.taken + sure + likely * sum(behind_right**more for more in range(width - 1))

    def _seconds(self, size: int, width: int) -> float:
        narrow = self._widths[0]
        unmeasured_s = self._step_s[size, narrow] * (1 + ROW_COSTS * (width - narrow))
        if width == narrow:
            return unmeasured_s
        measured_s = self._step_s.get((size, width), unmeasured_s)
        return unmeasured_s + self._counts.get((size, width), 0) * (measured_s - unmeasured_s)


def size_of(roster: Roster) -> int:
    """Steps of one size take about as long: the next power of two."""
    return 1 << max(roster.taken - 1, 0).bit_length()
