"""What tools ask for beside answers: what is served, whether it is well, and the tokenizer."""

import asyncio
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web

from ..config import ChatConfig
from ..errors import UnavailableError
from ..gateway import Gateway, Lane
from .anthropic.body import CountBody
from .incoming import incoming
from .models import Names
from .reading import BodyReader
from .vocabulary import DetokenizeBody, TokenizeBody, tokenizer_info

HEALTH, PING = "/health", "/ping"
"""Need no token: whoever watches the server has none."""
DISTRIBUTION = "slipstream-llm"


class Surface:
    """One server's."""

    def __init__(
        self, gateway: Gateway, reader: BodyReader, names: Names, chat: ChatConfig, is_ready: Callable[[], bool]
    ) -> None:
        self._gateway, self._reader, self._names, self._chat, self._is_ready = gateway, reader, names, chat, is_ready

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(HEALTH, self._health),
            web.get(PING, self._health),
            web.post(PING, self._health),
            web.get("/version", self._version),
            web.get("/load", self._load),
            web.get("/v1/models", self._models),
            web.get("/v1/models/{model:.+}", self._model),
            web.get("/tokenizer_info", self._tokenizer_info),
            web.post("/tokenize", self._tokenize),
            web.post("/detokenize", self._detokenize),
            web.post("/v1/messages/count_tokens", self._count_tokens),
        ]

    async def _health(self, request: web.Request) -> web.Response:
        if not self._is_ready():
            raise UnavailableError("not ready")
        return web.json_response({"status": "ready"})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": own_version()})

    async def _load(self, request: web.Request) -> web.Response:
        """As vLLM tells it: calls that are being answered."""
        return web.json_response({"server_load": self._gateway.calls})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self._names.cards(self._gateway.engine)})

    async def _model(self, request: web.Request) -> web.Response:
        engine, asked = self._gateway.engine, request.match_info["model"]
        self._names.check(engine, asked)
        return web.json_response(self._names.card(engine, asked))

    async def _tokenizer_info(self, request: web.Request) -> web.Response:
        return web.json_response(tokenizer_info(self._gateway.engine.get_tokenizer()))

    async def _tokenize(self, request: web.Request) -> web.Response:
        return await self._converted(request, TokenizeBody)

    async def _detokenize(self, request: web.Request) -> web.Response:
        return await self._converted(request, DetokenizeBody)

    async def _count_tokens(self, request: web.Request) -> web.Response:
        return await self._converted(request, CountBody)

    async def _converted(
        self, request: web.Request, kind: type[TokenizeBody] | type[DetokenizeBody] | type[CountBody]
    ) -> web.Response:
        read = await incoming(request, kind, self._reader, self._gateway)
        self._names.check(self._gateway.engine, read.body.model)
        lane = Lane.of(read.size, is_chat=bool(getattr(read.body, "messages", None)))
        with self._gateway.call():
            reply = await self._gateway.compute(lambda engine: read.body.reply(engine, self._chat), lane)
            text = await asyncio.to_thread(json.dumps, reply)
        return web.Response(text=text, content_type="application/json")


def own_version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # run from a folder
        return "unknown"
