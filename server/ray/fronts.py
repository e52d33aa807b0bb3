"""A server in this process, and calls to its fronts as they came from elsewhere.

Our HTTP server is aiohttp's, which is no ASGI application that Serve could mount, and its gRPC service is one of
grpc.aio's servers. So both listen on Unix sockets, in a folder that only this user may enter, and are called by clients
that pass on bytes: whatever is read, refused, limited or said is said by the fronts, in the same code as anywhere.
"""

import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import aiohttp
import grpc
from yarl import URL

from ..config import ServerConfig
from ..errors import UnavailableError
from ..lifecycle import Load, Serving
from ..scheduler.orchestrator import Orchestrator
from .calls import GrpcCall, GrpcEnd, HttpCall, HttpHead
from .settings import with_sockets

GONE = "the replica is stopping; try again"


class Fronts:
    """`async with Fronts(load, config) as fronts:` serves inside the block, and drains on leaving it."""

    def __init__(self, load: Load, config: ServerConfig) -> None:
        """`load` as Serving's."""
        self._load, self._config = load, config
        self._stack = AsyncExitStack()
        self._serving: Serving

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slipstream-")))
            at_grpc, at_http = str(folder / "grpc"), str(folder / "http")
            self._session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(at_http, limit=0),
                    timeout=aiohttp.ClientTimeout(total=None),  # the caller's own, which cancels
                    auto_decompress=False,
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            )
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            self._channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(f"unix:{at_grpc}", options=options)
            )
            # Last, so that it is left first: it drains, and the clients are there for what still runs.
            serving = Serving(self._load, with_sockets(self._config, at_grpc, at_http))
            self._serving = await stack.enter_async_context(serving)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.aclose()

    @property
    def orchestrator(self) -> Orchestrator[Any, Any, Any]:
        """Raises UnavailableError when the engine was given up."""
        if self._serving.dead_reason is not None or self._serving.orchestrator is None:
            raise UnavailableError(self._serving.dead_reason or GONE)
        return self._serving.orchestrator

    async def http(self, call: HttpCall) -> AsyncGenerator[HttpHead | bytes]:
        """The head of the answer, then its body as it comes. Leaving early cancels. Raises UnavailableError."""
        try:
            async with self._session.request(
                call.method,
                URL(f"http://slipstream{call.target}", encoded=True),
                headers=call.headers,
                data=call.body or None,
                allow_redirects=False,
                skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            ) as answer:
                head = [(name.lower(), value) for name, value in answer.headers.items()]
                yield HttpHead(answer.status, tuple(head))
                async for part in answer.content.iter_any():
                    yield part
        except aiohttp.ClientError as error:
            raise UnavailableError(GONE) from error

    async def grpc(self, call: GrpcCall) -> AsyncGenerator[bytes | GrpcEnd]:
        """The messages of the answer, then how it ended. Leaving early cancels."""
        answer = self._channel.unary_stream(call.method)(call.body, metadata=call.metadata)
        try:
            async for message in answer:
                yield message
        except grpc.aio.AioRpcError:
            pass  # told below
        finally:
            answer.cancel()
        yield GrpcEnd((await answer.code()).name, await answer.details() or "")
