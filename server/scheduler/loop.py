"""The loop that runs the engine, in a thread of its own, which alone holds the decode state and the pages:

    plan -> free -> prefill -> insert -> generate -> deliver

- plan: plan.py decides what the turn does; nothing is decided here.
- prefill, insert, generate are only started here: they run on the device, and what they give is copied back meanwhile.
  A request for several samples is prefilled once; each further sample draws its own first token from that prefix. A
  long prompt is prefilled piece by piece, a piece a turn, each with a step of the running answers behind it; or within
  that step, where the engine carries it along.
- deliver: reads the results of the turn before, so that the device never waits for the host, and hands them to the
  delivery thread, which makes text and events of them.
- free: at max_tokens as soon as the last step is started; at a stop token when it is read, one step late; at a cancel,
  a deadline or a stop string before the next step. A step in flight may then still bring tokens for the old request:
  its result keeps the roster that it was started with, so the slot's next owner never sees them.
- A sample that is pre-empted leaves its slot and pages at once, and is parked when the step in flight is read: then all
  its tokens are known, and it goes on later as though they had been its prompt.

The device runs what it is given in order. So pages can be given away while a step that reads or fills them is in
flight: what their next owner does comes behind it.

Nothing is done once per slot in Python, and no text is seen. Requests are ended by delivery alone, so each gets exactly
one last event.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ...engine_impl.errors import RefusedError
from ..delivery.delivery import Delivery
from ..errors import UnavailableError
from ..observe.metrics import Metrics
from ..request.adapter import LoadedAdapter
from ..request.request import FinishReason, Request, Sample
from .admission import Admission
from .constraints import Constraints, due_now
from .execution import Execution
from .failures import DeadError, Failures, describe, failed
from .holdings import Holdings
from .plan import Scene, StepPlan, plan
from .probes import Probes
from .prompt import Prompt
from .queue import RequestQueue
from .results import Results
from .widths import Widths

log = logging.getLogger(__name__)

TURNS_A_CHECK = 1024
"""Turns between two checks of the page tables (count)."""


class Loop(Generic[ParamsT, PrefixT, StateT]):
    """run() it in a thread. What other threads tell it: `ended`, `probes`, `closing`, and the queue."""

    def __init__(
        self,
        engine: Engine[ParamsT, PrefixT, StateT],
        params: ParamsT,
        queue: RequestQueue,
        metrics: Metrics | None,
        *,
        prefix_cache: bool = True,
        in_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`in_turn`: what every turn is made within, and what is done after one that fails."""
        self._queue, self._metrics, self._in_turn = queue, metrics, in_turn
        self._batch, self._max_adapters = engine.prefill_batch, engine.max_adapters
        self.live: set[Request] = set()
        """Taken from the queue, last event not out yet."""
        self.ended: deque[Sample] = deque()
        """Over, by a cancel or a stop string, and perhaps still in a slot."""
        self.probes = Probes()
        self.closing = False
        """Set to end the loop after its turn."""
        self.delivery = Delivery(engine.get_tokenizer(), metrics, free=self._note_ended, on_end=self.live.discard)
        self._holdings = Holdings(engine, prefix_cache=prefix_cache)
        self._widths = Widths(engine.widths_of, engine.max_concurrent_decodes)
        self._constraints = Constraints(on_made=queue.wake)
        self._failures = Failures()
        self._execution = Execution(engine, params, self._holdings)
        self._admission = Admission(
            queue,
            self._holdings,
            self.delivery,
            self._failures,
            metrics,
            live=self.live,
            bring=self._execution.bring,
        )
        self._results = Results(
            self._holdings, self._widths, self._constraints, self.delivery, self._failures, self.probes, metrics
        )
        self._newcomers = True  # whose turn it is, see Scene
        self._is_full = False  # who waits first cannot be let in now
        self._turns = 0

    def _note_ended(self, sample: Sample) -> None:
        """In delivery's thread."""
        self.ended.append(sample)
        self._queue.wake()

    @property
    def slots_in_use(self) -> int:
        return self._holdings.slots.in_use

    @property
    def slots_free(self) -> int:
        """That requests in the queue may count on: none while the first that waits finds no room."""
        return 0 if self._is_full else self._holdings.slots.free

    @property
    def adapters_on_devices(self) -> frozenset[LoadedAdapter]:
        """May be asked from another thread."""
        return self._execution.adapters

    def pages(self) -> dict[str, int]:
        """How many are free, live and cached."""
        return self._holdings.room.states()

    def start(self, *, warm_up: bool) -> None:
        """Makes the decode state; compiles everything if asked to."""
        self._execution.start(warm_up=warm_up)
        if warm_up:
            self._execution.time_steps(self._widths)

    def run(self) -> None:
        """Until `closing`. Raises DeadError when the engine keeps failing."""
        try:
            while not self.closing:
                self._queue.wait(until=self._has_work)
                try:
                    with self._in_turn():
                        self._turn()
                except DeadError:
                    raise
                except Exception as error:
                    with self._in_turn():
                        self._recover(error)
        finally:
            self._constraints.close()

    def _has_work(self) -> bool:
        """Not while all who decode wait for what their grammars allow."""
        has = self._holdings
        if self.closing or self._execution.pending or has.in_work or has.parked or self.probes or self.ended:
            return True
        return bool(has.slots.due.taken) or self._constraints.is_made

    def _turn(self) -> None:
        self._go_on()
        self._execution.take_up()
        turn = self._plan()
        self._is_full = turn.is_full
        self._free(turn)
        self._admission.let_in(turn.let_in)
        earlier, self._execution.pending = self._execution.pending, []
        prompts = [prompt for prompt in turn.prefill if prompt in self._holdings.in_work]
        due = due_now(self._holdings.slots, earlier)
        carried = self._execution.carry(prompts, due) if prompts else None
        if prompts and (error := self._prefill(prompts, carried)):
            self._failures.prefill_failed(error)
        due = due_now(self._holdings.slots, earlier)
        if carried is None and (turn.idle_step or due.taken):
            self._execution.generate(due, turn.width)
        for pending in earlier:
            self._results.read(pending)
        self._holdings.park()

    def _go_on(self) -> None:
        """Whose grammars tell what may come next. While a step runs, waiting for them costs nothing; and where none
        does, they go on together."""
        made = self._constraints.collect(self._results.step_s / 2)
        for sample in made:
            assert sample.constraint is not None
            if sample.constraint.error:
                why = f"request {sample.request.id}: {sample.constraint.error}"
                self.delivery.end(sample.request, RefusedError(why))
            elif sample.constraint.is_over:
                self.delivery.end_sample(sample)
            else:
                self._holdings.slots.go_on(sample)
                continue
            self._holdings.free(sample)
            self._holdings.parked.forget(sample)

    def _plan(self) -> StepPlan:
        self._turns += 1
        if self._turns % TURNS_A_CHECK == 0:
            self._holdings.room.check_integrity()
        apart = self._execution.computed_apart
        in_parts = {sample for prompt in apart for sample in prompt.samples}
        over = [self.ended.popleft() for _ in range(len(self.ended))]
        self.ended.extend(sample for sample in over if sample in in_parts)  # to be freed when they are stored
        most_prompts = self._batch[1]
        return plan(
            Scene(
                slots=self._holdings.slots,
                room=self._holdings.room,
                widths=self._widths,
                in_work=[prompt for prompt in self._holdings.in_work if prompt not in apart],
                parked=self._holdings.parked.waiting,
                queued=self._admission.first(most_prompts),
                ended=[sample for sample in over if sample not in in_parts],
                now=time.monotonic(),
                probe=bool(self.probes) and not any(pending.is_step for pending in self._execution.pending),
                newcomers=self._newcomers,
                batch=self._batch,
                max_adapters=self._max_adapters,
                is_computing=bool(apart),
            )
        )

    def _free(self, turn: StepPlan) -> None:
        for request in turn.expired:
            self.delivery.end(request, FinishReason.DEADLINE)
        self._holdings.give_back(turn)
        if self._metrics is not None:
            for _ in (*turn.postpone, *turn.preempt):
                self._metrics.preempted()

    def _prefill(
        self, prompts: list[Prompt], carried: PrefixT | None = None, *, at_once: bool = False
    ) -> Exception | None:
        """The next pieces. What fails, fails alone: nothing that others have was touched. Returns what went wrong."""
        self._newcomers = not self._newcomers
        try:
            pieces = self._execution.compute(prompts, carried)
        except Exception as error:
            log.exception("the prefill of requests %s failed", ", ".join(prompt.request.id for prompt in prompts))
            if len(prompts) > 1:  # whose fault it was, shows when each goes alone
                errors = [self._prefill([prompt], at_once=True) for prompt in prompts]
                return next(filter(None, errors), None)
            for prompt in prompts:
                self._holdings.drop(prompt)
                self.delivery.end(prompt.request, failed(prompt.request, error))
            return error
        self._execution.keep(pieces, at_once=at_once)
        return None

    def _recover(self, error: Exception) -> None:
        """A step failed, its state was donated and is lost: fail whoever was in it and start afresh. Who is parked had
        nothing in it."""
        live = list(self.live)  # delivery ends some meanwhile
        lost = [request for request in live if not self._holdings.parked.holds_all(request)]
        log.error("a step failed; requests %s fail with it", ", ".join(r.id for r in lost), exc_info=error)
        self._holdings.lose(lost, {*live} - {*lost})
        self._execution.lose()
        for request in lost:
            self.delivery.end(request, failed(request, error))
        self.probes.answer(UnavailableError(f"a step of the engine failed: {describe(error)}"))
        self._failures.step_failed(error)
        self._execution.start_afresh()
