"""The gRPC front: the calls, their beginning, their end and their status codes."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from ...engine_impl.errors import RefusedError
from ...protos import orchestrator_pb2 as pb
from ..config import ChatConfig
from ..errors import (
    CancelledError,
    DeadlineError,
    FailedError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
    brief,
    without_frames,
)
from ..gateway import LONG, MAX_REQUEST_ID, REQUEST_ID, RETRY_AFTER, Deliver, Gateway, Lane, check_id, new_id
from ..net.security import Guard
from ..request.request import Request
from .interceptors import address_of, authorizations
from .messages import DEFAULT, read_request, write_reply

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

# gRPC's own Python logs a traceback for each header that is no text; strangers must not fill the log with them.
logging.getLogger("grpc._cython.cygrpc").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))
)

M = TypeVar("M", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name
JETSTREAM_SERVICE = "jetstream_proto.Orchestrator"

STATUS: dict[type[Exception], grpc.StatusCode] = {
    RefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    CancelledError: grpc.StatusCode.CANCELLED,
    FailedError: grpc.StatusCode.INTERNAL,
}

PUSHBACK = "grpc-retry-pushback-ms"
"""RETRY_AFTER once more, as gRPC clients with a retry policy read it."""

ENDLESS_S = 10 * 365 * 86400.0
"""A deadline further off than this is none (seconds); gRPC tells so of calls without one."""


class GrpcService:
    """Both methods. They take a message's bytes, so that those that are no message are refused like any bad request.
    The request's id is in the initial metadata when the request is accepted, in the trailing metadata when it is
    refused or fails."""

    def __init__(self, gateway: Gateway, guard: Guard, config: ChatConfig = DEFAULT) -> None:
        self._gateway, self._guard, self._config = gateway, guard, config

    async def HealthCheck(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.HealthCheckResponse:
        """JetStream's own health check; grpc.health.v1 says the same."""
        try:
            parse(pb.HealthCheckRequest, data)
        except RefusedError as error:
            await context.abort(status(error), brief(str(error)), trailing_metadata=trailers(error, own_id(context)))
        await context.send_initial_metadata((named(own_id(context)),))
        return pb.HealthCheckResponse(is_live=self._gateway.is_open)

    async def Decode(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Streams the answers. Leaving early, at whoever's wish, cancels the request."""
        request_id = own_id(context)
        with self._gateway.call():
            try:
                check_id(request_id)
                await self._answer(data, context, request_id)
                return
            except tuple(STATUS) as error:
                failure = without_frames(error)
            del data  # gRPC keeps this frame until garbage is collected
            await context.abort(status(failure), brief(str(failure)), trailing_metadata=trailers(failure, request_id))

    async def _answer(self, data: bytes, context: grpc.aio.ServicerContext, request_id: str) -> None:
        brought = list(authorizations(context.invocation_metadata()))
        known = request_id, deadline_of(context), self._guard.prefix_owner(brought), self._config
        if len(data) <= LONG:  # quicker than a thread begins
            message = parse(pb.DecodeRequest, data)
            read = partial(read_one, lambda: message, *known)
            lane = Lane.of(len(data), is_chat=message.HasField("messages"))
        else:
            read, lane = partial(read_one, partial(parse, pb.DecodeRequest, data), *known), Lane.LONG
        client = self._guard.client(brought, address_of(self._guard, context))
        async with self._gateway.admit(read, lane, client, partial(metadata_of, context)) as admitted:
            # Not before: a client's retry policy only applies to answers that are nothing but trailers.
            await context.send_initial_metadata(((REQUEST_ID, request_id),))
            num_samples = admitted.requests[0].num_samples
            async for batch in admitted.batches():
                await context.write(write_reply((event for _, event in batch), num_samples))


def read_one(
    message: Callable[[], pb.DecodeRequest],
    request_id: str,
    deadline: float | None,
    token: str | None,
    config: ChatConfig,
    engine: "Engine",
    deliver_to: Callable[[int], Deliver],
) -> list[Request]:
    """For Gateway.admit(): a message is one request. Raises RefusedError."""
    known = {"request_id": request_id, "deadline": deadline, "token": token, "config": config}
    return [read_request(message(), engine, deliver_to(0), **known)]


def parse(kind: type[M], data: bytes) -> M:
    """Raises RefusedError for bytes that are no such message."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RefusedError(
            f"these {len(data)} bytes are no {kind.DESCRIPTOR.name}, or a text in them is not UTF-8; "
            "send a message of protos/orchestrator.proto in protobuf's binary form"
        ) from error


def own_id(context: grpc.aio.ServicerContext) -> str:
    """The caller's, or a new one."""
    sent = metadata_of(context, REQUEST_ID)
    return sent[: MAX_REQUEST_ID + 1] if sent else new_id()


def metadata_of(context: grpc.aio.ServicerContext, name: str) -> str | None:
    """What the caller sent under that name."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == name and value), None)


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """s of time.monotonic(); None when the caller waits for ever."""
    left_s = context.time_remaining()
    return None if left_s is None or left_s > ENDLESS_S else time.monotonic() + left_s


def trailers(error: Exception, request_id: str) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a call that is not answered."""
    if not isinstance(error, QueueFullError):
        return (named(request_id),)
    milliseconds = str(round(error.retry_after_s * 1000))
    return (named(request_id), (RETRY_AFTER, milliseconds), (PUSHBACK, milliseconds))


def named(request_id: str) -> tuple[str, str]:
    """As metadata; another name for one that could not be sent."""
    is_sound = request_id.isascii() and request_id.isprintable()
    return REQUEST_ID, request_id if is_sound else new_id()


def status(error: Exception) -> grpc.StatusCode:
    return next(code for kind, code in STATUS.items() if isinstance(error, kind))


def add_to(server: grpc.aio.Server, service: GrpcService) -> None:
    """Serves it under our own name, and under JetStream's for its clients."""
    handlers = {
        "Decode": grpc.unary_stream_rpc_method_handler(
            service.Decode, response_serializer=pb.DecodeResponse.SerializeToString
        ),
        "HealthCheck": grpc.unary_unary_rpc_method_handler(
            service.HealthCheck, response_serializer=pb.HealthCheckResponse.SerializeToString
        ),
    }
    for name in (SERVICE, JETSTREAM_SERVICE):
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
