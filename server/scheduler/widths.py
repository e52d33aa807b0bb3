"""How many tokens a slot the next step is computed for: what drafts came to lately, against what steps took.

A draft is likely right where the one before it was: an answer that copies goes on copying. So two shares are kept, of
drafts that were right behind a right one and behind a wrong one, and for each slot which of the two it stands behind.
Also a step of width 1 tells whether its slots' first drafts would have been right: a text that has nothing to copy
never pays for a wide step to find that out. Of an answer with a grammar the tokens that must come are known, and no
others are drafted.

What a step takes is measured, by size and width, when the engine is warmed up, and then by every step; what was
measured long ago is forgotten and measured anew. Estimates may be wrong all the same. So there is a purse: it gets what
wide steps win, and a hundredth of each narrow one, and pays what wide steps lose. While it is empty steps are narrow.
So whatever a text's drafts are, it is slower by a hundredth at most, and a few steps.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from ..delivery.result import HostResult
from ..delivery.roster import Roster

GAIN = 1.03
"""A wide step must promise so many times the tokens a second of a narrower one: estimates are noisy."""
ROW_COSTS = 0.1
"""Where no wide step of a size was ever timed, each token of the width beside the first is held to lengthen it by this
share."""
NEWEST = 0.2
"""The share of the latest step in the mean time of a width's steps."""
HELD = 2.0
"""A step counts for so many times that mean at most, and for the mean by so many at least: something else may have held
it up, or the reading of the one before it."""
KNOWN = 1000
"""After so many steps of a size what its steps took is measured anew, if none of that width was among them."""
FORGETS = 0.98
"""What an earlier draft counts, one step later."""
ALLOWED = 0.01
"""Of a narrow step's time, what wide ones may lose."""
PURSE = (-2.0, 2.0)
"""The least and the most that it holds, in times of a narrow step."""


class Widths:
    """The loop's. One thread."""

    def __init__(self, widths_of: Callable[[int], Sequence[int]], slots: int) -> None:
        """`widths_of` as in Engine."""
        self._widths_of = cache(widths_of)
        self._is_right_B = np.zeros(slots, bool)  # the slot's latest draft
        # Drafts that were right, and all: [behind a wrong one, behind a right one].
        self._right, self._all = np.array([0.0, 1.0]), np.array([1.0, 2.0])
        self._sizes = dict[int, StepTimes]()
        self._warm_s = dict[int, Mapping[int, float]]()  # of the warm-up, by slots and width

    def choose(self, roster: Roster) -> int:
        """For a step of these."""
        narrow, *wider = self._widths_of(roster.taken)
        if not wider:
            return narrow
        times = self._sizes.get(size_of(roster))
        if times is None or narrow not in times.mean_s or times.purse < 0:
            return narrow
        best, best_rate = narrow, self._tokens(roster, narrow) / times.of(narrow)
        for width in wider:
            rate = self._tokens(roster, width) / times.of(width)
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

    def warmed(self, slots: int, seconds: Mapping[int, float]) -> None:
        """What steps over nobody took, by width, of up to so many slots; the fewest first."""
        self._warm_s[slots] = seconds

    def took(self, result: HostResult, seconds: float) -> None:
        """What a step's time was."""
        roster, width = result.roster, result.width
        narrow, *wider = self._widths_of(roster.taken)
        if not wider or not roster.taken:
            return
        size = size_of(roster)
        if size not in self._sizes:
            warm_s = next((of for slots, of in self._warm_s.items() if roster.taken <= slots), dict[int, float]())
            self._sizes[size] = StepTimes(narrow, warm_s)
        self._sizes[size].add(width, seconds, float(result.count_B.sum()) / roster.taken)

    def _tokens(self, roster: Roster, width: int) -> float:
        """That a step brings, as far as can be told."""
        behind_wrong, behind_right = (self._right / np.maximum(self._all, 1e-9)).tolist()
        is_right_N = self._is_right_B[roster.slot_B[~roster.is_constrained_B]]
        rights = int(np.count_nonzero(is_right_N))
        likely = rights * behind_right + (len(is_right_N) - rights) * behind_wrong
        sure = sum(min(len(constraint.forced), width - 1) for _, constraint in roster.constrained)
        return roster.taken + sure + likely * sum(behind_right**more for more in range(width - 1))


class StepTimes:
    """Of one size, and what wide steps have won."""

    def __init__(self, narrow: int, warm_s: Mapping[int, float]) -> None:
        """`warm_s`: of the warm-up, by width."""
        self._narrow, self._warm_s = narrow, warm_s
        self.purse = 0.0
        """In times of a narrow step."""
        self._number = 0
        self._latest = dict.fromkeys(warm_s.keys() & {narrow}, 0)  # the number of each width's latest step
        self.mean_s = {width: warm_s[width] for width in self._latest}
        """By width, of those that are known; the narrow one's from the warm-up on."""

    def add(self, width: int, seconds: float, tokens: float) -> None:
        """A step was so long, and brought a slot so many tokens."""
        self._number += 1
        known_s = self.mean_s.get(width, seconds)
        self.mean_s[width] = known_s + NEWEST * (min(max(seconds, known_s / HELD), HELD * known_s) - known_s)
        self._latest[width] = self._number
        for other in [other for other, latest in self._latest.items() if latest <= self._number - KNOWN]:
            del self._latest[other], self.mean_s[other]
        if self._narrow in self.mean_s:
            won = ALLOWED if width == self._narrow else tokens - self.of(width) / self.of(self._narrow)
            least, most = PURSE
            self.purse = min(max(self.purse + won, least), most)

    def of(self, width: int) -> float:
        """A step's time (seconds): measured, or as the next width's that was, or as in the warm-up; the narrow one's is
        known."""
        if width in self.mean_s:
            return self.mean_s[width]
        narrow_s, row_costs = self.mean_s[self._narrow], ROW_COSTS
        wide = [known for known in self.mean_s if known != self._narrow]
        if wide:
            next_to = min(wide, key=lambda known: abs(known - width))
            row_costs = (self.mean_s[next_to] / narrow_s - 1) / (next_to - self._narrow)
        elif width in self._warm_s:
            return narrow_s * self._warm_s[width] / self._warm_s[self._narrow]
        return narrow_s * (1 + row_costs * (width - self._narrow))


def size_of(roster: Roster) -> int:
    """Steps of one size take about as long: the next power of two."""
    return 1 << max(roster.taken - 1, 0).bit_length()
