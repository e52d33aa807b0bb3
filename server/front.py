"""The gRPC front: the calls, their beginning, their end and their status codes."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING

import grpc

from ..engine_impl.errors import RefusedError
from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorServicer, add_OrchestratorServicer_to_server
from .errors import CancelledError, DeadlineError, FailedError, QueueFullError, UnavailableError
from .logs import log_prompt
from .mailbox import Mailbox
from .messages import read_request, write_reply
from .orchestrator import Orchestrator
from .request import Event, FinishReason, Request

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name
JETSTREAM_SERVICE = "jetstream_proto.Orchestrator"

STATUS: dict[type[Exception], grpc.StatusCode] = {
    RefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledError: grpc.StatusCode.CANCELLED,
    FailedError: grpc.StatusCode.INTERNAL,
}

REQUEST_ID = "x-request-id"
"""Metadata, both ways: the caller's name for its request, or else ours. Initial when the request is accepted, trailing
when it is refused or fails."""
MAX_REQUEST_ID = 128
"""Longest (characters)."""

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED, a hint."""
PUSHBACK = "grpc-retry-pushback-ms"
"""The same, as gRPC clients with a retry policy read it."""

ENDLESS_S = 10 * 365 * 86400.0
"""A deadline further off than this is none (seconds); gRPC tells so of calls without one."""


class Front(OrchestratorServicer):
    """Both methods. Answers UNAVAILABLE until `open()`."""

    def __init__(self) -> None:
        self.calls = 0
        """Decode calls that are being answered."""
        self._served: tuple[Engine, Orchestrator] | None = None
        self._closed = "the model is still loading; try again later"
        self._mailbox: Mailbox | None = None

    def open(self, engine: "Engine", orchestrator: Orchestrator) -> None:
        """From now on requests are served."""
        self._served = engine, orchestrator

    def close(self, reason: str) -> None:
        """From now on new requests are refused with UNAVAILABLE; those in flight go on."""
        self._served, self._closed = None, reason

    async def HealthCheck(self, message: pb.HealthCheckRequest, context: grpc.aio.ServicerContext):
        """JetStream's own health check; grpc.health.v1 says the same."""
        await context.send_initial_metadata(((REQUEST_ID, own_id(context)),))
        return pb.HealthCheckResponse(is_live=self._served is not None)

    async def Decode(self, message: pb.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Streams the answers. Leaving early, at whoever's wish, cancels the request."""
        self.calls += 1
        request_id = own_id(context)
        try:
            check_id(request_id)
            await self._answer(message, context, request_id)
        except tuple(STATUS) as error:
            await context.abort(status(error), str(error), trailing_metadata=trailers(error, request_id))
        finally:
            self.calls -= 1

    async def _answer(self, message: pb.DecodeRequest, context: grpc.aio.ServicerContext, request_id: str) -> None:
        if self._served is None:
            raise UnavailableError(self._closed)
        engine, orchestrator = self._served
        orchestrator.check_room()
        self._mailbox = self._mailbox or Mailbox(asyncio.get_running_loop())
        events: asyncio.Queue[Event] = asyncio.Queue()
        read = partial(read_request, request_id=request_id, deadline=deadline_of(context))
        # In a thread: the text may be megabytes, and others are being answered.
        request = await asyncio.to_thread(read, message, engine, partial(self._mailbox.post, events))
        log_prompt(request.id, request.prompt_ids, engine.get_tokenizer())
        orchestrator.submit(request)
        try:
            # Not before: a client's retry policy only applies to answers that are nothing but trailers.
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            async for reply in replies(events, request):
                await context.write(reply)
        finally:
            orchestrator.cancel(request)


async def replies(events: asyncio.Queue[Event], request: Request) -> AsyncIterator[pb.DecodeResponse]:
    """One message for whatever has come since the one before. Raises why the request was not answered to its end."""
    batch: list[Event] = []
    while not (batch and batch[-1].is_last):
        batch = [await events.get()]
        while not events.empty():
            batch.append(events.get_nowait())
        if (error := batch[-1].error) is not None:
            raise error
        yield write_reply(batch, request.num_samples)
    if batch[-1].finish_reason is FinishReason.DEADLINE:
        raise DeadlineError(f"the deadline of request {request.id} passed after {request.delivered} tokens")
    if batch[-1].finish_reason is FinishReason.CANCELLED:
        raise CancelledError(f"request {request.id} was cancelled after {request.delivered} tokens")


def own_id(context: grpc.aio.ServicerContext) -> str:
    """The caller's, or a new one."""
    for name, value in context.invocation_metadata() or ():
        if name == REQUEST_ID and value:
            return str(value)[: MAX_REQUEST_ID + 1]
    return secrets.token_hex(6)


def check_id(request_id: str) -> None:
    """Raises RefusedError."""
    if len(request_id) > MAX_REQUEST_ID:
        raise RefusedError(f"the metadata {REQUEST_ID} has more than {MAX_REQUEST_ID} characters; send a shorter one")


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """s of time.monotonic(); None when the caller waits for ever."""
    left_s = context.time_remaining()
    return None if left_s is None or left_s > ENDLESS_S else time.monotonic() + left_s


def trailers(error: Exception, request_id: str) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a call that is not answered."""
    named = ((REQUEST_ID, request_id),)
    if not isinstance(error, QueueFullError):
        return named
    milliseconds = str(round(error.retry_after_s * 1000))
    return (*named, (RETRY_AFTER, milliseconds), (PUSHBACK, milliseconds))


def status(error: Exception) -> grpc.StatusCode:
    return next(code for kind, code in STATUS.items() if isinstance(error, kind))


def add_to(server: grpc.aio.Server, front: Front) -> None:
    """Serves the front under our own name, and under JetStream's for its clients."""
    add_OrchestratorServicer_to_server(front, server)
    handlers = {
        "Decode": grpc.unary_stream_rpc_method_handler(
            front.Decode,
            request_deserializer=pb.DecodeRequest.FromString,
            response_serializer=pb.DecodeResponse.SerializeToString,
        ),
        "HealthCheck": grpc.unary_unary_rpc_method_handler(
            front.HealthCheck,
            request_deserializer=pb.HealthCheckRequest.FromString,
            response_serializer=pb.HealthCheckResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(JETSTREAM_SERVICE, handlers)])
