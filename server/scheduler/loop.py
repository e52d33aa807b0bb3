"""The loop that runs the engine, in a thread of its own, which alone holds the decode state and the pages:

    plan -> free -> prefill -> insert -> generate -> deliver

- plan: plan.py decides what the turn does; nothing is decided here.
- prefill, insert, generate are only started: they run on the device, and what they give is copied back meanwhile.
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

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..delivery.delivery import Delivery
from ..observe.metrics import Metrics
from ..request.adapter import LoadedAdapter
from ..request.events import FinishReason
from ..request.request import Request, Sample
from .admission import Admission
from .constraints import Constraints, due_now, go_on
from .execution import Execution
from .failures import DeadError, Failures
from .holdings import Holdings
from .plan import StepPlan
from .planner import Planner
from .prefills import Prefills
from .probes import Probes
from .queue import RequestQueue
from .recovery import Recovery
from .results import Results
from .widths import Widths


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
        self.live: set[Request] = set()
        """Taken from the queue, last event not out yet."""
        self.ended: deque[Sample] = deque()
        """Over, by a cancel or a stop string, and perhaps still in a slot."""
        self.probes = Probes()
        self.closing = False
        """Set to end the loop after its turn."""
        self.delivery = Delivery(engine.get_tokenizer(), metrics, free=self._note_ended, on_end=self.live.discard)
        self._holdings = Holdings(engine, prefix_cache=prefix_cache)
        self._widths = Widths(engine.widths_of, engine.sizes.slots)
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
        self._prefills = Prefills(self._execution, self._holdings, self.delivery, self._failures)
        self._planner = Planner(
            engine, self._execution, self._holdings, self._admission, self._widths, self.probes, self.ended
        )
        self._recovery = Recovery(self._execution, self._holdings, self.delivery, self.probes, self._failures)
        self._is_full = False  # who waits first cannot be let in now

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
                        self._recovery.recover(error, self.live)
        finally:
            self._constraints.close()

    def _has_work(self) -> bool:
        """Not while all who decode wait for what their grammars allow."""
        has = self._holdings
        if self.closing or self._execution.pending or has.in_work or has.parked or self.probes or self.ended:
            return True
        return bool(has.slots.due.taken) or self._constraints.is_made

    def _turn(self) -> None:
        go_on(self._constraints.collect(self._results.step_s / 2), self._holdings, self.delivery)
        self._execution.take_up()
        turn = self._planner.next()
        self._is_full = turn.is_full
        self._free(turn)
        self._admission.let_in(turn.let_in)
        earlier, self._execution.pending = self._execution.pending, []
        is_carried = self._prefills.run(turn.prefills, earlier)
        due = due_now(self._holdings.slots, earlier)
        if not is_carried and (turn.idle_step or due.taken):
            self._execution.generate(due, turn.width)
        for pending in earlier:
            self._results.read(pending)
        self._holdings.park()

    def _free(self, turn: StepPlan) -> None:
        for request in turn.expired:
            self.delivery.end(request, FinishReason.DEADLINE)
        self._holdings.give_back(turn)
        if self._metrics is not None:
            for _ in (*turn.postpone, *turn.preempt):
                self._metrics.preempted()
