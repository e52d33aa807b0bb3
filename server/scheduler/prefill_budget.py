"""How many prompts a turn computes: short ones together, others one behind the other. Policy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from .prompt import Prompt


@dataclass(frozen=True)
class PrefillBudget:
    """What the prefills of a turn may come to."""

    batch: tuple[int, int, int]
    """See `Sizes.prefill_batch`."""
    lengths: tuple[int, ...]
    """See `Sizes.prefill_lengths`."""
    tokens: int
    """Of all pieces, padding included. The first prefill is computed whatever it comes to; 0: it alone."""

    @property
    def most_prompts(self) -> int:
        """That must be looked at (count): those that can be computed in one turn, and one that waits behind them."""
        return max(self.batch[1], self.tokens // self.lengths[0]) + 1

    def prefills(self, work: Sequence[tuple[Prompt, int]]) -> list[tuple[Prompt, ...]]:
        """Whose next pieces are computed, the pieces of one prefill together. `work`: prompts in their order, with the
        tokens that each has to go; nobody overtakes another.

        Where more wait than a turn computes, steps between them would only keep the others waiting. Where fewer do, one
        prefill is all: its first token goes out with the step behind it, and the next comes soon enough.
        """
        chosen: list[tuple[Prompt, ...]] = []
        at, spent = 0, 0
        while at < len(work):
            together = self._together(work[at:])
            spent += self._padded(together)
            if chosen and spent > self.tokens:
                break
            chosen.append(tuple(prompt for prompt, _ in together))
            at += len(together)
        return chosen if at < len(work) else chosen[:1]

    def _together(self, work: Sequence[tuple[Prompt, int]]) -> Sequence[tuple[Prompt, int]]:
        """The first, and those behind it that are computed with it. Too few of them are not: a batch costs what it
        would if it were full."""
        least, most, short = self.batch
        batch = list(takewhile(lambda one: one[1] <= short and not one[0].stands_alone, work[:most]))
        return batch if len(batch) >= max(least, 2) else work[:1]

    def _padded(self, together: Sequence[tuple[Prompt, int]]) -> int:
        """Tokens of one prefill."""
        if len(together) > 1:
            _, most, short = self.batch
            return most * short
        left = together[0][1]
        return next((length for length in self.lengths if left <= length), self.lengths[-1])
