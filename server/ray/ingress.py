"""What Serve's proxies call: it looks at how a prompt begins, and passes the call on to the replica that is chosen.

A deployment of its own, without an engine: Serve's HTTP proxy chooses a replica before it has read a request's body, so
the choice by prompt takes a second one.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast
from urllib.parse import quote

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..config import SecurityConfig
from ..errors import UnavailableError
from ..gateway import REQUEST_ID
from ..grpc.interceptors import ip_of
from ..grpc.service import JETSTREAM_SERVICE, SERVICE, status
from ..http.errors import told
from ..http.incoming import BODY_S, too_slow
from ..http.server import API_KEY, error_body
from ..net.security import AUTHORIZATION, FORWARDED
from . import chain
from .calls import GrpcCall, GrpcEnd, Headers, HttpCall, HttpHead
from .services import CHECK, FailedCallError, be_brief

log = logging.getLogger(__name__)

OF_A_CONNECTION = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect")
)
"""Headers that are about a connection, and end with it."""
NOT_SENT = OF_A_CONNECTION | {"content-length", FORWARDED}
"""Of a request: what is sent anew."""
NOT_ANSWERED = OF_A_CONNECTION | {"date", "server", REQUEST_ID}
"""Of an answer: what Serve's proxy adds itself."""

LOST = RayActorError, BackPressureError, DeploymentUnavailableError
"""How Ray tells that no replica answers."""


class Ingress:
    """One of those that the proxies call."""

    def __init__(self, engines: DeploymentHandle, security: SecurityConfig) -> None:
        """`security`: the replicas'."""
        be_brief()
        self._engines = engines
        self._most_bytes = security.max_message_bytes
        self._has_owners = security.auth_token_file is not None and security.isolate_prefixes

    async def __call__(self, request: Request) -> Response:
        """HTTP, any path. A client that leaves has the replica's work cancelled."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        try:
            call = await self._http_call(request)
            answer = self._asked("http", call)
            try:
                head = await anext(answer)
            except BaseException:
                answer.cancel()
                raise
        except Exception as error:
            failure = told(unavailable(error), request.headers.get(REQUEST_ID, ""))
            return JSONResponse(error_body(failure, path), failure.status, failure.headers)
        assert isinstance(head, HttpHead)
        response = StreamingResponse(rest_of(answer), head.status)
        response.raw_headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in head.headers
            if name not in NOT_ANSWERED
        ]
        return response

    async def Decode(self, data: bytes, grpc_context: RayServegRPCContext) -> AsyncGenerator["Message"]:
        """Our gRPC service's method, and JetStream's. Serve lets no trailing metadata through with an error."""
        owner = self._owner(grpc_context.invocation_metadata())
        call = GrpcCall(f"/{SERVICE}/Decode", metadata(grpc_context), data, chain.of_message(data, owner))
        async with aclosing(self._messages(call, grpc_context)) as messages:
            async for message in messages:
                yield message

    async def HealthCheck(self, data: bytes, grpc_context: RayServegRPCContext) -> "Message":
        """JetStream's health check, by the name that needs no token."""
        return await self._only(GrpcCall(f"/{JETSTREAM_SERVICE}/HealthCheck", (), data, ()), grpc_context)

    async def Check(self, data: bytes, grpc_context: RayServegRPCContext) -> "Message":
        """grpc.health.v1: a replica's."""
        return await self._only(GrpcCall(CHECK, (), data, ()), grpc_context)

    async def _only(self, call: GrpcCall, context: RayServegRPCContext) -> "Message":
        """The answer of a call that has one message."""
        messages = [message async for message in self._messages(call, context)]
        return messages[0]

    async def _messages(self, call: GrpcCall, context: RayServegRPCContext) -> AsyncGenerator["Message"]:
        """The answer's. Raises FailedCallError, with the call's status in the context, for one that failed."""
        context.set_trailing_metadata([one for one in call.metadata if one[0] == REQUEST_ID])
        answer = self._asked("grpc", call)
        end = GrpcEnd("UNKNOWN", "")
        try:
            async for part in answer:
                if isinstance(part, GrpcEnd):
                    end = part
                else:
                    yield Message(part)
        except LOST as error:
            lost = unavailable(error)
            end = GrpcEnd(status(lost).name, str(lost))
        finally:
            answer.cancel()
        if end.code != grpc.StatusCode.OK.name:
            context.set_code(grpc.StatusCode[end.code])
            context.set_details(end.details)
            raise FailedCallError(end.details)

    def _asked(self, method: str, call: HttpCall | GrpcCall) -> DeploymentResponseGenerator[Any]:
        """What a replica answers."""
        handle = self._engines.options(method_name=method, stream=True)
        return cast("DeploymentResponseGenerator[Any]", handle.remote(call))

    async def _http_call(self, request: Request) -> HttpCall:
        headers: Headers = tuple(
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw
        )
        sent = tuple(one for one in headers if one[0] not in NOT_SENT)
        peer = request.client.host if request.client is not None else ""
        target = spelt(request.scope.get("raw_path", b"")).removeprefix(request.scope.get("root_path", ""))
        if query := spelt(request.scope["query_string"]):
            target += f"?{query}"
        body = await self._body_of(request)
        return HttpCall(
            request.method, target, (*sent, (FORWARDED, peer)), body, chain.of_body(body, self._owner(headers))
        )

    async def _body_of(self, request: Request) -> bytes:
        """One that is too large is cut behind the first byte too many: the front refuses it, in its own words. Raises
        HttpError for one that does not come."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S), aclosing(request.stream()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > self._most_bytes:
                        break
        except TimeoutError:
            raise too_slow() from None
        return bytes(body[: self._most_bytes + 1])

    def _owner(self, headers: Any) -> bytes:
        """Whose cached prefixes a call finds, where callers have their own."""
        if not self._has_owners:
            return b""
        return b"\n".join(value.encode() for name, value in headers if name in (AUTHORIZATION, API_KEY))


class Message:
    """An answer's, as Serve takes one: it asks for its bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


def metadata(context: RayServegRPCContext) -> Headers:
    """What a replica's front is told: all that the caller sent, who that is, and what Serve calls the request if the
    caller has not named it."""
    sent = [
        (key, value) for key, value in context.invocation_metadata() if key not in NOT_SENT and is_ours_to_send(key)
    ]
    if not any(key == REQUEST_ID for key, _ in sent):
        sent += [(REQUEST_ID, value) for key, value in context.trailing_metadata() if key == "request_id"]
    return (*sent, (FORWARDED, ip_of(context.peer())))


def spelt(of_target: bytes) -> str:
    """As it came; bytes that no URL may have, which a stranger sends all the same, in percent encoding."""
    return quote(of_target, safe="%/?:@!$&'()*+,;=-._~[]|")


def is_ours_to_send(key: str) -> bool:
    """Rather than gRPC's own to add."""
    return key != "user-agent" and not key.startswith("grpc-")


async def rest_of(answer: Any) -> AsyncIterator[bytes]:
    """A body as it comes. A replica that dies breaks it off."""
    try:
        async for part in answer:
            yield part
    finally:
        answer.cancel()


def unavailable(error: Exception) -> Exception:
    """What our fronts would have said."""
    if not isinstance(error, LOST):
        return error
    return UnavailableError("no replica answers: the one that was asked has died, or all are busy; try again")
