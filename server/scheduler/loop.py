"""The orchestrator: requests become slots, slots become tokens. One thread, one loop, which owns the decode state:

    admit -> prefill -> insert -> generate -> deliver -> free

- admit: whose turn it is in the queue, if its slots are free. One a turn: running answers wait for one prefill at most.
- prefill, insert, generate: only started here, they run on the device; what they give is copied back meanwhile. A
  request for several samples is prefilled once; each further sample draws its own first token from that prefix.
- deliver: reads the tokens of the turn before, so that the device never waits for the host, and hands them to the
  delivery thread, which makes text and events of them.
- free: at max_tokens as soon as the last step is started; at a stop token when it is read, one step late; at a cancel,
  a deadline or a stop string before the next step. A step in flight may then still bring a token for the old request:
  a Flight remembers whose tokens it carries, so the slot's next owner never sees them.

Nothing here is done once a slot in Python, and no text is seen: see slots.py and delivery.py. Requests are ended by
delivery alone, so each gets exactly one last event.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..delivery.delivery import Delivery
from ..delivery.flight import Flight
from ..errors import DeadlineError, FailedError, QueueFullError, UnavailableError
from ..observe.metrics import Metrics
from ..request.request import FinishReason, Request, Sample, check_slots
from . import probes
from .queue import RequestQueue, is_overdue
from .slots import Slots

if TYPE_CHECKING:
    from ...engine_impl.engine import Engine

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures without a success between them (count), after which the engine is given up."""

CLOSE_S = 10.0
"""How long close() waits for a turn to end (seconds); the thread is a daemon and cannot hold the process."""

DEADLINE_SLACK_S = 0.05
"""A cancel this close to the deadline is the deadline's doing (seconds): the caller's clock was started before ours."""

SWITCH_S = 0.0005
"""How long a busy thread keeps the interpreter from the loop (seconds; Python's own: 0.005). The loop asks for it a few
times a step. 256 streams over gRPC, steps of 8 ms, 2 busy cores: 11.0 ms from step to step, with Python's own 13.0."""

STOPPING = "the server is stopping"


class DeadError(Exception):
    """The engine keeps failing."""


