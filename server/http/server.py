"""The HTTP server: OpenAI's paths, who may pass, how a call begins and ends. It shares its event loop with gRPC's.

A call is answered as gRPC's are: parsed, admitted at the gateway, then one chunk for whatever has come since the one
before. A stream's status and headers wait for its first tokens, so that what fails before has a status of its own.
"""

import asyncio
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestPayloadError

from ..config import ServerConfig
from ..errors import UnavailableError
from ..gateway import REQUEST_ID, Gateway, Lane, check_id, new_id
from ..net import tls
from ..net.ports import Listener, address_of, listening
from ..net.security import AUTHORIZATION, UNKNOWN, Guard
from ..request.request import Limits
from .bodies import Body, ChatBody, CompletionBody
from .errors import SERVER, HttpError, UnknownModelError, told
from .origins import Origins
from .reading import BodyReader, too_large
from .replies import ChatReply, CompletionReply, Reply
from .stream import stream
from .token_names import TokenNames

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

HEALTH = "/health"
"""Needs no token: whoever watches the server has none."""

BODY_S = 60.0
"""How long a body may take to arrive (seconds)."""

JSON = "application/json"
"""What a body must be said to be: a browser sends nothing else to a server that does not know its page."""

OURSELVES = "slipstream"
"""As answers call the server."""

PATHS = f"{HEALTH}, /v1/models, /v1/completions and /v1/chat/completions"

NAME = web.RequestKey("name", str)
"""What a request is called, by its caller or by us."""


