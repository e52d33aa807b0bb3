"""The HTTP server: OpenAI's paths, who may pass, how a call begins and ends. It shares its event loop with gRPC's.

A call is answered as gRPC's are: parsed, admitted at the gateway, then one chunk for whatever has come since the one
before. A stream's status and headers wait for its first tokens, so that what fails before has a status of its own.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.typedefs import Handler

from ..config import ServerConfig
from ..gateway import REQUEST_ID, Gateway, Lane, check_id, new_id
from ..net import tls
from ..net.ports import Listener, address_of, listening, listening_at
from ..net.security import AUTHORIZATION, FORWARDED, UNKNOWN, Guard
from . import adapters
from .anthropic.answer import MessagesAnswer
from .anthropic.answer import error_body as anthropics_error
from .anthropic.body import MessagesBody
from .bodies import Body, ChatBody, CompletionBody
from .completions import CompletionReply
from .errors import SERVER, HttpError, told
from .incoming import check_json, incoming, read_body
from .models import Names
from .origins import Origins
from .page import Page
from .reading import BodyReader, too_large
from .replies import ChatReply
from .responses.answer import ResponsesAnswer
from .responses.body import ResponsesBody
from .stream import Answer, made, stream
from .surface import HEALTH, PING, Surface
from .token_names import TokenNames
from .translated import TranslatedBody

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

OURSELVES = "slipstream"
"""As answers call the server."""

PAGE = "/"
MESSAGES = "/v1/messages"
API_KEY = "x-api-key"
OPEN = (HEALTH, PING, PAGE)
"""Paths that need no token."""

NAME = web.RequestKey("name", str)
"""What a request is called, by its caller or by us."""


class HttpServer:
    """`open()` it, `close()` it."""

    def __init__(self, gateway: Gateway, guard: Guard, config: ServerConfig, is_ready: Callable[[], bool]) -> None:
        """`is_ready` decides /health. Raises RefusedError for certificates that cannot be used."""
        self._gateway, self._guard, self._config, self._is_ready = gateway, guard, config, is_ready
        tls.context(config.security)  # to check it before the load
        self._origins = Origins(config.security.allow_origin, config.hosts)
        self._reader = BodyReader(config.security.max_message_bytes)
        self._listener: Listener | None = None
        self._names: TokenNames | None = None
        self._models = Names(config.served_model_name, int(time.time()), gateway.adapters)
        self._surface = Surface(gateway, self._reader, self._models, config.chat, is_ready)
        self.address: str | None = None
        """host:port once it is open; the port is the real one."""

    @property
    def url(self) -> str:
        return f"{'http' if self._config.security.tls_cert is None else 'https'}://{self.address}"

    async def open(self) -> None:
        """Raises RefusedError when the port cannot be had."""
        host, port, socks = self._config.host, self._config.http_port, list[socket.socket]()
        try:
            if port is not None:
                socks += listening(host, port, what="HTTP", flag="--http-port")
                self.address = address_of(socks[0], host)
            for address in self._config.more_http:
                socks += (more := listening_at(address, what="HTTP", flag="--http-listen"))
                self.address = self.address or address_of(more[0], address.host)
        except BaseException:
            for sock in socks:
                sock.close()
            raise
        self._listener = Listener(self._application(), socks, refuse, self._config.security)
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
                *self._surface.routes(),
                *([web.get(PAGE, Page().get)] if self._config.has_page else []),
                web.post("/v1/completions", self._completions),
                web.post("/v1/chat/completions", self._chat_completions),
                web.post("/v1/responses", self._responses),
                web.post(MESSAGES, self._messages),
                web.post("/v1/load_lora_adapter", self._load_adapter),
                web.post("/v1/unload_lora_adapter", self._unload_adapter),
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
            if request.path not in OPEN and not self._guard.is_known(authorizations(request)):
                raise HttpError(401, UNKNOWN, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            if request.method == "OPTIONS":
                return web.Response(status=204, headers={"allow": allowed(error)})
            return error_response(self._of_aiohttp(request, error), request.path)
        except web.HTTPException as error:  # aiohttp's own
            return error_response(self._of_aiohttp(request, error), request.path)
        except Exception as error:
            return error_response(told(error, request[NAME]), request.path)

    def _of_aiohttp(self, request: web.Request, error: web.HTTPException) -> HttpError:
        match error:
            case web.HTTPNotFound():
                paths = sorted({route.resource.canonical for route in request.app.router.routes() if route.resource})
                message = f"there is no {request.path[:80]}; there are {', '.join(paths)}"
                return HttpError(404, message, code="unknown_url")
            case web.HTTPMethodNotAllowed():
                message = f"{request.method} {request.path} is not there; it takes {allowed(error)}"
                return HttpError(405, message, headers={"allow": allowed(error)})
            case web.HTTPRequestEntityTooLarge():
                return too_large(self._config.security.max_message_bytes)
            case _:
                return HttpError(error.status, error.text or error.reason)

    async def _load_adapter(self, request: web.Request) -> web.Response:
        check_json(request)
        return await adapters.load(self._gateway, self._guard, authorizations(request), await read_body(request))

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        check_json(request)
        return await adapters.unload(self._gateway, self._guard, authorizations(request), await read_body(request))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, CompletionBody, CompletionReply)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, ChatBody, ChatReply)

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, ResponsesBody, ResponsesAnswer)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, MessagesBody, MessagesAnswer)

    async def _answer(
        self, request: web.Request, kind: type[Body] | type[TranslatedBody], form: Callable[..., Answer]
    ) -> web.StreamResponse:
        """Leaving early, at whoever's wish, cancels the requests."""
        read_in = await incoming(request, kind, self._reader, self._gateway)
        body, lane = read_in.body, Lane.of(read_in.size, is_chat=kind is not CompletionBody)
        self._models.check(self._gateway.engine, body.model)
        address = self._guard.address(request.remote or "", request.headers.get(FORWARDED))
        client = self._guard.client(authorizations(request), address)
        held = self._guard.hold(authorizations(request), address, body.num_prompts)
        token = self._guard.prefix_owner(authorizations(request))

        def read(engine: "Engine", deliver_to: Any):
            requests = body.requests(request[NAME], engine, deliver_to, token, self._config.chat)
            for one in requests:
                one.adapter_name = self._models.adapter(engine, body.model)
            return requests

        with self._gateway.call(), held:
            async with self._gateway.admit(read, lane, client, request.headers.get) as admitted:
                names = self._token_names(admitted.engine)
                model = self._models.of_answer(admitted.engine, body.model)
                answer = form(body, admitted.requests, request[NAME], model, names)
                if body.stream:
                    return await stream(request, answer, admitted.batches(), request[NAME])
                async for batch in admitted.batches():
                    await made(answer, answer.add, batch)
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


def authorizations(request: web.Request) -> list[str]:
    """As OpenAI's clients bring a token, or as Anthropic's do."""
    keys = [f"Bearer {key}" for key in request.headers.getall(API_KEY, [])]
    return [*request.headers.getall(AUTHORIZATION, []), *keys]


def allowed(error: web.HTTPMethodNotAllowed) -> str:
    """The methods of a path, as a header tells them."""
    return ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))


def error_response(error: HttpError, path: str) -> web.Response:
    return web.json_response(error_body(error, path), status=error.status, headers=error.headers)


def error_body(error: HttpError, path: str) -> dict[str, Any]:
    """In the form of whoever's path it is."""
    return anthropics_error(error) if path.startswith(MESSAGES) else error.body


def refuse(status: int, message: str) -> web.Response:
    """A request whose head cannot be read."""
    error = HttpError(status, message) if status < 500 else HttpError(status, message, kind=SERVER)
    return web.json_response(error.body, status=status, headers={"server": OURSELVES, REQUEST_ID: new_id()})
