"""The gRPC front: the calls, their beginning, their end and their status codes."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import grpc

from ..engine_impl.errors import RefusedError
from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorServicer, add_OrchestratorServicer_to_server
from .errors import FailedError, QueueFullError, UnavailableError
from .messages import read_request, replies
from .orchestrator import Orchestrator
from .request import Event

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine

SERVICE = pb.DESCRIPTOR.services_by_name["Orchestrator"].full_name
JETSTREAM_SERVICE = "jetstream_proto.Orchestrator"

STATUS: dict[type[Exception], grpc.StatusCode] = {
    RefusedError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    FailedError: grpc.StatusCode.INTERNAL,
}


class Front(OrchestratorServicer):
    """Both methods. Answers UNAVAILABLE until `open()`."""

    def __init__(self) -> None:
        self.calls = 0
        """Decode calls that are being answered."""
        self._served: tuple[Engine, Orchestrator] | None = None
        self._closed = "the model is still loading; try again later"

    def open(self, engine: "Engine", orchestrator: Orchestrator) -> None:
        """From now on requests are served."""
        self._served = engine, orchestrator

    def close(self, reason: str) -> None:
        """From now on new requests are refused with UNAVAILABLE; those in flight go on."""
        self._served, self._closed = None, reason

    async def HealthCheck(self, message: pb.HealthCheckRequest, context: grpc.aio.ServicerContext):
        """JetStream's own health check; grpc.health.v1 says the same."""
        return pb.HealthCheckResponse(is_live=self._served is not None)

    async def Decode(self, message: pb.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Streams one answer. Leaving early, at whoever's wish, cancels the request."""
        self.calls += 1
        try:
            await self._answer(message, context)
        except tuple(STATUS) as error:
            await context.abort(status(error), str(error))
        finally:
            self.calls -= 1

    async def _answer(self, message: pb.DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        if self._served is None:
            raise UnavailableError(self._closed)
        engine, orchestrator = self._served
        events: asyncio.Queue[Event] = asyncio.Queue()
        deliver = partial(asyncio.get_running_loop().call_soon_threadsafe, events.put_nowait)
        # In a thread: the text may be megabytes, and others are being answered.
        request = await asyncio.to_thread(read_request, message, engine, deliver)
        orchestrator.submit(request)
        try:
            async for reply in replies(events, request, engine.get_tokenizer().stream()):
                await context.write(reply)
        finally:
            orchestrator.cancel(request)


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
