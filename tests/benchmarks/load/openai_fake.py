"""A server that speaks as much of OpenAI's completions as a load generator hears, in a thread: "a" answers "bcd...".

Letters come in chunks of two, except the first, as a server sends all that has come since its last chunk.
"""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

STOP_ID = ord("z") + 1


@dataclass
class OpenAiFake:
    """Its faults are set from outside; `bodies` are what it was asked, `connections` where from."""

    sends_ids: bool = True
    sends_usage: bool = True
    cached_tokens: int | None = None
    """What usage tells of them; None: nothing."""
    full_after: int | None = None
    """Requests after this one are refused with 429."""
    breaks_after: int | None = None
    """The connection is cut after so many chunks."""
    error_after: int | None = None
    """The stream ends with an error after so many chunks."""
    stop_id: int = STOP_ID
    pause_s: float = 0.001
    """Before each chunk (seconds), so that each is a packet of its own."""
    on_body: Callable[[dict], None] = lambda body: None
    """Called with every request's body."""
    token: str | None = None
    models: tuple[str, ...] = ("fake", "other")
    bodies: list[dict] = field(default_factory=list)
    connections: list[tuple[str, int]] = field(default_factory=list)
    """(host, port) of the caller's end, one for each of `bodies`."""

    async def list_models(self, request: web.Request) -> web.Response:
        if self._is_unknown(request):
            return self._refuse(401, "who are you?")
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        self.bodies.append(body)
        self.connections.append(request.transport.get_extra_info("peername"))
        self.on_body(body)
        if self._is_unknown(request):
            return self._refuse(401, "who are you?")
        if body["model"] not in self.models:
            return self._refuse(404, f"no model {body['model']}")
        if self.full_after is not None and len(self.bodies) > self.full_after:
            return self._refuse(429, "8 requests wait already")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        ids = self._answer(body)
        chunks = [ids[:1]] + [ids[i : i + 2] for i in range(1, len(ids), 2)]
        for index, chunk in enumerate(chunks):
            if index == self.breaks_after:
                request.transport.close()
                return response
            if index == self.error_after:
                await self._send(response, {"error": {"message": "the engine failed"}})
                return response
            choice = {"index": 0, "text": "".join(map(chr, chunk)), "finish_reason": None}
            await self._send(response, {"choices": [choice | ({"token_ids": chunk} if self.sends_ids else {})]})
        if self.sends_usage and body["stream_options"]["include_usage"]:
            usage: dict = {"completion_tokens": len(ids), "prompt_tokens_details": None}
            if self.cached_tokens is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _answer(self, body: dict) -> list[int]:
        last = body["prompt"][-1]
        ids = range(last + 1, last + 1 + body["max_tokens"])
        return [i for i in ids if i < self.stop_id or body.get("ignore_eos")]

    def _is_unknown(self, request: web.Request) -> bool:
        return self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}"

    def _refuse(self, status: int, message: str) -> web.Response:
        return web.json_response({"error": {"message": message}}, status=status)

    async def _send(self, response: web.StreamResponse, event: dict) -> None:
        await asyncio.sleep(self.pause_s)
        await response.write(f"data: {json.dumps(event)}\n\n".encode())

    @contextmanager
    def serving(self, tls: ssl.SSLContext | None = None):
        """http://127.0.0.1:port, or https://localhost:port."""
        started, ends = threading.Event(), []

        async def serve():
            app = web.Application()
            app.router.add_get("/v1/models", self.list_models)
            app.router.add_post("/v1/completions", self.complete)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
            await site.start()
            stop = asyncio.Event()
            ends.extend((asyncio.get_running_loop(), stop, runner.addresses[0][1]))
            started.set()
            await stop.wait()
            await runner.cleanup()

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert started.wait(10)
        loop, stop, port = ends
        try:
            yield f"https://localhost:{port}" if tls else f"http://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
