"""Answers with a grammar: which of their tokens may come next, made from the last one beside the loop.

The loop reads a step's tokens while the next step runs. Which token may stand behind a step's depends on that step's:
so an answer with a grammar takes part in every second step, and all others in each one, without waiting for it. Did the
loop wait for a step's tokens before it starts the next one, the device would stand still meanwhile, for everybody.
Where nobody else decodes there is no step between: answers with a grammar take part in each step, all together, and
wait for the host between two.

Where a grammar leaves one token alone, it need not be read to know what may follow it. A wide step brings such forced
tokens as drafts, and one more behind them, see `Constraint.forced`.

Steps of 8 ms, 7 answers without a grammar and one with, two busy cores: a token of the seven takes 8.0 to 10.3 ms (as
without the eighth: 8.1 to 10.9), and would take 9.0 to 16.5 if all waited.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from ...engine_impl.api import Allowed
from ...engine_impl.errors import RefusedError
from ..delivery.delivery import Delivery
from ..delivery.result import HostResult, PendingResult
from ..delivery.roster import Roster
from ..request.constraint import AHEAD
from ..request.request import Sample
from .holdings import Holdings
from .slots import Slots

THREADS = 4
"""That work on grammars (count); the library lets others run meanwhile. A token takes 0.1 ms, and 20 at worst, see
engine_impl/text/grammar.py: such an answer keeps a thread, and no step."""


class Constraints:
    """The loop's. close() it."""

    def __init__(self, on_made: Callable[[], object]) -> None:
        """`on_made` is called, from another thread, when there is something to collect."""
        self._on_made = on_made
        self._threads = ThreadPoolExecutor(THREADS, "grammars")
        self._at_work: set[Future[list[Sample]]] = set()

    @property
    def is_made(self) -> bool:
        """Whether there is something to collect."""
        return any(work.done() for work in self._at_work)

    def read(self, result: HostResult) -> None:
        """Takes in the tokens that were read; what may follow them is made aside."""
        work = list[tuple[Sample, list[int]]]()
        for row, constraint in result.roster.constrained:
            if result.count_B[row] and not result.stopped_B[row]:
                constraint.is_at_work = True
                work.append((result.roster.owner_B[row], result.token_BW[row, : result.count_B[row]].tolist()))
        for start in range(min(THREADS, len(work))):
            future = self._threads.submit(take, work[start::THREADS])
            self._at_work.add(future)
            future.add_done_callback(lambda _: self._on_made())

    def collect(self, wait_s: float) -> list[Sample]:
        """Whose next token may be chosen now, or whose answers are over. Waits so long for those at work (s): while a
        step runs, that costs nothing."""
        if not self._at_work:
            return []
        done, self._at_work = wait(self._at_work, wait_s)
        made = [sample for work in done for sample in work.result()]
        for sample in made:
            assert sample.constraint is not None
            sample.constraint.is_at_work = False
        return made

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def go_on(made: Sequence[Sample], holdings: Holdings, delivery: Delivery) -> None:
    """Of collect(): who goes on does so together with the others; whose answer is over, or failed, holds nothing."""
    for sample in made:
        assert sample.constraint is not None
        if sample.constraint.error:
            why = f"request {sample.request.id}: {sample.constraint.error}"
            delivery.end(sample.request, RefusedError(why))
        elif sample.constraint.is_over:
            delivery.end_sample(sample)
        else:
            holdings.slots.go_on(sample)
            continue
        holdings.free(sample)
        holdings.parked.forget(sample)


def allowed_of(roster: Roster) -> Allowed | None:
    """What a step of these may choose from; None: nobody has a grammar."""
    if not roster.constrained:
        return None
    rows, constraints = zip(*roster.constrained, strict=True)
    forced_CF = np.full((len(rows), AHEAD), -1, np.int32)
    for forced_F, one in zip(forced_CF, constraints, strict=True):
        forced_F[: len(one.forced)] = one.forced
    word_CW = np.stack([one.allowed_behind_W for one in constraints])
    return Allowed(row_C=np.array(rows, np.int32), forced_CF=forced_CF, word_CW=word_CW)


def due_now(slots: Slots, in_flight: Sequence[PendingResult]) -> Roster:
    """Whom the next step brings a token, where these are not read yet: who is due, but not a part of those with a
    grammar alone: they would take turns, and each step would bring half of them a token."""
    due = slots.due
    is_alone = len(due.constrained) == due.taken
    if due.taken and is_alone and any(result.is_step and result.roster.constrained for result in in_flight):
        return due.of(np.array([], np.int32))
    return due


def take(work: Sequence[tuple[Sample, list[int]]]) -> list[Sample]:
    """In a thread: the samples, with their tokens taken in."""
    for sample, token_ids in work:
        assert sample.constraint is not None
        sample.constraint.take(token_ids)
    return [sample for sample, _ in work]
