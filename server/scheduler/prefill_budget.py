"""How many prompts a turn computes: short ones together, others one behind the other. Policy alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .lookahead import Lookahead
from .prompt import Prompt

Work = tuple[Prompt, int]
"""A prompt, and how many tokens it has to go."""


@dataclass(frozen=True)
class PrefillBudget:
    """What the prefills of a turn may come to."""

    batch: tuple[int, int, int]
    """See `Sizes.prefill_batch`."""
    lengths: tuple[int, ...]
    """See `Sizes.prefill_lengths`."""
    tokens: int
    """Of all pieces, padding included where it counts. The first prefill is computed whatever it comes to; 0: it
    alone."""
    skips_padding: bool = False
    """See `Sizes.skips_padding`. Still a prefill counts as the shortest piece at least: it reads all weights."""

    @property
    def most_prompts(self) -> int:
        """That must be looked at (count): those that can be computed in one turn, and one that waits behind them."""
        return max(self.batch[1], self.tokens // self.lengths[0]) + 1

    def prefills(self, work: Iterable[Work]) -> list[tuple[Prompt, ...]]:
        """Whose next pieces are computed, the pieces of one prefill together. `work`: prompts in their order, looked at
        as far as the budget goes; nobody overtakes another.

        Where more wait than a turn computes, steps between them would only keep the others waiting. Where fewer do, one
        prefill is all: its first token goes out with the step behind it, and the next comes soon enough.
        """
        chosen: list[tuple[Prompt, ...]] = []
        ahead, at, spent = Lookahead(work), 0, 0
        while together := self._together(ahead, at):
            spent += self._counted(together)
            if chosen and spent > self.tokens:
                break
            chosen.append(tuple(prompt for prompt, _ in together))
            at += len(together)
            if spent >= self.tokens:
                break
        return chosen if ahead.at(at) is not None else chosen[:1]

    def _together(self, ahead: Lookahead[Work], at: int) -> list[Work]:
        """The one there, and those behind it that are computed with it; none behind the last. Too few of them are not:
        a batch costs what it would if it were full."""
        least, most, short = self.batch
        batch: list[Work] = []
        while len(batch) < most and (one := ahead.at(at + len(batch))) is not None:
            if one[1] > short or one[0].stands_alone:
                break
            batch.append(one)
        if len(batch) >= max(least, 2):
            return batch
        first = ahead.at(at)
        return [] if first is None else [first]

    def _counted(self, together: Sequence[Work]) -> int:
        """Tokens of one prefill."""
        if self.skips_padding:
            tokens = sum(min(left, self.lengths[-1]) for _, left in together)
            return max(tokens, self.lengths[0])
        if len(together) > 1:
            _, most, short = self.batch
            return most * short
        left = together[0][1]
        return next((length for length in self.lengths if left <= length), self.lengths[-1])
