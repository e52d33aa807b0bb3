"""The orchestrator: requests become slots, slots become tokens. One thread, one loop, which owns the decode state:

    admit -> prefill -> insert -> generate -> deliver -> free

- admit: the oldest request of the queue, if a slot is free. One a turn: running answers wait for one prefill at most.
- prefill, insert, generate: only started here, they run on the device; what they give is copied back meanwhile.
- deliver: reads the tokens of the turn before, so that the device never waits for the host.
- free: at max_tokens as soon as the last step is started; at a stop token when it is read, one step late; at a cancel
  before the next step. A step in flight may then still bring a token for the old request: a Flight remembers whose
  tokens it carries, so the slot's next owner never sees them.

Knows nothing of gRPC and nothing of text: token ids in, token ids out, through each request's `deliver`.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FailedError, UnavailableError
from .queue import RequestQueue
from .request import Event, FinishReason, Request

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures without a success between them (count), after which the engine is given up."""


CLOSE_S = 10.0
"""How long close() waits for a turn to end (seconds); the thread is a daemon and cannot hold the process."""

STOPPING = "the server is stopping"


class DeadError(Exception):
    """The engine keeps failing."""


@dataclass(frozen=True)
class Flight:
    """Tokens on their way from the device, and whose they are."""

    tokens: Any  # i32 array: [B] of a decode step, [1] of a prefill
    owners: dict[int, Request]  # by index into `tokens`
    is_step: bool


