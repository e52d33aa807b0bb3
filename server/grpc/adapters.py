"""JetStream's adapter service: list, load and unload while the server runs.

What is wrong with a call is told in its answer, as JetStream does; who may not call is told by the status.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from ...engine_impl.errors import RefusedError
from ...protos import adapters_pb2 as pb
from ..errors import DeniedError, UnavailableError, UnknownModelError, brief
from ..gateway import Gateway
from ..net.security import Guard
from .interceptors import authorizations
from .service import parse

SERVICE = "v1"
"""In no package: its methods' paths are /v1/models and so on."""


class AdapterService:
    """Its methods take a message's bytes."""

    def __init__(self, gateway: Gateway, guard: Guard) -> None:
        self._gateway, self._guard = gateway, guard

    async def models(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.ListAdaptersResponse:
        async def listed() -> None:
            parse(pb.ListAdaptersRequest, data)
            for info in self._gateway.adapters.listed(self._gateway.adapters_on_devices):
                reply.adapter_infos.add(
                    adapter_id=info.name,
                    loading_cost=round(info.read_s * 1000),
                    size_hbm=info.device_bytes,
                    size_cpu=info.host_bytes,
                    last_accessed=info.last_asked,
                    status=info.status,
                )

        reply = pb.ListAdaptersResponse()
        return await answered(reply, listed, context)

    async def load_lora_adapter(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.LoadAdapterResponse:
        async def load() -> None:
            self._guard.check_manager(authorizations(context.invocation_metadata()))
            request = parse(pb.LoadAdapterRequest, data)
            store = self._gateway.open_adapters
            await store.load(request.adapter_id, store.allowed(request.adapter_path))

        return await answered(pb.LoadAdapterResponse(), load, context)

    async def unload_lora_adapter(self, data: bytes, context: grpc.aio.ServicerContext) -> pb.UnloadAdapterResponse:
        async def unload() -> None:
            self._guard.check_manager(authorizations(context.invocation_metadata()))
            self._gateway.open_adapters.unload(parse(pb.UnloadAdapterRequest, data).adapter_id)

        return await answered(pb.UnloadAdapterResponse(), unload, context)


async def answered(reply: Any, work: Callable[[], Awaitable[None]], context: grpc.aio.ServicerContext) -> Any:
    """The reply, with how `work` went."""
    try:
        await work()
    except DeniedError as error:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, brief(str(error)))
    except UnavailableError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, brief(str(error)))
    except (RefusedError, UnknownModelError) as error:
        reply.error_message = brief(str(error))
    else:
        reply.success = True
    return reply


def serialized(message: Message) -> bytes:
    return message.SerializeToString()


def add_to(server: grpc.aio.Server, service: AdapterService) -> None:
    methods = (service.models, service.load_lora_adapter, service.unload_lora_adapter)
    handlers = {
        method.__name__: grpc.unary_unary_rpc_method_handler(method, response_serializer=serialized)
        for method in methods
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
