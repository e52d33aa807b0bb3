"""The gateway behind both fronts, gRPC and HTTP: they hand requests in and get batches of events back."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from ..engine_impl.api import AnyEngine
from ..engine_impl.errors import RefusedError
from .adapters.store import AdapterStore
from .delivery.mailbox import Batch, Inbox, Mailbox
from .errors import CancelledError, DeadlineError, UnavailableError
from .observe.logs import log_prompt
from .observe.traces import Header, Traces
from .request.adapter import NO_ADAPTERS, LoadedAdapter
from .request.events import Event, FinishReason
from .request.request import Request
from .rests import Rests
from .scheduler.orchestrator import Orchestrator

REQUEST_ID = "x-request-id"
"""Metadata or header, both ways: the caller's name for its request, or else ours."""
MAX_REQUEST_ID = 128
"""Longest (characters)."""

RETRY_AFTER = "retry-after-ms"
"""Metadata or header of an answer that a queue was full: when to come again, a hint (milliseconds)."""

Deliver = Callable[[Event], object]
Read = Callable[[AnyEngine, Callable[[int], Deliver]], list[Request]]
"""Makes the requests of one call; the second argument gives `Request.deliver` of the first, second, ... of them. It is
called in a thread. Raises RefusedError."""


T = TypeVar("T")

LONG = 1 << 16
"""A call beyond it is long (bytes)."""


class Lane(Enum):
    """Where a call is read. Calls of one lane wait for each other, and for no others."""

    TEXT = "text"
    """Short texts and token ids."""
    CHAT = "chat"
    """Short conversations: a chat template may take seconds, whatever it is given."""
    GRAMMAR = "grammar"
    """Not for reading: the grammars of requests that were read are compiled in it."""
    LONG = "long"
    """Calls of more than LONG bytes: one at a time, so that many take no more memory than one."""

    @classmethod
    def of(cls, size: int, *, is_chat: bool) -> "Lane":
        """Of a call of so many bytes."""
        return cls.LONG if size > LONG else cls.CHAT if is_chat else cls.TEXT


THREADS = {Lane.TEXT: 4, Lane.CHAT: 4, Lane.GRAMMAR: 4, Lane.LONG: 1}
"""Of each lane (count)."""