class HttpServer:
    """`open()` it, `close()` it."""

    def __init__(self, gateway: Gateway, guard: Guard, config: ServerConfig, is_ready: Callable[[], bool]) -> None:
        """`is_ready` decides /health. Raises RefusedError for certificates that cannot be used."""
        self._gateway, self._guard, self._config, self._is_ready = gateway, guard, config, is_ready
        tls.context(config.security)  # to check it before the load
        self._origins = Origins(config.security.allow_origin)
        self._reader = BodyReader(config.security.max_message_bytes)
        self._listener: Listener | None = None
        self._names: TokenNames | None = None
        self._created = int(time.time())
        self.address: str | None = None
        """host:port once it is open; the port is the real one."""

    @property
    def url(self) -> str:
        return f"{'http' if self._config.security.tls_cert is None else 'https'}://{self.address}"

    async def open(self) -> None:
        """Raises RefusedError when the port cannot be had."""
        host, port = self._config.host, self._config.http_port
        assert port is not None
        sock = listening(host, port, what="HTTP", flag="--http-port")
        self._listener = Listener(self._application(), sock, refuse, self._config.security)
        self.address = address_of(sock, host)
        await self._listener.start()

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        self._reader.close()

    def _application(self) -> web.Application:
        limit = self._config.security.max_message_bytes
        app = web.Application(middlewares=[self._guarded], client_max_size=limit)
        app.on_response_prepare.append(self._send_name)
        app.add_routes(
            [
                web.get(HEALTH, self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
            ]
        )
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Names the request, checks who asks, and tells what goes wrong."""
        request[NAME] = new_id()
        try:
            if sent := request.headers.get(REQUEST_ID):
                check_id(sent)
                request[NAME] = sent
            if self._origins.is_preflight(request):
                return web.Response(status=204)
            self._origins.check(request)
            if request.path != HEALTH and not self._guard.is_known(authorizations(request)):
                raise HttpError(401, UNKNOWN, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            return await handler(request)
        except web.HTTPException as error:  # aiohttp's own
            return error_response(self._of_aiohttp(request, error))
        except Exception as error:
            return error_response(told(error, request[NAME]))

    def _of_aiohttp(self, request: web.Request, error: web.HTTPException) -> HttpError:
        match error:
            case web.HTTPNotFound():
                return HttpError(404, f"there is no {request.path}; there are {PATHS}", code="unknown_url")
            case web.HTTPMethodNotAllowed():
                allowed = ", ".join(sorted(error.allowed_methods))
                message = f"{request.method} {request.path} is not there; it takes {allowed}"
                return HttpError(405, message, headers={"allow": allowed})
            case web.HTTPRequestEntityTooLarge():
                return too_large(self._config.security.max_message_bytes)
            case _:
                return HttpError(error.status, error.text or error.reason)

    async def _health(self, request: web.Request) -> web.Response:
        if not self._is_ready():
            raise UnavailableError("not ready")
        return web.json_response({"status": "ready"})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [model_card(self._gateway.engine, self._created)]})

    async def _model(self, request: web.Request) -> web.Response:
        engine, asked = self._gateway.engine, request.match_info["model"]
        if asked != engine.model_name:
            raise UnknownModelError(f"model {asked!r} is not served; {engine.model_name!r} is")
        return web.json_response(model_card(engine, self._created))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, CompletionBody, CompletionReply)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, ChatBody, ChatReply)

    async def _answer(self, request: web.Request, kind: type[Body], form: type[Reply]) -> web.StreamResponse:
        """Leaving early, at whoever's wish, cancels the requests."""
        if request.content_type != JSON:
            sent = request.headers.get("content-type", "")
            raise HttpError(415, f"content-type={sent[:80]!r} must be {JSON}; send that header")
        raw, encoding = await read_body(request), request.headers.get("content-encoding", "")
        body = await self._reader.read(kind, raw, encoding, lambda: Limits.of(self._gateway.engine))
        lane = Lane.of(len(raw), is_chat=kind is ChatBody)
        client = self._guard.client(authorizations(request), request.remote or "")
        held = self._guard.hold(authorizations(request), request.remote or "", body.num_prompts)
        token = self._guard.prefix_owner(authorizations(request))

        def read(engine: "Engine", deliver_to: Any):
            return body.requests(request[NAME], engine, deliver_to, token, self._config.chat)

        with self._gateway.call(), held:
            async with self._gateway.admit(read, lane, client, request.headers.get) as admitted:
                names = self._token_names(admitted.engine)
                answer = form(body, admitted.requests, request[NAME], admitted.engine.model_name, names)
                if body.stream:
                    return await stream(request, answer, admitted.batches(), request[NAME])
                async for batch in admitted.batches():
                    answer.add(batch)
                # In a thread: with log-probabilities it may be megabytes.
                text = await asyncio.to_thread(lambda: json.dumps(answer.whole()))
                return web.Response(text=text, content_type="application/json")

    async def _send_name(self, request: web.Request, response: web.StreamResponse) -> None:
        """The request's, in every answer, and ours instead of aiohttp's version."""
        response.headers["server"] = OURSELVES
        response.headers.update(self._origins.headers(request))
        if NAME in request:
            response.headers[REQUEST_ID] = request[NAME]

    def _token_names(self, engine: "Engine") -> TokenNames:
        self._names = self._names or TokenNames(engine.get_tokenizer())
        return self._names


async def read_body(request: web.Request) -> bytes:
    """Raises HttpError, and aiohttp's for one that is too large."""
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise HttpError(408, f"the body took longer than {BODY_S:g} s") from None
    except RequestPayloadError as error:
        raise HttpError(400, f"the body cannot be read: {error}") from error


def authorizations(request: web.Request) -> list[str]:
    return request.headers.getall(AUTHORIZATION, [])


def model_card(engine: "Engine", created: int) -> dict[str, Any]:
    """As /v1/models lists it; `max_model_len` (tokens) is vLLM's. `created`: s since 1970."""
    return {
        "id": engine.model_name,
        "object": "model",
        "created": created,
        "owned_by": "slipstream",
        "max_model_len": Limits.of(engine).longest,
    }


def error_response(error: HttpError) -> web.Response:
    return web.json_response(error.body, status=error.status, headers=error.headers)


def refuse(status: int, message: str) -> web.Response:
    """A request whose head cannot be read."""
    error = HttpError(status, message) if status < 500 else HttpError(status, message, kind=SERVER)
    return web.json_response(error.body, status=status, headers={"server": OURSELVES, REQUEST_ID: new_id()})