class Orchestrator:
    """start() it, submit() requests from any thread, close() it."""

    def __init__(
        self,
        engine: "Engine",
        params: Any,
        *,
        max_queued: int,
        warm_up: bool = True,
        on_ready: Callable[[], object] = lambda: None,
        on_dead: Callable[[str], object] = lambda reason: None,
    ) -> None:
        """`on_ready` and `on_dead(reason)` are called from the orchestrator's thread."""
        self._engine, self._params = engine, params
        self._stop_ids = engine.get_tokenizer().stop_ids
        self._warm_up, self._on_ready, self._on_dead = warm_up, on_ready, on_dead
        self._queue = RequestQueue(max_queued)
        self._live: dict[str, Request] = {}  # taken from the queue, last event not out yet
        self._slots: list[Request | None] = [None] * engine.max_concurrent_decodes
        self._flights: list[Flight] = []  # what the next turn delivers
        self._state: Any = None  # the engine's, made in the thread
        self._failed_prefills = self._failed_steps = 0  # since the last that worked
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)

    # Any thread.

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Every request accepted gets exactly one last event. Raises QueueFullError or UnavailableError."""
        self._queue.put(request)

    def cancel(self, request: Request) -> None:
        """Frees its slot before the next step. No effect on a request that is done."""
        if request.done:
            return
        request.cancelled = True
        if self._queue.remove(request):
            self._end(request, Event(finish_reason=FinishReason.CANCELLED))

    def refuse_new(self, reason: str) -> None:
        """submit() raises UnavailableError from now on."""
        self._queue.close(UnavailableError(reason))

    def close(self) -> None:
        """Ends the thread after its turn; requests that are not done get an UnavailableError."""
        self._closing = True
        self.refuse_new(STOPPING)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    @property
    def slots_in_use(self) -> int:
        return sum(request is not None for request in self._slots)

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
            reason = f"the engine is given up: {describe(error)}"
            self._refuse_all(reason)
            self._on_dead(reason)
        else:
            self._refuse_all(STOPPING)

    def _refuse_all(self, reason: str) -> None:
        self.refuse_new(reason)
        while (request := self._queue.take()) is not None:
            self._live[request.id] = request
        for request in list(self._live.values()):
            self._end(request, Event(error=UnavailableError(reason)))

    def _loop(self) -> None:
        while not self._closing:
            self._queue.wait(until=lambda: self._closing or bool(self._live))
            try:
                self._turn()
            except DeadError:
                raise
            except Exception as error:
                self._recover(error)

    def _turn(self) -> None:
        self._free_cancelled()
        self._start_next()
        earlier, self._flights = self._flights, self._generate()
        for flight in earlier:
            self._deliver(flight)

    def _free_cancelled(self) -> None:
        for request in [request for request in self._live.values() if request.cancelled]:
            self._finish(request, FinishReason.CANCELLED)

    def _start_next(self) -> None:
        """Admit, prefill, insert."""
        if None not in self._slots or (request := self._queue.take()) is None:
            return
        self._live[request.id] = request
        try:
            padded, length = self._engine.pad(request.prompt_ids)
            prefix, first = self._engine.prefill(self._params, padded, length, sampling=request.sampling)
        except Exception as error:  # touched no other request, unlike a failed step
            log.exception("the prefill of request %s failed", request.id)
            self._failed_prefills += 1
            self._fail(request, error)
            self._give_up_on_a_series(error)
            return
        request.planned = 1
        self._flights.append(fly(first.token_B, {0: request}, is_step=False))
        if request.max_tokens > 1:
            request.slot = self._slots.index(None)
            self._slots[request.slot] = request
            self._state = self._engine.insert(prefix, self._state, request.slot)

    def _generate(self) -> list[Flight]:
        """Starts one step for every slot in use."""
        owners = {slot: request for slot, request in enumerate(self._slots) if request is not None}
        if not owners:
            return []
        self._state, result = self._engine.generate(self._params, self._state)
        flight = fly(result.token_B, owners, is_step=True)
        for request in owners.values():
            request.planned += 1
            if request.planned == request.max_tokens:
                self._free(request)
        return [flight]

    def _deliver(self, flight: Flight) -> None:
        tokens = np.asarray(flight.tokens)  # waits for the device
        self._failed_prefills = 0
        if flight.is_step:  # a prefill that works says nothing about steps
            self._failed_steps = 0
        for index, request in flight.owners.items():
            if not request.done:
                self._deliver_token(request, int(tokens[index]))

    def _deliver_token(self, request: Request, token_id: int) -> None:
        if token_id in self._stop_ids:
            self._finish(request, FinishReason.STOP)
            return
        request.delivered += 1
        if request.delivered == request.max_tokens:
            self._finish(request, FinishReason.LENGTH, (token_id,))
        else:
            emit(request, Event((token_id,)))

    def _finish(self, request: Request, reason: FinishReason, token_ids: tuple[int, ...] = ()) -> None:
        self._free(request)
        self._end(request, Event(token_ids, finish_reason=reason))

    def _free(self, request: Request) -> None:
        if request.slot is not None:
            self._slots[request.slot] = None
            self._state = self._engine.free(self._state, request.slot)
            request.slot = None

    def _end(self, request: Request, event: Event) -> None:
        self._live.pop(request.id, None)
        request.done = True
        emit(request, event)

    def _recover(self, error: Exception) -> None:
        """A step failed, its state was donated and is lost: fail whoever was in it and start afresh."""
        log.exception("a step failed; requests %s fail with it", ", ".join(self._live))
        self._flights, self._slots = [], [None] * len(self._slots)
        self._state = None  # before the new one is made: two may not fit the device
        for request in list(self._live.values()):
            self._fail(request, error)
        self._failed_steps += 1
        self._give_up_on_a_series(error)
        self._state = self._engine.init_decode_state()

    def _give_up_on_a_series(self, error: Exception) -> None:
        count = max(self._failed_prefills, self._failed_steps)
        if count >= MAX_FAILURES:
            raise DeadError(f"{count} failures in a row, the last: {describe(error)}") from error

    def _fail(self, request: Request, error: Exception) -> None:
        self._end(request, Event(error=FailedError(f"request {request.id} failed in the engine: {describe(error)}")))


def fly(tokens: Any, owners: dict[int, Request], *, is_step: bool) -> Flight:
    """Starts the copy to the host."""
    tokens.copy_to_host_async()
    return Flight(tokens, owners, is_step)


def emit(request: Request, event: Event) -> None:
    """A caller that cannot take its event counts as gone; it must not take the others with it."""
    try:
        request.deliver(event)
    except Exception:
        log.exception("request %s: its caller is gone", request.id)
        request.cancelled = True


def describe(error: Exception) -> str:
    """One short line: an XLA error can fill screens."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