class Gateway:
    """One server's, of one event loop. Refuses with UnavailableError until `open()`."""

    def __init__(
        self,
        on_call: Callable[[], object] = lambda: None,
        traces: Traces | None = None,
        adapters: AdapterStore | None = None,
    ) -> None:
        """`on_call` is told of every call that begins; `traces` of every request that is admitted, if there are any.
        `adapters`: those that requests may name; default: none."""
        self.calls = 0
        """Calls that are being answered."""
        self.adapters = adapters or AdapterStore()
        self._on_call, self._traces = on_call, traces
        self._served: tuple[AnyEngine, Orchestrator[Any, Any, Any]] | None = None
        self._closed = "the model is still loading; try again later"
        self._mailbox: Mailbox | None = None
        self._lanes = {lane: ThreadPoolExecutor(count, f"read-{lane.value}") for lane, count in THREADS.items()}
        self._rests = Rests(THREADS[Lane.LONG])

    def open(self, engine: AnyEngine, orchestrator: Orchestrator[Any, Any, Any]) -> None:
        """From now on requests are served."""
        self._served = engine, orchestrator

    def close(self, reason: str) -> None:
        """From now on new requests are refused; those in flight go on."""
        self._served, self._closed = None, reason
        self.adapters.close()
        for lane in self._lanes.values():
            lane.shutdown(wait=False)

    @property
    def is_open(self) -> bool:
        return self._served is not None

    @property
    def engine(self) -> AnyEngine:
        """Raises UnavailableError while the gateway is closed."""
        return self._open()[0]

    @property
    def open_adapters(self) -> AdapterStore:
        """For whoever loads or unloads. Raises UnavailableError while the gateway is closed, RefusedError where there
        are no adapters."""
        if not self.engine.sizes.max_adapters:
            raise RefusedError(NO_ADAPTERS)
        return self.adapters

    @property
    def adapters_on_devices(self) -> Collection[LoadedAdapter]:
        """Raises UnavailableError while the gateway is closed."""
        return self._open()[1].adapters_on_devices

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call is being answered: the server's stop waits for it."""
        self._on_call()
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    async def compute(self, work: Callable[[AnyEngine], T], lane: Lane) -> T:
        """What a call wants of the engine's host side alone, such as its tokenizer: in a thread. Raises what `work`
        raises, and UnavailableError."""
        engine, _ = self._open()
        return await self._in_lane(lane, work, engine)

    async def _in_lane(self, lane: Lane, work: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        async with self._rests.place() if lane is Lane.LONG else nullcontext():
            return await loop.run_in_executor(self._lanes[lane], work, *args)

    @asynccontextmanager
    async def admit(self, read: Read, lane: "Lane", client: str, header: Header) -> AsyncIterator["Admitted"]:
        """One call's requests, handed in. Leaving early, at whoever's wish, cancels them.

        Args:
            read: called in a thread: tokens take their time, and others are being answered.
            lane: whom it may hold up.
            client: who asks; clients take turns.
            header: what the caller sent beside it, by name; asked for where requests are traced.

        Raises what `read` raises, UnavailableError, QueueFullError, UnknownModelError, and DeadlineError for one that
        has passed already, or does while an adapter is being loaded.
        """
        engine, orchestrator = self._open()
        orchestrator.check_room(client)
        self._mailbox = mailbox = self._mailbox or Mailbox(asyncio.get_running_loop())
        inbox = Inbox()
        requests = await self._in_lane(lane, read, engine, lambda number: partial(mailbox.post, inbox, number))
        for request in requests:
            if request.grammar is not None:
                await self.compute(partial(constrain, request), Lane.GRAMMAR)
            request.client = client
            if request.adapter_name:
                request.adapt(await self.adapters.get(request.adapter_name, request.deadline))
            if self._traces is not None:
                request.trace = self._traces.begin(header)
            log_prompt(request.id, request.prompt_ids, engine.get_tokenizer())
        orchestrator.submit(*requests)
        try:
            yield Admitted(engine, requests, inbox)
        finally:
            for request in requests:
                orchestrator.cancel(request)

    def _open(self) -> tuple[AnyEngine, Orchestrator[Any, Any, Any]]:
        if self._served is None:
            raise UnavailableError(self._closed)
        return self._served


class Admitted:
    """Requests that were handed in together."""

    def __init__(self, engine: AnyEngine, requests: list[Request], inbox: Inbox) -> None:
        self.engine, self.requests = engine, requests
        self._inbox = inbox

    async def batches(self) -> AsyncIterator[Batch]:
        """All that has come since the batch before, until every request has ended. Raises why one of them was not
        answered to its end, after the batch that told so."""
        under_way = len(self.requests)
        while under_way:
            batch = await self._inbox.take()
            last = [(self.requests[number], event) for number, event in batch if event.is_last]
            for _, event in last:
                if event.error is not None:
                    raise event.error
            yield batch
            for request, event in last:
                check_ended(request, event)
            under_way -= len(last)


def constrain(request: Request, engine: AnyEngine) -> None:
    request.constrain(engine.get_tokenizer())


def check_ended(request: Request, last: Event) -> None:
    """Raises DeadlineError or CancelledError for an answer that was broken off."""
    if last.finish_reason is FinishReason.DEADLINE:
        raise DeadlineError(f"the deadline of request {request.id} passed after {request.delivered} tokens")
    if last.finish_reason is FinishReason.CANCELLED:
        raise CancelledError(f"request {request.id} was cancelled after {request.delivered} tokens")


def new_id() -> str:
    """A name for a request whose caller gave none."""
    return secrets.token_hex(6)


def check_id(request_id: str) -> None:
    """Raises RefusedError for a caller's name that is too long, or could not be sent back."""
    if len(request_id) > MAX_REQUEST_ID:
        raise RefusedError(f"{REQUEST_ID} has more than {MAX_REQUEST_ID} characters; send a shorter one")
    if not (request_id.isascii() and request_id.isprintable()):
        raise RefusedError(f"{REQUEST_ID} must be printable ASCII")