class Orchestrator:
    """start() it, submit() requests from any thread, close() it."""

    def __init__(
        self,
        engine: "Engine",
        params: Any,
        *,
        max_queued: int,
        max_queued_tokens: int | None = None,
        metrics: Metrics | None = None,
        warm_up: bool = True,
        on_ready: Callable[[], object] = lambda: None,
        on_dead: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """`on_ready` and `on_dead(reason)` are called from the orchestrator's thread."""
        self._engine, self._params, self._metrics = engine, params, metrics
        self._warm_up, self._on_ready, self._on_dead = warm_up, on_ready, on_dead
        self._tokenizer = engine.get_tokenizer()
        self._queue = RequestQueue(
            *(max_queued, max_queued_tokens), slots=engine.max_concurrent_decodes, free_slots=lambda: self._slots.free
        )
        self._delivery = Delivery(self._tokenizer, metrics, free=self._ended_early, on_end=self._forget)
        self._slots = self._no_slots_taken()
        self._live: set[Request] = set()  # taken from the queue, last event not out yet
        self._flights: list[Flight] = []  # what the next turn delivers
        self._to_free: deque[Sample] = deque()  # over, and the loop does not know it yet
        self._probes = probes.Probes()
        self._state: Any = None  # the engine's, made in the thread
        self._failed_prefills = self._failed_steps = 0  # since the last that worked
        self._landed_at = 0.0  # when the latest tokens were read (s of time.monotonic())
        self._dead_reason: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._deadlines = threading.Thread(target=self._end_overdue_waiters, name="deadlines", daemon=True)
        if metrics is not None:
            metrics.watch(
                queue_depth=lambda: self.queue_depth,
                slots_in_use=lambda: self.slots_in_use,
                slots=engine.max_concurrent_decodes,
            )

    # Any thread.

    def start(self) -> None:
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._delivery.start()
        self._deadlines.start()
        self._thread.start()

    def submit(self, *requests: Request) -> None:
        """All of them or none. Every request accepted gets exactly one last event.

        Raises QueueFullError, UnavailableError, DeadlineError when a deadline has passed already, RefusedError for
        more samples than slots and for more requests than can wait.
        """
        for request in requests:
            check_slots(request.num_samples, self._engine.max_concurrent_decodes)
            if is_overdue(request, time.monotonic()):
                raise DeadlineError(f"the deadline of request {request.id} passed before it could be queued")
        with self._refusals_counted():
            self._queue.put(*requests)

    def check_room(self) -> None:
        """Refuses early, before a prompt is made into tokens: raises QueueFullError or UnavailableError."""
        with self._refusals_counted():
            self._queue.check_room()

    def cancel(self, request: Request) -> None:
        """Ends it, and frees its slots before the next step. No effect on a request that is done."""
        if request.done or request.queued_at is None:
            return
        if not self._queue.remove(request):
            self._to_free.extend(request.samples)  # at once: delivery may be behind
        is_late = is_overdue(request, time.monotonic() + DEADLINE_SLACK_S)
        self._delivery.end(request, FinishReason.DEADLINE if is_late else FinishReason.CANCELLED)

    def probe(self, timeout_s: float) -> None:
        """Returns when a real step of the engine has been run and read: one of those that run anyway, or if there are
        none, a step over empty slots.

        Raises UnavailableError when that takes longer than `timeout_s`, when the step fails, or when there is no
        engine any more.
        """
        probe = self._probes.add()
        self._queue.wake()
        if self._closing or self._dead_reason is not None or not self._thread.is_alive():
            raise UnavailableError(self._dead_reason or STOPPING)
        probes.wait(probe, timeout_s)

    def refuse_new(self, reason: str) -> None:
        """submit() raises UnavailableError from now on."""
        self._queue.close(UnavailableError(reason))

    def close(self) -> None:
        """Ends the thread after its turn; requests that are not done get an UnavailableError."""
        self._closing = True
        self.refuse_new(STOPPING)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        self._refuse_all(STOPPING)  # also when the device hangs, and the thread with it
        self._delivery.close()

    @property
    def slots_in_use(self) -> int:
        return self._slots.in_use

    @property
    def queue_depth(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except (QueueFullError, UnavailableError):
            if self._metrics is not None:
                self._metrics.rejected()
            raise

    # Delivery's thread.

    def _ended_early(self, sample: Sample) -> None:
        self._to_free.append(sample)

    def _forget(self, request: Request) -> None:
        self._live.discard(request)

    # The deadlines' thread: a request that waits is answered in time whatever the device does.

    def _end_overdue_waiters(self) -> None:
        while overdue := self._queue.overdue():
            for request in overdue:
                self._delivery.end(request, FinishReason.DEADLINE)

    # The orchestrator's thread, from here on.

    def _run(self) -> None:
        try:
            self._state = self._engine.init_decode_state()
            if self._warm_up:
                self._state = self._engine.warm_up(self._params, self._state)
            self._on_ready()
            self._loop()
        except Exception as error:
            log.exception("the engine is given up")
            self._dead_reason = f"the engine is given up: {describe(error)}"
            self._refuse_all(self._dead_reason)
            self._on_dead(self._dead_reason)
        else:
            self._refuse_all(STOPPING)

    def _refuse_all(self, reason: str) -> None:
        self.refuse_new(reason)
        self._probes.answer(UnavailableError(reason))
        for request in [*self._queue.clear(), *list(self._live)]:
            self._delivery.end(request, UnavailableError(reason))

    def _loop(self) -> None:
        while not self._closing:
            self._queue.wait(until=self._has_work)
            try:
                self._turn()
            except DeadError:
                raise
            except Exception as error:
                self._recover(error)

    def _has_work(self) -> bool:
        return self._closing or bool(self._slots.in_use or self._flights or self._probes)

    def _turn(self) -> None:
        self._free_ended()
        self._start_next()
        earlier, self._flights = self._flights, self._generate()
        for flight in earlier:
            self._deliver(flight)

    def _free_ended(self) -> None:
        """Slots of requests that were cancelled, have met a stop string or are out of time."""
        while self._to_free:
            self._free(self._to_free.popleft())
        for sample in self._slots.overdue(time.monotonic()):
            self._delivery.end(sample.request, FinishReason.DEADLINE)
            self._free(sample)

    def _start_next(self) -> None:
        """Admit, prefill, insert."""
        if (request := self._queue.take(self._slots.free)) is None:
            return
        self._live.add(request)
        try:
            started = self._prefill(request)
        except Exception as error:  # touched no other request, unlike a failed step
            log.exception("the prefill of request %s failed", request.id)
            self._failed_prefills += 1
            self._fail(request, error)
            self._give_up_on_a_series(error)
            return
        for sample, (prefix, flight) in zip(request.samples, started, strict=True):
            self._flights.append(flight)
            if request.max_tokens > 1:
                self._state = self._engine.insert(prefix, self._state, self._slots.give(sample))

    def _prefill(self, request: Request) -> list[tuple[Any, Flight]]:
        """A prefix and a first token for each sample, all from one prefill."""
        request.started_at = now = time.monotonic()
        padded, length = self._engine.pad(request.prompt_ids)
        prefix, result = self._engine.prefill(
            self._params, padded, length, sampling=request.sampling, prompt_logprobs=request.prompt_logprobs
        )
        started = []
        for sample in request.samples:
            if sample.index:
                prefix, result = self._engine.resample(prefix, sample.sampling)
            asked = prefix.prompt_logprob_T if request.prompt_logprobs and not sample.index else None
            roster = self._slots.alone(sample)
            started.append((prefix, Flight(result, roster, is_step=False, started=now, prompt_logprob_T=asked)))
        return started

    def _generate(self) -> list[Flight]:
        """Starts one step for every slot in use; over empty slots only for a probe."""
        is_probed = bool(self._probes) and not any(flight.is_step for flight in self._flights)
        if not self._slots.in_use and not is_probed:
            return []
        started = time.monotonic()
        self._state, result = self._engine.generate(self._params, self._state)
        flight = Flight(result, self._slots.roster, is_step=True, started=started)
        for sample in self._slots.count_step():
            self._free(sample)
        return [flight]

    def _deliver(self, flight: Flight) -> None:
        landing = flight.land()
        self._count(flight)
        for sample in landing.roster.owner_B[landing.stopped_B]:
            self._free(sample)
        self._delivery.post(landing)

    def _free(self, sample: Sample) -> None:
        if sample.slot is not None:
            self._state = self._engine.free(self._state, self._slots.take_back(sample))

    def _count(self, flight: Flight) -> None:
        """A flight that has landed is a success, took the device from the one before it until now, and is what probes
        wait for."""
        now = time.monotonic()
        duration_s, self._landed_at = now - max(flight.started, self._landed_at), now
        self._failed_prefills = 0
        if flight.is_step:  # a prefill that works says nothing about steps
            self._failed_steps = 0
            self._probes.answer()
        if self._metrics is not None:
            if flight.is_step:
                self._metrics.step(duration_s, slots=flight.roster.taken)
            elif flight.roster.owner_B[0].index == 0:  # the other samples' first tokens come from the same prefill
                self._metrics.prefill(duration_s)

    def _recover(self, error: Exception) -> None:
        """A step failed, its state was donated and is lost: fail whoever was in it and start afresh."""
        failed = list(self._live)
        log.error("a step failed; requests %s fail with it", ", ".join(r.id for r in failed), exc_info=error)
        self._flights, self._slots = [], self._no_slots_taken()
        self._state = None  # before the new one is made: two may not fit the device
        for request in failed:
            for sample in request.samples:
                sample.slot = None
            self._fail(request, error)
        self._probes.answer(UnavailableError(f"a step of the engine failed: {describe(error)}"))
        self._failed_steps += 1
        self._give_up_on_a_series(error)
        self._state = self._engine.init_decode_state()

    def _no_slots_taken(self) -> Slots:
        return Slots(self._engine.max_concurrent_decodes, sorted(self._tokenizer.stop_ids))

    def _give_up_on_a_series(self, error: Exception) -> None:
        count = max(self._failed_prefills, self._failed_steps)
        if count >= MAX_FAILURES:
            raise DeadError(f"{count} failures in a row, the last: {describe(error)}") from error

    def _fail(self, request: Request, error: Exception) -> None:
        self._delivery.end(request, FailedError(f"request {request.id} failed in the engine: {describe(error)}"))


def describe(error: Exception) -> str:
    """One short line: an XLA error can fill screens."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
