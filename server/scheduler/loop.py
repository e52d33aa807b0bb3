"""The loop that runs the engine, in a thread of its own, which alone holds the decode state:

    plan -> free -> prefill -> insert -> generate -> deliver

- plan: plan.py decides what the turn does; nothing is decided here.
- prefill, insert, generate are only started here: they run on the device, and what they give is copied back meanwhile.
  A request for several samples is prefilled once; each further sample draws its own first token from that prefix.
- deliver: reads the results of the turn before, so that the device never waits for the host, and hands them to the
  delivery thread, which makes text and events of them.
- free: at max_tokens as soon as the last step is started; at a stop token when it is read, one step late; at a cancel,
  a deadline or a stop string before the next step. A step in flight may then still bring tokens for the old request:
  its result keeps the roster that it was started with, so the slot's next owner never sees them.

Nothing is done once per slot in Python, and no text is seen. Requests are ended by delivery alone, so each gets exactly
one last event.
"""

import logging
import time
from collections import deque
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..delivery.delivery import Delivery
from ..delivery.result import PendingResult
from ..errors import FailedError, UnavailableError
from ..observe.metrics import Metrics
from ..request.request import FinishReason, Request, Sample
from .failures import DeadError, Failures, describe
from .plan import StepPlan, plan
from .prefill import start_samples
from .probes import Probes
from .queue import RequestQueue
from .slots import Slots

log = logging.getLogger(__name__)


class Loop(Generic[ParamsT, PrefixT, StateT]):
    """run() it in a thread. What other threads tell it: `ended`, `probes`, `closing`, and the queue."""

    def __init__(
        self,
        engine: Engine[ParamsT, PrefixT, StateT],
        params: ParamsT,
        queue: RequestQueue,
        metrics: Metrics | None,
    ) -> None:
        self._engine, self._params, self._queue, self._metrics = engine, params, queue, metrics
        self._stop_ids = sorted(engine.get_tokenizer().stop_ids)
        self.live: set[Request] = set()
        """Taken from the queue, last event not out yet."""
        self.ended: deque[Sample] = deque()
        """Over, by a cancel or a stop string, and perhaps still in a slot."""
        self.probes = Probes()
        self.closing = False
        """Set to end the loop after its turn."""
        self.delivery = Delivery(engine.get_tokenizer(), metrics, free=self.ended.append, on_end=self.live.discard)
        self._slots = self._no_slots_taken()
        self._pending: list[PendingResult] = []  # what the next turn delivers
        self._failures = Failures()
        self._read_at = 0.0  # when the latest result was read (s of time.monotonic())
        self._state: StateT  # from start() on

    @property
    def slots_in_use(self) -> int:
        return self._slots.in_use

    @property
    def slots_free(self) -> int:
        return self._slots.free

    def start(self, *, warm_up: bool) -> None:
        """Makes the decode state; compiles everything if asked to."""
        self._state = self._engine.init_decode_state()
        if warm_up:
            self._state = self._engine.warm_up(self._params, self._state)

    def run(self) -> None:
        """Until `closing`. Raises DeadError when the engine keeps failing."""
        while not self.closing:
            self._queue.wait(until=self._has_work)
            try:
                self._turn()
            except DeadError:
                raise
            except Exception as error:
                self._recover(error)

    def _has_work(self) -> bool:
        return self.closing or bool(self._slots.in_use or self._pending or self.probes)

    def _turn(self) -> None:
        turn = self._plan()
        self._free(turn)
        if turn.prefill is not None and not self._prefill(turn.prefill):
            return  # there is no such request any more: plan anew
        earlier, self._pending = self._pending, self._generate() if turn.decode else []
        for pending in earlier:
            self._deliver(pending)

    def _plan(self) -> StepPlan:
        ended = [self.ended.popleft() for _ in range(len(self.ended))]
        probe = bool(self.probes) and not any(pending.is_step for pending in self._pending)
        return plan(waiting=self._queue.first(), slots=self._slots, ended=ended, now=time.monotonic(), probe=probe)

    def _free(self, turn: StepPlan) -> None:
        for request in turn.expired:
            self.delivery.end(request, FinishReason.DEADLINE)
        for sample in turn.free:
            self._free_slot(sample)

    def _prefill(self, request: Request) -> bool:
        """Prefill and insert. False: the request left the queue by itself, or failed; no other was touched."""
        if not self._queue.take(request):
            return False
        self.live.add(request)
        try:
            started = start_samples(self._engine, self._params, request, self._slots)
        except Exception as error:
            log.exception("the prefill of request %s failed", request.id)
            self._fail(request, error)
            self._failures.prefill_failed(error)
            return False
        for sample, (prefix, pending) in zip(request.samples, started, strict=True):
            self._pending.append(pending)
            if request.max_tokens > 1:
                self._state = self._engine.insert(prefix, self._state, self._slots.give(sample))
        return True

    def _generate(self) -> list[PendingResult]:
        started = time.monotonic()
        self._state, result = self._engine.generate(self._params, self._state)
        pending = PendingResult(result, self._slots.roster, is_step=True, started=started)
        for sample in self._slots.count_step():
            self._free_slot(sample)
        return [pending]

    def _deliver(self, pending: PendingResult) -> None:
        result = pending.read()
        self._count(pending)
        for sample in result.roster.owner_B[result.stopped_B]:
            self._free_slot(sample)
        if pending.is_step:
            for sample in self._slots.settle(result.roster, result.count_B):
                self._free_slot(sample)
        self.delivery.post(result)

    def _free_slot(self, sample: Sample) -> None:
        if sample.slot is not None:
            self._state = self._engine.free(self._state, self._slots.take_back(sample))

    def _count(self, pending: PendingResult) -> None:
        """A result that was read is a success. It took the device from the one before it until now."""
        now = time.monotonic()
        duration_s, self._read_at = now - max(pending.started, self._read_at), now
        self._failures.worked(is_step=pending.is_step)
        if pending.is_step:
            self.probes.answer()
        if self._metrics is not None:
            if pending.is_step:
                self._metrics.step(duration_s, slots=pending.roster.taken)
            elif pending.roster.owner_B[0].index == 0:  # the other samples' first tokens come from the same prefill
                self._metrics.prefill(duration_s)

    def _recover(self, error: Exception) -> None:
        """A step failed, its state was donated and is lost: fail whoever was in it and start afresh."""
        failed = list(self.live)
        log.error("a step failed; requests %s fail with it", ", ".join(r.id for r in failed), exc_info=error)
        self._pending, self._slots = [], self._no_slots_taken()
        del self._state  # before the new one is made: two may not fit the device
        for request in failed:
            for sample in request.samples:
                sample.slot = None
            self._fail(request, error)
        self.probes.answer(UnavailableError(f"a step of the engine failed: {describe(error)}"))
        self._failures.step_failed(error)
        self._state = self._engine.init_decode_state()

    def _no_slots_taken(self) -> Slots:
        return Slots(self._engine.max_concurrent_decodes, self._stop_ids)

    def _fail(self, request: Request, error: Exception) -> None:
        self.delivery.end(request, FailedError(f"request {request.id} failed in the engine: {describe(error)}"))
