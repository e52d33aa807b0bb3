"""The guard at the gRPC server's entrance. Health checks stay open."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from ..errors import QueueFullError
from ..net.security import AUTHORIZATION, FORWARDED, UNKNOWN, Guard

OPEN_METHODS = ("/grpc.health.v1.Health/", "/jetstream_proto.Orchestrator/HealthCheck")
"""Path prefixes that need no token: whoever watches the server has none, and learns nothing but that it lives."""

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class TokenCheck(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to requests without a known token."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_METHODS):
            return handler
        if self._guard.is_known(authorizations(handler_call_details.invocation_metadata)):
            return handler
        return refusing(handler, grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)


class StreamLimit(grpc.aio.ServerInterceptor):
    """Answers RESOURCE_EXHAUSTED to a client that has too many answers under way."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler.unary_stream or handler_call_details.method.startswith(OPEN_METHODS):
            return handler

        async def limited(request: Any, context: grpc.aio.ServicerContext) -> None:
            try:
                brought = authorizations(context.invocation_metadata())
                with self._guard.hold(brought, address_of(self._guard, context)):
                    await handler.unary_stream(request, context)
            except QueueFullError as error:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

        return grpc.unary_stream_rpc_method_handler(limited, handler.request_deserializer, handler.response_serializer)


def interceptors(guard: Guard) -> list[grpc.aio.ServerInterceptor]:
    """In the order in which they are asked; those that would let everybody pass are left out."""
    chain: list[grpc.aio.ServerInterceptor] = [Parsing()]
    if guard.tokens is not None:
        chain.append(TokenCheck(guard))
    if guard.streams is not None:
        chain.append(StreamLimit(guard))
    return chain


def authorizations(metadata: Any) -> Iterator[str]:
    """What the call brought as authorization."""
    return (value for key, value in metadata or () if key == AUTHORIZATION and isinstance(value, str))


def address_of(guard: Guard, context: grpc.aio.ServicerContext) -> str:
    """The client's."""
    forwarded = [str(value) for key, value in context.invocation_metadata() or () if key == FORWARDED]
    return guard.address(ip_of(context.peer()), forwarded[-1] if forwarded else None)


def ip_of(peer: str) -> str:
    """Of gRPC's name for a client: "ipv4:192.0.2.1:5000", "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def refusing(handler: Any, code: grpc.StatusCode, details: str) -> Any:
    """A handler of the same kind that only refuses."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, details)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse, None, handler.response_serializer)  # nothing is parsed for whoever may not ask


class Parsing(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to bytes that are no message of their method. gRPC itself answers UNKNOWN, and logs a
    traceback for each; it is left to the methods to parse."""

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer

        async def parsed(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            try:
                return parse(data)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"these {len(data)} bytes are no such message")

        async def each(stream: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async for data in stream:
                yield await parsed(data, context)

        if handler.stream_stream is not None:

            async def stream_stream(stream: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
                async for reply in handler.stream_stream(each(stream, context), context):
                    yield reply

            return grpc.stream_stream_rpc_method_handler(stream_stream, None, handler.response_serializer)
        if handler.unary_stream is not None:

            async def unary_stream(data: bytes, context: grpc.aio.ServicerContext) -> Any:
                return await handler.unary_stream(await parsed(data, context), context)

            return grpc.unary_stream_rpc_method_handler(unary_stream, None, handler.response_serializer)
        if handler.unary_unary is not None:

            async def unary_unary(data: bytes, context: grpc.aio.ServicerContext) -> Any:
                return await handler.unary_unary(await parsed(data, context), context)

            return grpc.unary_unary_rpc_method_handler(unary_unary, None, handler.response_serializer)
        return handler  # nobody here streams requests alone
