"""The orchestrator: takes requests from any thread, runs the loop in a thread of its own, and answers for it."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Generic

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ...engine_impl.runtime.watchdog import Watchdog
from ..errors import DeadlineError, QueueFullError, UnavailableError
from ..observe.metrics import Metrics
from ..observe.routers import AdapterNames, RouterNames
from ..request.adapter import LoadedAdapter
from ..request.events import FinishReason
from ..request.limits import check_slots
from ..request.request import Request
from . import probes
from .failures import describe
from .loop import Loop
from .queue import RequestQueue, is_overdue

log = logging.getLogger(__name__)

CLOSE_S = 10.0
"""How long close() waits for a turn to end (seconds); the thread is a daemon and cannot hold the process."""

LOST_S = 1.0
"""Likewise, of an engine that is given up (seconds)."""

DEADLINE_SLACK_S = 0.05
"""A cancel this close to the deadline is the deadline's doing (seconds): the caller's clock was started before ours."""

SWITCH_S = 0.0005
"""How long a busy thread keeps the interpreter from the loop (seconds; Python's own: 0.005). The loop asks for it a few
times per step. 256 streams over gRPC, steps of 8 ms, 2 busy cores: 11.0 ms per step, with Python's own 13.0."""

STOPPING = "the server is stopping"


class Orchestrator(Generic[ParamsT, PrefixT, StateT]):
    """start() it, submit() requests from any thread, close() it."""

    def __init__(
        self,
        engine: Engine[ParamsT, PrefixT, StateT],
        params: ParamsT,
        *,
        max_queued: int,
        max_queued_tokens: int | None = None,
        metrics: Metrics | None = None,
        prefix_cache: bool = True,
        warm_up: bool = True,
        step_timeout_s: float = 0.0,
        on_ready: Callable[[], object] = lambda: None,
        on_dead: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """`on_ready` is called from the loop's thread, `on_dead(reason)` from any, once.

        `step_timeout_s`: a turn of the loop that takes longer gives the engine up; 0: none does.
        """
        self._slots, self._reach_of = engine.sizes.slots, engine.reach_of
        self._metrics, self._warm_up, self._on_ready, self._on_dead = metrics, warm_up, on_ready, on_dead
        self._queue = RequestQueue(
            max_queued, max_queued_tokens, slots=self._slots, free_slots=lambda: self._loop.slots_free
        )
        self._watchdog = Watchdog(step_timeout_s, self.give_up)
        in_turn = partial(self._watchdog.working, "a step")
        self._loop = Loop(engine, params, self._queue, metrics, prefix_cache=prefix_cache, in_turn=in_turn)
        self._dead_reason: str | None = None
        self._dying = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._deadlines = threading.Thread(target=self._end_overdue_waiters, name="deadlines", daemon=True)
        if metrics is not None:
            metrics.watch(
                queue_depth=lambda: self.queue_depth,
                slots_in_use=lambda: self.slots_in_use,
                slots=self._slots,
                pages=self._loop.pages,
            )
            metrics.watch_for_routers(
                RouterNames(
                    model=engine.model_name,
                    page_rows=engine.sizes.page_rows,
                    waiting=lambda: self.queue_depth,
                    running=lambda: self.in_work,
                    slots_used=lambda: self.slots_in_use / self._slots,
                    pages=self._loop.pages,
                )
            )
            if engine.sizes.max_adapters:
                metrics.watch_for_routers(AdapterNames(engine.sizes.max_adapters, self.adapter_names))

    def start(self) -> None:
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._loop.delivery.start()
        self._deadlines.start()
        self._thread.start()

    def submit(self, *requests: Request) -> None:
        """All of them or none. Every request accepted gets exactly one last event.

        Raises QueueFullError, UnavailableError, DeadlineError when a deadline has passed already, RefusedError for
        more samples than slots and for more requests than can wait.
        """
        for request in requests:
            check_slots(request.num_samples, self._slots)
            if is_overdue(request, time.monotonic()):
                raise DeadlineError(f"the deadline of request {request.id} passed before it could be queued")
            request.reach = self._reach_of(request.longest_text)
        with self._refusals_counted():
            self._queue.put(*requests)

    def check_room(self, client: str = "") -> None:
        """Refuses a client early, before a prompt is made into tokens: raises QueueFullError or UnavailableError."""
        with self._refusals_counted():
            self._queue.check_room(client)

    def cancel(self, request: Request) -> None:
        """Ends it, and frees its slots before the next step. No effect on a request that is done."""
        if request.done or request.queued_at is None:
            return
        if not self._queue.remove(request):
            self._loop.ended.extend(request.samples)  # at once: delivery may be behind
        is_late = is_overdue(request, time.monotonic() + DEADLINE_SLACK_S)
        self._loop.delivery.end(request, FinishReason.DEADLINE if is_late else FinishReason.CANCELLED)

    def probe(self, timeout_s: float) -> None:
        """Returns when a real step of the engine has been run and read: one of those that run anyway, or if there are
        none, a step over empty slots.

        Raises UnavailableError when that takes longer than `timeout_s`, when the step fails, or when there is no
        engine any more.
        """
        probe = self._loop.probes.add()
        self._queue.wake()
        if self._loop.closing or self._dead_reason is not None or not self._thread.is_alive():
            raise UnavailableError(self._dead_reason or STOPPING)
        probes.wait(probe, timeout_s)

    def give_up(self, reason: str) -> None:
        """The engine is lost, and its thread may hang in it: requests get an UnavailableError. From any thread."""
        with self._dying:
            if self._dead_reason is not None:
                return
            self._dead_reason = f"the engine is given up: {reason}"
        self._loop.closing = True
        self._refuse_all(self._dead_reason)
        self._on_dead(self._dead_reason)

    @property
    def hangs(self) -> bool:
        """Whether the loop's thread is still there; asked after close()."""
        return self._thread.is_alive()

    def refuse_new(self, reason: str) -> None:
        """submit() raises UnavailableError from now on."""
        self._queue.close(UnavailableError(reason))

    def close(self) -> None:
        """Ends the loop after its turn; requests that are not done get an UnavailableError."""
        self._loop.closing = True
        self.refuse_new(STOPPING)
        self._watchdog.close()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S if self._dead_reason is None else LOST_S)
        self._refuse_all(STOPPING)  # also when the device hangs, and the thread with it
        self._loop.delivery.close()

    @property
    def slots_in_use(self) -> int:
        return self._loop.slots_in_use

    @property
    def adapters_on_devices(self) -> frozenset[LoadedAdapter]:
        return self._loop.adapters_on_devices

    def adapter_names(self) -> tuple[set[str], set[str]]:
        """Those that requests in work use, and those that others wait for."""
        live = self._loop.live.copy()
        running = {request.adapter.name for request in live if request.adapter is not None}
        return running, {adapter.name for adapter in self._queue.adapters()} - running

    @property
    def queue_depth(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def in_work(self) -> int:
        """Requests that have left the queue and are not at their end, pre-empted ones too."""
        return len(self._loop.live)

    @contextmanager
    def _refusals_counted(self) -> Generator[None, None, None]:
        try:
            yield
        except (QueueFullError, UnavailableError):
            if self._metrics is not None:
                self._metrics.rejected()
            raise

    def _end_overdue_waiters(self) -> None:
        """The deadlines' thread: a request that waits is answered in time whatever the device does."""
        while overdue := self._queue.overdue():
            for request in overdue:
                self._loop.delivery.end(request, FinishReason.DEADLINE)

    def _run(self) -> None:
        """The loop's thread."""
        try:
            self._loop.start(warm_up=self._warm_up)
            self._on_ready()
            self._loop.run()
        except Exception as error:
            log.exception("the engine is given up")
            self.give_up(describe(error))
        else:
            self._refuse_all(STOPPING)

    def _refuse_all(self, reason: str) -> None:
        self.refuse_new(reason)
        self._loop.probes.answer(UnavailableError(reason))
        for request in [*self._queue.clear(), *list(self._loop.live)]:
            self._loop.delivery.end(request, UnavailableError(reason))
